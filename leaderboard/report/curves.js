// Pareto curves: accuracy against a cost, a line a press over its ratios.
const HEIGHT = 330;
const EDGE = { left: 42, right: 14, top: 10, bottom: 44 };

/** Round steps over a range: about `wanted` of them, of 1, 2 or 5 times a power of ten. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let place = first; place * step <= high + step * 1e-9; place += 1) found.push(Number((place * step).toPrecision(12)));
  return found;
}

/** A scale over the values with a little room at both ends: linear, or logarithmic for values that span factors. */
function scaleOf(values, from, to, logarithmic) {
  const [there, back] = logarithmic ? [Math.log10, (power) => 10 ** power] : [(value) => value, (value) => value];
  const [least, most] = [there(Math.min(...values)), there(Math.max(...values))];
  const room = (most - least || (logarithmic ? 1 : most || 1)) * 0.06;
  const [begin, end] = [least - room, most + room];
  return Object.assign((value) => from + ((there(value) - begin) / (end - begin)) * (to - from), { low: back(begin), high: back(end) });
}

/** 1, 2 and 5 times the powers of ten in a range; even steps where it holds fewer than two of them. */
function logTicks(low, high) {
  const powers = Array.from({ length: 40 }, (_, place) => 10 ** (place - 12));
  const found = powers.flatMap((power) => [1, 2, 5].map((times) => Number((times * power).toPrecision(3)))).filter((tick) => tick >= low && tick <= high);
  return found.length > 1 ? found : ticks(low, high, 4);
}

/** The points that no other point beats in both cost and accuracy, from the cheapest. */
function frontOf(points) {
  const found = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
    if (!found.length || point.y > found.at(-1).y) found.push(point);
  }
  return found;
}

function drawCurves(id, state, cost) {
  const box = byId(id);
  const known = state.cells.filter((cell) => cost.value(cell) > 0); // null, not measured, is none
  if (!known.length) return box.replaceChildren(el("p", { class: "absent" }, cost.absent));
  const width = Math.max(260, box.clientWidth);
  const x = scaleOf(known.map(cost.value), EDGE.left, width - EDGE.right, cost.logarithmic);
  const y = (accuracy) => HEIGHT - EDGE.bottom - accuracy * (HEIGHT - EDGE.top - EDGE.bottom);
  const points = known.map((cell) => ({ cell, x: x(cost.value(cell)), y: y(cell.accuracy) }));
  const front = frontOf(points.map((point) => ({ ...point, y: -point.y }))).map((point) => `${point.x},${-point.y}`);
  const ofPress = Map.groupBy(points, (point) => point.cell.press);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "group", "aria-label": `accuracy against ${cost.name}` },
    ...frame(width, x, y, cost), svg("polyline", { class: "front", points: front.join(" ") }),
    ...state.table.presses.flatMap((press) => curve(state.table, press, ofPress.get(press) ?? [], width, y)));
  box.replaceChildren(rove(picture));
}

function frame(width, x, y, cost) {
  const lines = ticks(0, 1, 5).flatMap((tick) => [
    svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: EDGE.left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(1)),
  ]);
  const places = cost.logarithmic ? logTicks(x.low, x.high) : ticks(x.low, x.high, Math.max(3, width / 95));
  const below = places.map((tick) =>
    svg("text", { x: x(tick), y: HEIGHT - EDGE.bottom + 18, "text-anchor": "middle" }, String(cost.tick(tick))));
  const title = svg("text", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, cost.title);
  return [...lines, ...below, title];
}

function curve(table, press, points, width, y) {
  if (!points.length) return [];
  const { colour, path, dashes } = lookOf(table, press);
  const inOrder = [...points].sort((a, b) => a.cell.compression_ratio - b.cell.compression_ratio);
  const level = inOrder[0].y;
  const line = press === table.full
    ? svg("line", { class: "full", x1: EDGE.left, x2: width - EDGE.right, y1: level, y2: level })
    : svg("polyline", { class: "curve", style: `stroke:${colour}`, "stroke-dasharray": dashes, points: inOrder.map((point) => `${point.x},${point.y}`).join(" ") });
  return [line, ...inOrder.map((point) => dot(point, colour, path, y))];
}

function dot({ cell, x, y: height }, colour, path, y) {
  const error = cell.standard_error ?? 0;
  const [top, bottom] = [y(Math.min(1, cell.accuracy + error)), y(Math.max(0, cell.accuracy - error))];
  return svg("g", { class: "point", role: "img", ...tipped(describe(cell)) },
    svg("line", { class: "whisker", style: `stroke:${colour}`, x1: x, x2: x, y1: top, y2: bottom }),
    svg("circle", { class: "halo", cx: x, cy: height, r: 14 }),
    svg("path", { d: path, style: `fill:${colour}`, stroke: "var(--card)", transform: `translate(${x} ${height}) scale(0.82)` }));
}

const BY_BYTES = {
  name: "bytes of the cache", title: "MB of keys and values that stay (logarithmic)", logarithmic: true,
  value: (cell) => cell.resident_bytes, tick: (bytes) => Number((bytes / 1e6).toPrecision(6)), absent: "These rows know no bytes.",
};
const BY_TIME = {
  name: "time a token", title: "ms a token of an answer", logarithmic: false,
  value: (cell) => cell.ms_per_token, tick: (ms) => Number(ms.toPrecision(6)), absent: "These rows know no times.",
};
