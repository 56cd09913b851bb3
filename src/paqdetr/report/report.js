"use strict";
// Sorts tables, moves sliders, switches the theme. Without it everything is still there to be read.
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
