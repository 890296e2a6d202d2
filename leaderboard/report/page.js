// What is shown, and the filters that choose it.
const state = { run: null, aware: false, task: null, ratio: null, hidden: new Set(), sort: null };
const THEMES = { auto: "light or dark: as the system", light: "light", dark: "dark" };

const runOf = (table) => JSON.stringify([table.model, table.run_id, table.follows]);
const tablesOfRun = () => DATA.tables.filter((table) => runOf(table) === state.run);

function options(select, entries, chosen) {
  byId(select).replaceChildren(...entries.map(([value, text]) => el("option", { value: JSON.stringify(value), selected: value === chosen }, text)));
  byId(select).disabled = entries.length < 2;
}

function drawFilters() {
  const { table } = state;
  const runs = [...new Map(DATA.tables.map((one) => [runOf(one), one])).values()];
  const twice = (model) => new Set(runs.filter((one) => one.model === model).map((one) => one.run_id)).size > 1;
  const named = (one) => [one.model, twice(one.model) ? `run ${one.run_id}` : "", one.follows ? "agreement" : ""].filter(Boolean).join(", ");
  options("model", runs.map((one) => [runOf(one), named(one)]), state.run);
  options("task", [...(table.tasks.length > 1 ? [[null, "all, mean"]] : []), ...table.tasks.map((task) => [task, task])], state.task);
  options("ratio", [[null, "all"], ...ratiosOf(table).map((ratio) => [ratio, `${asRatio(ratio)} removed`])], state.ratio);
  byId("aware").setAttribute("aria-checked", String(table.query_aware));
  byId("aware").disabled = tablesOfRun().length < 2;
  byId("aware").title = byId("aware").disabled ? `this run is query-${table.query_aware ? "aware" : "agnostic"} only` : "whether the question was known when the context was compressed";
  byId("presses").replaceChildren(...table.presses.map((press) => {
    const button = el("button", { type: "button", "aria-pressed": String(!state.hidden.has(press)) }, marker(table, press), press);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(press)) state.hidden.add(press);
      draw();
      [...byId("presses").children][table.presses.indexOf(press)].focus();
    });
    return button;
  }));
}

const ratiosOf = (table) => [...new Set(table.cells.map((cell) => cell.compression_ratio))].filter((ratio) => ratio > 0).sort((a, b) => a - b);

/** Brings the choices in line with the table that is shown: a task or ratio that it has not is let go. */
function settle() {
  const tables = tablesOfRun();
  const table = tables.find((one) => one.query_aware === state.aware) ?? tables[0];
  state.table = table;
  if (!table.tasks.includes(state.task)) state.task = table.tasks.length > 1 ? null : table.tasks[0];
  if (!ratiosOf(table).includes(state.ratio)) state.ratio = null;
  state.shown = new Set(table.presses.filter((press) => !state.hidden.has(press)));
  state.allCells = table.cells.filter((cell) => state.shown.has(cell.press) && (state.ratio === null || cell.compression_ratio === state.ratio || cell.press === table.full));
  state.cells = state.allCells.filter((cell) => cell.task === (table.tasks.length > 1 ? state.task : null));
}

function drawTiles() {
  const { table } = state;
  const full = table.cells.find((cell) => cell.press === table.full && cell.task === (table.tasks.length > 1 ? state.task : null));
  const least = Math.min(...table.cells.map((cell) => cell.kept_fraction ?? Infinity));
  const tiles = [
    [table.n_questions.toLocaleString("en"), `${table.n_questions === 1 ? "question" : "questions"} on ${count(table.n_contexts, "context")}`],
    [String(table.tasks.length), table.tasks.length === 1 ? "task" : "tasks"],
    ...(full ? [[asScore(full.accuracy), `accuracy of the ${table.full}`]] : []),
    ...(full && full.resident_bytes !== null ? [[asMegabytes(full.resident_bytes), `${table.full}, mean`]] : []),
    ...(least < 1 ? [[`1/${(1 / least).toFixed(least < 0.1 ? 0 : 1)}`, "the least that is kept"]] : []),
  ];
  byId("tiles").replaceChildren(...tiles.map(([figure, words]) => el("li", {}, el("b", {}, figure), words)));
}

