// Heat maps and bars: tables whose cells are coloured by a number in [0, 1].

/** A heat map. `rows` are { label, values: [{ value, tip }] }; a fine one writes no numbers and labels few columns. */
function heatMap(corner, columns, rows, { fine = false } = {}) {
  const labels = columns.map((column, place) => el("th", { scope: "col" }, fine && place % 5 ? "" : column.replaceAll("_", "_\u200b"))); // a long name may break
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, corner), ...labels));
  const body = rows.map(({ label, values }) => el("tr", {}, el("th", { scope: "row" }, ...[label].flat()), ...values.map((one) => heat(one, fine))));
  return rove(el("table", { class: fine ? "heat fine" : "heat" }, fine ? el("colgroup", {}, el("col")) : null, head, el("tbody", {}, ...body)), columns.length);
}

function heat({ value, tip: text }, fine) {
  if (value === null) return el("td", { class: "none", ...tipped(text) });
  const high = value > 0.76 ? "top" : value > 0.64 ? "high" : null;
  return el("td", { class: high, style: `--v:${value}`, ...tipped(text) }, fine ? "" : asScore(value));
}

/** One map a ratio, presses by tasks; of a single task one map, presses by ratios. The full cache stands above for comparison. */
function taskMaps({ table, allCells }) {
  const found = new Map(allCells.map((cell) => [keyOf(cell.press, cell.compression_ratio, cell.task), cell]));
  const measured = new Set(allCells.map((cell) => cell.press));
  const ratios = [...new Set(allCells.map((cell) => cell.compression_ratio))].filter((ratio) => ratio > 0).sort((a, b) => a - b);
  const value = (press, ratio, task) => {
    const cell = found.get(keyOf(press, press === table.full ? 0 : ratio, task));
    return { value: cell?.accuracy ?? null, tip: `${task ?? "all tasks"}\n${cell ? describe(cell) : `${press}: not measured`}` };
  };
  const map = (name, columns, valuesOf) => ({
    name, columns, // its rows are made when it is drawn
    rows: () => table.presses.filter((press) => measured.has(press)).map((press) => ({ label: press, values: valuesOf(press) })),
  });
  const tasks = [...table.tasks, null];
  const maps = table.tasks.length > 1
    ? ratios.map((ratio) => map(`${asRatio(ratio)} removed`, tasks.map((task) => task ?? "mean"), (press) => tasks.map((task) => value(press, ratio, task))))
    : [map("every ratio", ratios.map((ratio) => `${asRatio(ratio)} removed`), (press) => ratios.map((ratio) => value(press, ratio, null)))];
  return maps.filter(({ columns }) => columns.length > 1);
}

const keyOf = (...parts) => JSON.stringify(parts);

function drawTaskMap(map) {
  byId("tasks-title").textContent = map.name === "every ratio" ? "Every ratio" : "Every task";
  byId("task-map").replaceChildren(heatMap("", map.columns, map.rows()));
  const lines = state.table.not_counting;
  byId("not-counting").hidden = !lines.length;
  byId("not-counting").textContent = `Tasks that cannot tell presses apart (their cells stay in the means):\n${lines.join("\n")}`;
}

/** Two lists of areas: over bytes, where eviction and storages in fewer bits compete, and over kept fractions. */
function drawAreas({ table, shown }) {
  const inMegabytes = (bytes) => asMegabytes(bytes);
  drawAreasOf("areas-bytes", table.areas_over_bytes, "bytes", "resident bytes on a logarithmic axis", inMegabytes, table, shown);
  drawAreasOf("areas", table.areas, "kept fractions", "the measured kept fraction", asScore, table, shown);
}

function drawAreasOf(id, areas, name, axis, asPlace, table, shown) {
  byId(id).hidden = areas === null;
  if (areas === null) return;
  const found = Object.entries(areas.areas).filter(([press]) => shown.has(press)).sort((one, other) => (other[1] ?? -1) - (one[1] ?? -1));
  byId(`${id}-bars`).replaceChildren(el("div", { class: "bars" }, ...found.flatMap(([press, area]) => [
    el("span", {}, marker(table, press), nameOf(press)),
    el("span", { class: "meter", "aria-hidden": "true" }, el("i", { style: `width:${100 * (area ?? 0)}%;background:${lookOf(table, press).colour}` })),
    el("b", {}, fixed(3)(area), press in areas.ends && area !== null ? ` (to ${asPlace(areas.ends[press])})` : null),
  ])));
  const range = `from ${asPlace(areas.low)} to ${asPlace(areas.high)}`;
  const isShort = found.some(([press, area]) => press in areas.ends && area !== null);
  const ends = isShort ? " In brackets: where a press was measured last, if others were measured farther; from there on its area is that of a straight line to the full cache." : "";
  byId(`${id}-title`).textContent = `Mean accuracy over ${name} ${range}`;
  byId(`${id}-note`).textContent = `Area under accuracy over ${axis} ${range}, which all presses share, divided by that range; all tasks.${ends}`;
}

