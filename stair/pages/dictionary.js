"use strict";
const { terms, images } = JSON.parse(document.getElementById("data").textContent);
const percent = (value) => (value === null ? "–" : (100 * value).toFixed(1));
const COLUMNS = [
  ["term", (t) => t.term], ["class", (t) => t.class], ["images", (t) => t.images], ["texts", (t) => t.texts],
  ["weight %", (t) => t.weight, (t) => (100 * t.weight).toFixed(2)],
  ["precision %", (t) => t.precision, (t) => `${percent(t.precision)} (${percent(t.low)}–${percent(t.high)})`],
  ["lift", (t) => t.lift, (t) => (t.lift === null ? "–" : t.lift.toFixed(1))],
  ["AP %", (t) => t.average_precision, (t) => percent(t.average_precision)],
  ["recall", (t) => t.recall_effect, (t) => t.recall_effect.toFixed(2)],
  ["position %", (t) => t.same_position, (t) => percent(t.same_position)],
];
if (terms.some((t) => t.boxed)) COLUMNS.push(["in box %", (t) => t.pointing, (t) => percent(t.pointing)]);
const STEP = 100;
const byId = (id) => document.getElementById(id);
const body = document.querySelector(".dictionary tbody");
let sorted = 4, falling = true, shown = STEP;

function make(name, parent, text = "") {
  const node = parent.appendChild(document.createElement(name));
  node.textContent = text;
  return node;
}

function compare(a, b) {
  const [x, y] = [COLUMNS[sorted][1](a), COLUMNS[sorted][1](b)];
  if (x === null || y === null) return (x === null) - (y === null);  // those without a value are last
  return (x < y ? -1 : x > y ? 1 : 0) * (falling ? -1 : 1);
}

function show() {
  const [part, kind] = [byId("word").value.trim().toLowerCase(), byId("class").value];
  const found = terms.filter((t) => t.term.includes(part) && (!kind || t.class === kind)).sort(compare);
  byId("count").textContent = `${found.length} terms`;
  byId("more").hidden = found.length <= shown;
  body.replaceChildren();
  for (const term of found.slice(0, shown)) {
    const row = make("tr", body);
    COLUMNS.forEach(([, value, text = value], i) => {
      const cell = make(i ? "td" : "th", row, text(term));
      if (!i) cell.scope = "row";
    });
    const cell = document.createElement("td");
    row.insertBefore(cell, row.children[1]);
    cell.className = "top";
    for (const n of term.top) {
      const image = make("img", cell);
      image.src = images[n];
      image.alt = `image with a large weight of ${term.term}`;
    }
    if (term.near.length) cell.title = `co-occurs with ${term.near.join(", ")}`;
  }
  document.querySelectorAll(".dictionary thead th").forEach((head, i) => {
    const column = i - (i > 1);  // the images have no order
    if (i !== 1) head.setAttribute("aria-sort", column !== sorted ? "none" : falling ? "descending" : "ascending");
  });
}

const heads = document.querySelector(".dictionary thead tr");
COLUMNS.forEach(([name, value], i) => {
  if (i === 1) make("th", heads, "heaviest images").scope = "col";
  const head = make("th", heads);
  head.scope = "col";
  make("button", head, name).addEventListener("click", () => {
    falling = i === sorted ? !falling : typeof value(terms[0] || {}) !== "string";
    sorted = i;
    shown = STEP;
    show();
  });
});
byId("filter").addEventListener("input", () => { shown = STEP; show(); });
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", () => { shown += STEP; show(); });
show();
