/* Sort a table by the column whose head is clicked: numbers by value, texts by letters, empty cells always last. */
function compareCells(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  if (Number.isFinite(x) && Number.isFinite(y)) return direction * (x - y);
  return direction * a.localeCompare(b, "en", { numeric: true });
}
function sortTable(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const rows = Array.from(body.rows);
  rows.sort((a, b) => compareCells(a.cells[column].dataset.value, b.cells[column].dataset.value, direction));
  body.append(...rows);
}
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => sortTable(button.closest("th")));
}
