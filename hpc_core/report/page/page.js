"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const table = find("cases"), body = table.tBodies[0], rows = [...body.rows];
  const form = find("filters"), filter = find("filter"), verdict = find("verdict"), machine = find("machine");
  const texts = rows.map((row) => row.textContent.toLowerCase());

  // Theme: the system's, until the reader says otherwise.
  const theme = find("theme"), root = document.documentElement;
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  name();
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); document.dispatchEvent(new Event("theme")); });

  // Sorting: what has no value stays last, whichever way.
  const key = (row, column, isText) => {
    const value = row.cells[column].dataset.v;
    return value === undefined || isText ? value : Number(value);
  };
  const sort = (heads, column) => {
    const head = heads[column], isText = column === 0;
    const first = isText ? "ascending" : "descending", second = isText ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row, index) => [key(row, column, isText), index, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || i - j;
      return (a < b ? -sign : a > b ? sign : 0) || i - j;
    });
    body.append(...keyed.map((each) => each[2]));
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(heads, column));
    head.replaceChildren(button);
  });

  // Filtering.
  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = words.every((word) => word.length > 1 && word[0] === "-" ? !texts[index].includes(word.slice(1)) : texts[index].includes(word))
        && (!verdict.value || row.dataset.w === verdict.value) && (!machine || !machine.value || row.dataset.m === machine.value);
      row.hidden = !fits;
      shown += fits;
    });
    find("count").textContent = shown === rows.length ? "" : `${shown} of ${rows.length}`;
    find("none").hidden = shown > 0;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|SELECT/.test(event.target.tagName)) { event.preventDefault(); filter.focus(); }
    if (event.key === "Escape" && event.target === filter) { filter.value = ""; apply(); }
  });

  // A link to a case opens its details.
  const reveal = () => {
    const target = find(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); target.querySelector("summary").focus(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
