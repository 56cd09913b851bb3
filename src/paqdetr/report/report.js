"use strict";
// Filters and enlarges pictures, sorts tables, moves sliders, switches the theme. Without it everything is still there to be read.
document.documentElement.classList.add("js");

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const text = head.classList.contains("text");
    const now = head.getAttribute("aria-sort");
    // Names start with A, numbers with the largest.
    const way = now ? (now === "ascending" ? "descending" : "ascending") : (text ? "ascending" : "descending");
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stays last
      return sign * (text ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
    });
    table.tBodies[0].append(...rows);
  }));
}

for (const gallery of document.querySelectorAll(".gallery")) {
  const filters = [...gallery.querySelectorAll("select")];
  const tiles = [...gallery.querySelectorAll(".tile")];
  const filter = () => {
    const wanted = JSON.stringify(filters.map((one) => one.value));
    const any = filters.every((one) => one.value === "");
    for (const tile of tiles) tile.hidden = !any && !JSON.parse(tile.dataset.tags).some((tag) => JSON.stringify(tag) === wanted);
    const shown = tiles.filter((tile) => !tile.hidden).length;
    gallery.querySelector("output").textContent = `${shown} of ${tiles.length} pictures`;
  };
  filters.forEach((one) => one.addEventListener("change", filter));
  gallery.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  tiles.forEach((tile) => tile.querySelector("button").addEventListener("click", () => { enlarge(tile); lightbox.showModal(); }));
  filter(); // what the browser has kept from before a reload
}

const lightbox = document.getElementById("lightbox");
let enlarged = null;
function enlarge(tile) {
  enlarged = tile;
  lightbox.querySelector("img")?.remove();
  lightbox.prepend(tile.querySelector("img").cloneNode());
  lightbox.querySelector("p").textContent = [...tile.querySelectorAll("p")].map((p) => p.dataset.path || p.textContent).join(" \u2013 ");
}
function step(by) {
  if (!by) { lightbox.close(); return; }
  const shown = [...enlarged.parentElement.children].filter((tile) => !tile.hidden);
  enlarge(shown[(shown.indexOf(enlarged) + by + shown.length) % shown.length]);
}
lightbox.addEventListener("click", (event) => {
  const button = event.target.closest("[data-step]");
  if (button) step(+button.dataset.step);
  else if (event.target === lightbox) lightbox.close(); // beside the picture
});
lightbox.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) { step(by); event.preventDefault(); }
});
lightbox.addEventListener("close", () => enlarged.querySelector("button").focus());

// What a link leads to, and what is printed, is unfolded.
const unfold = () => document.getElementById(location.hash.slice(1))?.closest("details")?.setAttribute("open", "");
addEventListener("hashchange", unfold);
unfold();
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

const sliders = [...document.querySelectorAll(".slides")];
function turn(figure, place) {
  const slides = [...figure.querySelectorAll(".slide")];
  const at = Math.min(place, slides.length - 1);
  slides.forEach((slide, i) => slide.classList.toggle("on", i === at));
  const label = slides[at].querySelector(".which").textContent;
  const input = figure.querySelector("input");
  input.value = at;
  input.setAttribute("aria-valuetext", label);
  figure.querySelector("output").textContent = label;
}
for (const figure of sliders) {
  figure.querySelector("input").addEventListener("input", (event) => {
    // The same view of the other model moves along.
    for (const one of sliders) if (one.dataset.name === figure.dataset.name) turn(one, +event.target.value);
  });
}

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const recall = () => { try { return localStorage.getItem("paqdetr-theme"); } catch { return null; } };
const chosen = recall();
if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
document.getElementById("theme").addEventListener("click", () => {
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem("paqdetr-theme", root.dataset.theme); } catch { /* a page without storage forgets */ }
});
