"use strict";

// Light or dark: the system's choice until the reader makes another.
const page = document.documentElement;
const remembered = (value) => {
  try {
    if (value) localStorage.setItem("outlast-theme", value);
    return localStorage.getItem("outlast-theme");
  } catch {
    return null; // a page from a file, or without storage
  }
};
const show = (theme) => { page.style.colorScheme = theme; page.dataset.theme = theme; };
if (remembered()) show(remembered());
document.getElementById("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (page.dataset.theme || system) === "dark" ? "light" : "dark";
  remembered(theme);
  show(theme);
});

// Tables: a column's header sorts; what has no value comes last either way.
const value = (row, column) => {
  const cell = row.cells[column];
  if (cell.dataset.v === undefined) return cell.textContent.toLowerCase() || null;
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...body.rows].map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b));
    body.append(...keyed.map(([, row]) => row));
  }));
}

// The filter: every word must be in the row; "state:failed" looks at one column.
const filter = document.getElementById("filter");
if (filter) {
  const table = document.getElementById("cells");
  const names = [...table.tHead.rows[0].cells].map((header) => header.textContent.trim().toLowerCase());
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent.toLowerCase()));
  const count = document.getElementById("count");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      const all = texts[number].join(" ");
      const fits = words.every((word) => {
        const [name, ...rest] = word.split(":");
        const column = names.indexOf(name);
        return rest.length && column >= 0 ? texts[number][column].includes(rest.join(":")) : all.includes(word);
      });
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length}`;
  });
}
