// Draws the charts and sorts the tables. Text goes in by textContent only.
const specs = JSON.parse(document.getElementById("charts").textContent);
const ink = "var(--ink)", edge = "var(--edge)", font = "system-ui, sans-serif";
const config = {
  background: null, font, view: {stroke: null},
  axis: {labelColor: ink, titleColor: ink, domainColor: edge, tickColor: edge, gridColor: edge, gridOpacity: 0.6,
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal"},
  legend: {labelColor: ink, titleColor: ink, orient: "bottom", labelFontSize: 12, titleFontSize: 12,
    titleFontWeight: "normal", columns: 2, labelLimit: 320, gradientLength: 160},
  text: {fontSize: 12, font},
};
const options = {actions: false, renderer: "svg", ast: true, defaultStyle: false, tooltip: {disableDefaultStyle: true}, config};

async function draw(place) {
  await vegaEmbed(place, specs[place.dataset.chart], options);
  const guides = "[aria-roledescription='axis'], [aria-roledescription='legend']";
  const marks = place.querySelectorAll(`[role='graphics-symbol'][aria-label]:not(${guides})`);
  for (const mark of marks) {
    if (marks.length <= 100 || mark.getAttribute("aria-label").endsWith("; front")) mark.setAttribute("tabindex", "0");
  }
}

// What is in view comes first; the others are drawn in pauses, so that paper and search find them too.
const waiting = [...document.querySelectorAll("[data-chart]")];
async function drawAll() {
  for (const place of waiting) {
    await draw(place);
    await new Promise((resume) => setTimeout(resume));
  }
  document.documentElement.dataset.drawn = String(waiting.length);
}
drawAll();

function order(row, column) {
  const cell = row.cells[column];
  return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent;
}

function compare(one, other) {
  if (one === "" || other === "") return Number(one === "") - Number(other === "");
  return typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en");
}

for (const button of document.querySelectorAll(".sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1, column = heading.cellIndex;
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [order(row, column), row]);
    rows.sort((one, other) => (one[0] === "" || other[0] === "" ? 1 : sign) * compare(one[0], other[0]));
    body.append(...rows.map((pair) => pair[1]));
  });
}
