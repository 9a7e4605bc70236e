// Sorts a table by the heading that is pressed and shows the rows that all controls allow.
// A column whose cells start with numbers is compared by them, another as text; empty cells come last both ways.
for (const section of document.querySelectorAll("section.sortable")) {
  const controls = section.querySelector("form.controls");
  const count = controls.querySelector("output");
  const choices = [...controls.querySelectorAll("select")];
  const headings = [...section.querySelectorAll("thead th")];
  const body = section.querySelector("tbody");
  const original = [...body.rows];

  const texts = (column) => original.map((row) => row.cells[column].textContent.trim());
  const isEmpty = (text) => ["", "–", "-", "nan", "None"].includes(text);
  const number = (text) => parseFloat(text.replace(/^[<≥≤>~]\s*/, "").replace(/−/g, "-").replace(/(\d),(?=\d{3})/g, "$1"));

  const sort = (column, direction) => {
    const sign = direction === "ascending" ? 1 : -1;
    const known = texts(column).filter((text) => !isEmpty(text));
    const numeric = known.every((text) => !Number.isNaN(number(text)));
    const compare = numeric ? (a, b) => number(a) - number(b) : (a, b) => a.localeCompare(b, "en", { numeric: true });
    const keyed = texts(column).map((text, k) => [text, original[k]]);
    const sorted = keyed.filter(([text]) => !isEmpty(text)).sort(([a], [b]) => sign * compare(a, b));
    body.append(...[...sorted, ...keyed.filter(([text]) => isEmpty(text))].map(([, row]) => row));
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
    body.append(...original);
    headings.forEach((heading) => heading.setAttribute("aria-sort", "none"));
    for (const choice of choices) choice.value = ""; // the browser does so only after this event
    filter();
  });
  controls.hidden = false;
  filter(); // a browser may bring back what was chosen before the page was loaded again
}