function drawWords() {
  const { table } = state;
  byId("about").textContent = `${table.model} · run ${table.run_id} · compressed ${table.query_aware ? "with the question in view (query-aware)" : "before any question is known (query-agnostic)"}${table.follows ? " · accuracy is agreement with the full cache: next tokens that are the same" : ""}`;
  byId("ties").hidden = !table.ties.length;
  byId("ties").textContent = table.ties.join("\n");
  byId("times").hidden = !table.times?.differ;
  byId("no-times").hidden = !byId("times").hidden;
  byId("no-times").textContent = aboutTimes(table.times);
  byId("marks").textContent = `± standard error, clustered by context. ${aboutMarks(state.cells)}`;
  byId("detectable").hidden = !table.detectable;
  if (table.detectable) byId("detectable").textContent = aboutDetectable(table);
  const provenance = Object.entries({ run: table.run_id, ...table.provenance }).map(([name, value]) => el("div", {}, el("dt", {}, name), " ", el("dd", {}, value)));
  byId("footer").replaceChildren(el("dl", {}, ...provenance),
    ...(DATA.command ? [el("p", {}, "Made by ", el("code", {}, DATA.command))] : []),
    el("p", {}, `Accuracy is the mean over tasks of the mean over contexts of the mean over questions. Page by kvzip-press ${DATA.version}.`));
}

function aboutDetectable({ detectable: [low, high], n_contexts: n, full }) {
  const range = asScore(low) === asScore(high) ? asScore(low) : `${asScore(low)} to ${asScore(high)}`;
  return `The smallest difference from the ${full} that ${count(n, "context")} like these show in four of five repetitions is ${range} (5 %, before the adjustment for all cells); a cell's own is in its tip.`;
}

/** Why there is no chart of times. */
function aboutTimes(times) {
  if (!times) return "There is no chart of times: it takes two caches that were timed on two contexts.";
  const [apart, spread] = [times.apart, times.spread].map(fixed(2));
  return `There is no chart of times, since they do not differ beyond their spread: on the same context the slowest cache takes ${apart} times as long a token as the fastest, and the contexts of one cache differ by a factor of ${spread} (nine of ten of them).`;
}

function aboutMarks(cells) {
  if (cells.some((cell) => cell.marks)) return DATA.marks;
  const compared = cells.some((cell) => cell.against_full ?? cell.against_kvzip);
  return compared ? "No cell differs significantly from the full cache or from KVzip." : "";
}

function draw() {
  settle();
  hideTip();
  drawFilters();
  drawWords();
  drawTiles();
  drawTable(state, draw);
  drawCurvesOnly();
  drawAreas(state);
  drawCorrelations(state);
  const { table } = state;
  const inView = (map) => state.shown.has(map.press) && (state.ratio === null || map.compression_ratio === state.ratio || map.press === table.full);
  const tasks = taskMaps(state);
  const heads = named(table.heads.filter(inView));
  const needles = needleMaps(table, table.needles.filter((map) => inView(map) && (state.task === null || map.task === state.task)));
  drawChosen("tasks", "task-ratio", tasks, drawTaskMap, tasks.length >> 1);
  drawChosen("heads", "head-cell", heads, drawHeads, telling(table, heads));
  drawChosen("needles", "needle-cell", needles, drawNeedles, telling(table, needles));
  drawExamples(state);
}

function drawCurvesOnly() {
  drawCurves("by-bytes", state, BY_BYTES);
  if (state.table.times?.differ) drawCurves("by-time", state, BY_TIME);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[theme];
  byId("theme").setAttribute("aria-label", `colours: ${THEMES[theme]}`);
}

function storeTheme(theme) {
  try { localStorage.setItem("kvzip-press-theme", theme); } catch { /* a page that is a file may have no storage */ }
}

function storedTheme() {
  try { return localStorage.getItem("kvzip-press-theme"); } catch { return null; }
}

function start() {
  setTheme(storedTheme() in THEMES ? storedTheme() : "auto");
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const chosen = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    setTheme(chosen);
    storeTheme(chosen); // only what a reader chose: a page that is merely read must not overwrite it
  });
  byId("empty").hidden = DATA.tables.length > 0;
  byId("main").hidden = !DATA.tables.length;
  if (!DATA.tables.length) return;
  state.run = runOf(DATA.tables[0]);
  state.aware = DATA.tables[0].query_aware;
  for (const name of ["task", "ratio"]) byId(name).addEventListener("change", (event) => { state[name] = JSON.parse(event.target.value); draw(); });
  byId("model").addEventListener("change", (event) => { state.run = JSON.parse(event.target.value); draw(); });
  byId("aware").addEventListener("click", () => { state.aware = !state.table.query_aware; draw(); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  new ResizeObserver(drawCurvesOnly).observe(byId("by-bytes"));
  draw();
}

start();
