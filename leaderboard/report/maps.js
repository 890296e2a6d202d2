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
  const high = value > 0.86 ? "top" : value > 0.64 ? "high" : null;
  return el("td", { class: high, style: `--v:${value}`, ...tipped(text) }, fine ? "" : asScore(value));
}

/** One map a ratio: presses by tasks, the full cache above for comparison. Its rows are made when it is drawn. */
function taskMaps({ table, allCells }) {
  const found = new Map(allCells.map((cell) => [keyOf(cell.press, cell.compression_ratio, cell.task), cell]));
  const columns = table.tasks.length > 1 ? [...table.tasks, null] : table.tasks;
  const ratioOf = (press, ratio) => (press === table.full ? 0 : ratio);
  const measured = new Set(allCells.map((cell) => cell.press));
  const rowsAt = (ratio) => table.presses.filter((press) => measured.has(press)).map((press) => ({
    label: press,
    values: columns.map((task) => {
      const cell = found.get(keyOf(press, ratioOf(press, ratio), task));
      return { value: cell?.accuracy ?? null, tip: `${task ?? "all tasks"}\n${cell ? describe(cell) : `${press}: not measured`}` };
    }),
  }));
  return [...new Set(allCells.map((cell) => cell.compression_ratio))].filter((ratio) => ratio > 0).sort((a, b) => a - b)
    .map((ratio) => ({ name: `${asRatio(ratio)} removed`, columns: columns.map((task) => task ?? "mean"), rows: () => rowsAt(ratio) }));
}

const keyOf = (...parts) => JSON.stringify(parts);
const drawTaskMap = (map) => byId("task-map").replaceChildren(heatMap("", map.columns, map.rows()));

function drawAreas({ table, shown }) {
  byId("areas").hidden = table.areas === null;
  if (table.areas === null) return;
  const found = Object.entries(table.areas.areas).filter(([press]) => shown.has(press)).sort((one, other) => (other[1] ?? -1) - (one[1] ?? -1));
  byId("area-bars").replaceChildren(el("div", { class: "bars" }, ...found.flatMap(([press, area]) => [
    el("span", {}, marker(table, press), press),
    el("span", { class: "meter", "aria-hidden": "true" }, el("i", { style: `width:${100 * (area ?? 0)}%;background:${lookOf(table, press).colour}` })),
    el("b", {}, fixed(3)(area)),
  ])));
  const { low, high } = table.areas;
  byId("area-note").textContent = `Area under accuracy over the measured kept fraction, from ${asScore(low)} to ${asScore(high)}, divided by that range; all tasks.`;
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

/** Maps with the names under which they are chosen. */
const named = (maps) => maps.map((map) => ({ ...map, name: [map.task, `${map.press}, ${asRatio(map.compression_ratio)} removed`].filter(Boolean).join(": ") }));

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

function drawNeedles(map) {
  const rows = map.scores.map((line, tenth) => ({
    label: `${10 * tenth}–${10 * tenth + 10} %`,
    values: line.map((value, place) => ({
      value,
      tip: `depth ${10 * tenth} to ${10 * tenth + 10} %, about ${map.lengths[place].toLocaleString("en")} tokens\n` +
        (value === null ? "nothing was asked here" : `score ${fixed(3)(value)} of ${count(map.counts[tenth][place], "question")}`),
    })),
  }));
  byId("needle-map").replaceChildren(heatMap("depth", map.lengths.map((length) => length.toLocaleString("en")), rows));
}
