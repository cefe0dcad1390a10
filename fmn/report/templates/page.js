// Tables sort by a click on a column's head, the mean stays last; scores show absolute or relative.
const value = row => column => {
  const text = row.cells[column].innerText.replaceAll("−", "-").replaceAll(",", "");
  const number = text.match(/-?\d+(\.\d+)?(e[-+]?\d+)?/);
  return column && number ? Number(number[0]) : column ? -Infinity : text;
};
for (const table of document.querySelectorAll("table:not(.words)")) {
  const body = table.tBodies[0], start = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "sort";
    head.append(button);
    button.onclick = () => {
      const order = { descending: "ascending", ascending: null }[head.ariaSort] ??
        (head.ariaSort ? null : "descending");
      heads.forEach(each => each.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const less = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (order === "ascending" ? 1 : -1);
      const rows = order ? [...start].sort((a, b) => less(value(a)(column), value(b)(column))) : start;
      body.append(...rows.filter(row => row.className !== "mean"), ...rows.filter(row => row.className === "mean"));
    };
  });
}
for (const table of document.querySelectorAll("table.switched")) {
  const bar = document.createElement("div");
  bar.className = "switch";
  for (const [view, words] of [["", "both"], ["score", "score"], ["relative", "% of expert"]]) {
    const button = document.createElement("button");
    button.textContent = words;
    button.ariaPressed = String(!view);
    button.onclick = () => {
      table.classList.remove("score", "relative");
      if (view) table.classList.add(view);
      for (const each of bar.children) each.ariaPressed = String(each === button);
    };
    bar.append(button);
  }
  table.parentElement.before(bar);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => (each.open = true)));