/** How the ranks of presses in the run that is shown correlate with those on other models. */
function drawCorrelations({ table }) {
  const mine = runOf(table);
  const found = DATA.correlations.filter((one) => one.query_aware === table.query_aware && one.runs.some(([model, run_id]) => runOf({ model, run_id, follows: one.follows }) === mine));
  byId("correlations").hidden = !found.length;
  if (!found.length) return;
  const ratios = [...new Set(found.flatMap((one) => one.by_ratio.map(([ratio]) => ratio)))].sort((a, b) => a - b);
  const head = ["other model", "mean", "95 %", ...ratios.map((ratio) => `${asRatio(ratio)} removed`)].map((name) => el("th", { scope: "col" }, name));
  const rows = found.map((one) => {
    const place = one.runs.findIndex(([model, run_id]) => runOf({ model, run_id, follows: one.follows }) !== mine);
    const at = new Map(one.by_ratio.map(([ratio, value, n]) => [ratio, [value, n]]));
    const figures = ratios.map((ratio) => el("td", {}, at.has(ratio) ? `${at.get(ratio)[0] === null ? MISSING : signed(at.get(ratio)[0])} (${at.get(ratio)[1]})` : MISSING));
    return el("tr", {}, el("th", { scope: "row" }, one.runs[place][0]), el("td", {}, el("b", {}, one.mean === null ? MISSING : signed(one.mean))),
      el("td", {}, one.interval ? `${signed(one.interval[0])} to ${signed(one.interval[1])}` : MISSING), ...figures);
  });
  byId("correlation-table").replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  const [here, there] = found[0].n_contexts;
  byId("correlation-note").textContent = `Spearman's rank correlation of the presses' accuracies, ratio by ratio (in brackets: how many presses both have), and its mean. 1: the same order, 0: none, −1: the reverse. The interval holds 95 % of such means when the contexts of both models are drawn anew (${found.length > 1 ? "of the first" : "of this"} pair: ${here} and ${there}); it is about these presses, others may rank otherwise.`;
}

/** A section with a choice of map: keeps the chosen one where it is still there; hidden where there is none. */
function drawChosen(section, select, maps, draw, first = 0) {
  byId(section).hidden = !maps.length;
  if (!maps.length) return;
  const before = byId(select).value;
  const names = maps.map(({ name }) => name);
  const chosen = names.includes(before) ? names.indexOf(before) : Math.min(Math.max(0, first), names.length - 1);
  byId(select).replaceChildren(...names.map((name, place) => el("option", { value: name, selected: place === chosen }, name)));
  byId(select).disabled = maps.length < 2;
  byId(select).onchange = () => draw(maps[byId(select).selectedIndex]);
  draw(maps[chosen]);
}

/** Maps of one press each, with the names under which they are chosen. */
const named = (maps) => maps.map((map) => ({ ...map, name: [map.task, `${map.press}, ${asRatio(map.compression_ratio)} removed`].filter(Boolean).join(": ") }));

/** A task's maps: depth by length, one a press; where all contexts have one length, presses by depth, one a ratio. */
function needleMaps(table, maps) {
  return [...Map.groupBy(maps, (map) => map.task)].flatMap(([task, ofTask]) => {
    if (ofTask[0].lengths.length > 1) return named(ofTask);
    const full = ofTask.filter((map) => map.press === table.full);
    const ofRatio = Map.groupBy(ofTask.filter((map) => map.compression_ratio > 0), (map) => map.compression_ratio);
    return [...ofRatio].sort(([a], [b]) => a - b).map(([ratio, alike]) => (
      { name: `${task}: ${asRatio(ratio)} removed`, press: table.kvzip, compression_ratio: ratio, lengths: ofTask[0].lengths, presses: [...full, ...alike] }));
  });
}

/** At ratio 0 there is nothing to see: KVzip's first map that removes much, else any that removes something. */
function telling(table, maps) {
  const much = maps.findIndex((map) => map.press === table.kvzip && map.compression_ratio >= 0.5);
  return much >= 0 ? much : maps.findIndex((map) => map.compression_ratio > 0);
}

function drawHeads(map) {
  const heads = Math.max(...map.kept.map((layer) => layer.length));
  const rows = Array.from({ length: heads }, (_, head) => ({
    label: `head ${head}`,
    values: map.layers.map((layer, place) => {
      const value = map.kept[place][head] ?? null;
      return { value, tip: `layer ${layer}, KV head ${head}\nkept ${fixed(3)(value)}\nmean of ${count(map.n_contexts, "context")}` };
    }),
  }));
  byId("head-map").replaceChildren(heatMap("layer", map.layers.map(String), rows, { fine: true }));
}

const TENTHS = Array.from({ length: 10 }, (_, tenth) => `${10 * tenth}–${10 * tenth + 10}`);

function drawNeedles(map) {
  const asTokens = (length) => `${length.toLocaleString("en")} tokens`;
  const value = (of, tenth, place) => {
    const [score, n] = [of.scores[tenth][place], of.counts[tenth][place]];
    const found = score === null ? "nothing was asked here" : `score ${fixed(3)(score)} of ${count(n, "question")}`;
    return { value: score, tip: `depth ${10 * tenth} to ${10 * tenth + 10} %, about ${asTokens(map.lengths[place])}\n${of.press}: ${found}` };
  };
  const drawn = map.presses
    ? heatMap("depth, %", TENTHS, map.presses.map((of) => ({ label: of.press, values: TENTHS.map((_, tenth) => value(of, tenth, 0)) })))
    : heatMap("depth, %", map.lengths.map(asTokens), TENTHS.map((label, tenth) => ({ label, values: map.lengths.map((_, place) => value(map, tenth, place)) })));
  byId("needle-map").replaceChildren(drawn);
}
