// Sorts a table by the heading that is pressed and shows the rows that all controls allow.
// Cells with data-number are compared as numbers, the others as text; empty ones come last in both directions.
(() => {
  "use strict";
  const section = document.currentScript.closest("section");
  const controls = section.querySelector("form.controls");
  const count = controls.querySelector("output");
  const choices = [...controls.querySelectorAll("select")];
  const headings = [...section.querySelectorAll("thead th")];
  const body = section.querySelector("tbody");
  const original = [...body.rows];

  const key = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.number;
    if (number === undefined) return cell.textContent === "–" ? null : cell.textContent;
    return number === "" ? null : Number(number);
  };

  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));

  const show = (rows) => body.append(...rows);

  const sort = (column, direction) => {
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = original.map((row) => [key(row, column), row]);
    const known = keyed.filter(([value]) => value !== null).sort(([a], [b]) => sign * compare(a, b));
    show([...known, ...keyed.filter(([value]) => value === null)].map(([, row]) => row));
    headings.forEach((heading, k) => heading.setAttribute("aria-sort", k === column ? direction : "none"));
  };

  const filter = () => {
    for (const row of original) {
      row.hidden = choices.some(
        (choice) => choice.value !== "" && row.cells[choice.dataset.column].textContent !== choice.value,
      );
    }
    count.value = `${original.filter((row) => !row.hidden).length} of ${original.length} rows`;
  };

  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      sort(column, heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    });
  });

  controls.addEventListener("change", filter);
  controls.addEventListener("reset", () => {
    show(original);
    headings.forEach((heading) => heading.setAttribute("aria-sort", "none"));
    for (const choice of choices) choice.value = ""; // the browser does so only after this event
    filter();
  });
  controls.hidden = false;
  filter(); // a browser may bring back what was chosen before the page was loaded again
})();
