// Building blocks: elements whose text is always text, numbers as they are read, markers of presses.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** An HTML element; children are elements or strings, and a string never becomes markup. */
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

/** What a missing number looks like. */
const MISSING = "–";
const fixed = (digits, scale = 1) => (value) => (value === null || value === undefined ? MISSING : (value * scale).toFixed(digits));
const asScore = fixed(2);
const asRatio = (ratio) => String(Number(ratio.toFixed(5)));
const asMegabytes = (bytes) => (bytes === null ? MISSING : bytes >= 1e10 ? `${(bytes / 1e9).toFixed(1)} GB` : `${significant(bytes / 1e6)} MB`);
const significant = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const asP = (p) => (p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`);
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

const MARKERS = {
  circle: "M0-6A6 6 0 1 1 0 6A6 6 0 1 1 0-6Z",
  square: "M-5.4-5.4H5.4V5.4H-5.4Z",
  diamond: "M0-7L7 0L0 7L-7 0Z",
  triangle: "M0-6.6L6.6 5.4H-6.6Z",
  "turned triangle": "M0 6.6L6.6-5.4H-6.6Z",
  plus: "M-6-2.2H-2.2V-6H2.2V-2.2H6V2.2H2.2V6H-2.2V2.2H-6Z",
  cross: "M-3.4-6.2L0-2.8L3.4-6.2L6.2-3.4L2.8 0L6.2 3.4L3.4 6.2L0 2.8L-3.4 6.2L-6.2 3.4L-2.8 0L-6.2-3.4Z",
  hexagon: "M0-7L6-3.5V3.5L0 7L-6 3.5V-3.5Z",
};

/** How a press is drawn, as the table says (`analysis/looks.py`): its colour on either ground, its marker and its dashes. */
function lookOf(table, press) {
  const { colours: [light, dark], marker, line } = table.looks[press];
  return { colour: `light-dark(${light}, ${dark})`, path: MARKERS[marker], dashes: line.map((part) => 2 * part).join(" ") || null };
}

/** A press's name, which is cut on a small screen before it is broken. */
const nameOf = (press) => el("span", { class: "name", title: press }, press);

function marker(table, press) {
  const look = lookOf(table, press);
  return svg("svg", { class: "marker", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, svg("path", { d: look.path, style: `fill:${look.colour}` }));
}
