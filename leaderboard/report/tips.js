// Hover details: whatever has data-tip shows it under the pointer and on focus, and says it to a screen reader.
const tip = byId("tip");

/** Attributes that give an element a tip. Several such elements in one group are one tab stop, see `rove`. */
const tipped = (text) => ({ "data-tip": text, "aria-label": text.replaceAll("\n", ", "), tabindex: "-1" });

function showTip(target, x, y) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const room = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - room.width - 8))}px`;
  tip.style.top = `${y + 18 + room.height > innerHeight ? Math.max(8, y - room.height - 12) : y + 18}px`;
}

const hideTip = () => { tip.hidden = true; };
const tippedAt = (event) => event.target.closest?.("[data-tip]");

document.addEventListener("pointermove", (event) => {
  const target = tippedAt(event);
  if (target) showTip(target, event.clientX, event.clientY);
  else if (!tippedAt({ target: document.activeElement })) hideTip();
});
document.addEventListener("focusin", (event) => {
  const target = tippedAt(event);
  if (!target) return hideTip();
  const place = target.getBoundingClientRect();
  showTip(target, place.left + place.width / 2, place.bottom - 10);
});
document.addEventListener("focusout", hideTip);
for (const name of ["wheel", "touchmove"]) document.addEventListener(name, hideTip, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

/** Makes the tipped elements of a group one tab stop: arrow keys go from one to the next, `step` of them for up and down. */
function rove(group, step = 1) {
  const stops = [...group.querySelectorAll("[data-tip]")];
  if (stops.length) stops[0].setAttribute("tabindex", "0");
  group.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: step, ArrowUp: -step, Home: -Infinity, End: Infinity };
    const from = stops.indexOf(document.activeElement);
    if (!(event.key in moves) || from < 0) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(stops.length - 1, from + moves[event.key]));
    stops[from].setAttribute("tabindex", "-1");
    stops[to].setAttribute("tabindex", "0");
    stops[to].focus();
  });
  return group;
}
