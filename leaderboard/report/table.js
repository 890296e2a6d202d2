// The sortable table of results.
const COLUMNS = [
  { name: "press", value: (cell) => cell.press, order: "text" },
  { name: "removed", value: (cell) => cell.compression_ratio, text: asRatio, tip: "fraction of key/value pairs asked to be removed" },
  { name: "accuracy", value: (cell) => cell.accuracy, tip: "mean, and its standard error between contexts" },
  { name: "of full", value: (cell) => cell.relative, text: fixed(2), tip: "mean over tasks of the score over the full cache's" },
  { name: "kept", value: (cell) => cell.kept_fraction, text: asScore, tip: "fraction of the pairs that stay, measured" },
  { name: "cache", value: (cell) => cell.resident_bytes, text: asMegabytes, tip: "bytes of keys and values of the compressed cache" },
  { name: "prefill s", value: (cell) => cell.prefill_seconds, text: fixed(2), tip: "the one forward that all presses share" },
  { name: "compress s", value: (cell) => cell.compress_seconds, text: fixed(2), tip: "scoring and evicting" },
  { name: "pays from", value: (cell) => cell.pays_from, text: (n) => count(n, "question"), tip: "questions about a context from which on compressing it took less time than keeping it whole; a dash: never, or not measured" },
  { name: "ms a token", value: (cell) => cell.ms_per_token, text: fixed(1), tip: "of an answer, reading the question included" },
];

/** What is known of a cell, in words. */
function describe(cell) {
  const lines = [`${cell.press}, ${asRatio(cell.compression_ratio)} removed`];
  const error = cell.standard_error === null ? "" : ` ± ${asScore(cell.standard_error)}`;
  lines.push(`accuracy ${fixed(3)(cell.accuracy)}${error}`);
  lines.push(`${count(cell.n_questions, "question")} on ${count(cell.n_contexts, "context")}`);
  if (cell.kept_fraction !== null) lines.push(`kept ${fixed(3)(cell.kept_fraction)}, ${asMegabytes(cell.resident_bytes)}`);
  if (cell.ms_per_token !== null) lines.push(`${fixed(1)(cell.ms_per_token)} ms a token`);
  for (const [name, found] of [["full cache", cell.against_full], ["KVzip", cell.against_kvzip]]) {
    if (!found) continue;
    const interval = found.interval ? ` [${found.interval.map(signed).join(", ")}]` : "";
    lines.push(`${signed(found.difference)}${interval} to ${name}, ${asP(found.p_value)}`);
    if (found.detectable) lines.push(`   could show ${fixed(2)(found.detectable)} or more`);
  }
  return lines.join("\n");
}

function signed(value) {
  const size = Math.abs(value).toFixed(2);
  return `${value < 0 && Number(size) ? "−" : "+"}${size}`; // what is rounded to 0 has no minus
}

function sorted(cells, sort) {
  if (!sort) return cells;
  const { value, order } = COLUMNS[sort.column];
  const sign = sort.descending ? -1 : 1;
  return [...cells].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null); // what was not measured is last either way
    return sign * (order === "text" ? a.localeCompare(b) : a - b);
  });
}

function drawTable(state, redraw) {
  const { table, cells, sort } = state;
  const head = COLUMNS.map((column, place) => {
    const pressed = sort?.column === place;
    const button = el("button", { type: "button", title: column.tip }, column.name);
    button.addEventListener("click", () => {
      const first = column.order !== "text"; // figures from the largest, names from A
      state.sort = { column: place, descending: pressed ? !sort.descending : first };
      redraw();
      byId("results").querySelectorAll("thead button")[place].focus();
    });
    return el("th", { scope: "col", "aria-sort": pressed ? (sort.descending ? "descending" : "ascending") : null }, button);
  });
  const rows = sorted(cells, sort).map((cell) => el("tr", {}, ...COLUMNS.map((column) => figure(table, cell, column))));
  byId("results").replaceChildren(el("thead", {}, el("tr", {}, ...head)), rove(el("tbody", {}, ...rows)));
}

function figure(table, cell, column) {
  if (column.name === "press") {
    return el("td", {}, el("span", { class: "press" }, marker(table, cell.press), nameOf(cell.press)));
  }
  if (column.name === "accuracy") {
    const bar = el("i", { style: `width:${100 * cell.accuracy}%;background:${lookOf(table, cell.press).colour}` });
    const error = cell.standard_error === null ? "" : ` ± ${asScore(cell.standard_error)}`;
    return el("td", tipped(describe(cell)), el("span", { class: "meter", "aria-hidden": "true" }, bar), asScore(cell.accuracy),
      el("span", { class: "error" }, error), el("span", { class: "marks" }, cell.marks));
  }
  const value = column.value(cell);
  return el("td", { class: value === null ? "missing" : null }, value === null ? MISSING : column.text(value));
}
