// The page: sorting the table, the trade-off and the training curves.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const color = (i) => `var(--series-${i % 6})`;
const number = (v) => v.toLocaleString("en", { maximumSignificantDigits: 5 });

function option(select, value, text) {
  const node = document.createElement("option");
  node.value = value;
  node.textContent = text;
  select.append(node);
}

// ---- the table

const table = document.querySelector("table.results");

function sortBy(index, header) {
  const body = table.tBodies[0];
  const down = header.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.cells[index].dataset.value;
  const numeric = header.classList.contains("num");
  const rows = [...body.rows].sort((a, b) => {
    const left = key(a), right = key(b);
    // What has no value stands last, whichever way the rest is sorted.
    if (left === undefined || right === undefined) {
      return (left === undefined) - (right === undefined);
    }
    const order = numeric ? left - right : left.localeCompare(right);
    return down ? -order : order;
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

[...table.tHead.rows[0].cells].forEach((header, i) => {
  header.querySelector("button").addEventListener("click", () => sortBy(i, header));
});

function compareWith(against) {
  for (const note of table.querySelectorAll("small, span.delta, span.tone")) {
    if (note.matches("small")) note.textContent = note.dataset[against];
    if (note.matches(".delta")) note.textContent = note.dataset[against] || "–";
    note.classList.remove("worse", "better");
    const tone = note.dataset[`${against}Tone`];
    if (tone) note.classList.add(tone);
  }
  for (const cell of table.querySelectorAll("td[data-parent-value]")) {
    const value = cell.dataset[`${against}Value`];
    if (value === "") delete cell.dataset.value; else cell.dataset.value = value;
  }
  for (const button of document.querySelectorAll("button[data-against]")) {
    button.setAttribute("aria-pressed", button.dataset.against === against);
  }
}

for (const button of document.querySelectorAll("button[data-against]")) {
  button.addEventListener("click", () => compareWith(button.dataset.against));
}

// ---- the trade-off

const several = data.runs.length > 1;

function drawScatter() {
  const xAxis = data.costs.find((a) => a.key === byId("x-axis").value);
  const yAxis = data.qualities.find((a) => a.key === byId("y-axis").value);
  const points = data.rows
    .map((row) => ({ row, x: row.values[xAxis.key], y: row.values[yAxis.key] }))
    .filter(({ x, y }) => x !== null && y !== null);
  const lines = yAxis.key === "bpb" && byId("lines").checked ? data.references : [];
  byId("lines").disabled = yAxis.key !== "bpb";
  const better = yAxis.higher ? "higher" : "lower";
  // A broken model stands at the edge, rather than squeeze all others together.
  const bound = yAxis.offScale === null
    ? Infinity : yAxis.offScale * Math.min(...points.map((p) => p.y));
  const { svg, box, x, y } = frame(byId("scatter"), points.map((p) => p.x),
    points.map((p) => p.y).filter((v) => v <= bound).concat(lines.map((l) => l.bits)),
    `${xAxis.label} (lower is better)`, `${yAxis.label} (${better} is better)`, 500,
    lines.length ? 130 : 0);
  for (const p of points) {
    p.off = p.y > bound;
    p.at = { x: x(p.x), y: p.off ? box.top : y(p.y) };
  }
  const obstacles = drawReferences(svg, box, y, lines);
  const front = paretoFront(points, yAxis.higher ? -1 : 1);
  make("polyline", { class: "front",
    points: front.map(({ at }) => `${at.x},${at.y}`).join(" ") }, svg);
  front.slice(1).forEach((p, i) => obstacles.push(...along(front[i].at, p.at)));
  const labels = points.map((point) => {
    const { row, at, off } = point;
    const best = front.includes(point);
    const shade = several ? color(row.run) : best ? "var(--accent)" : "var(--worse)";
    const look = { class: "point", tabindex: 0, stroke: shade,
      fill: row.simulated.length ? "var(--panel)" : shade,
      opacity: several && !best ? 0.6 : 1 };
    const mark = off
      ? make("path", { ...look, d: `M${at.x - 7} ${at.y + 6}h14l-7 -13z` }, svg)
      : make("circle", { ...look, cx: at.x, cy: at.y, r: 6.5 }, svg);
    tipAt(mark, [row.name, row.technique, `${xAxis.label}: ${number(point.x)}`,
      `${yAxis.label}: ${number(point.y)}${off ? " (off the scale)" : ""}`,
      ...row.notes,
      best ? "on the front" : "another row is at least as good on both"]);
    const text = off ? `${row.name} (${number(point.y)}, off the scale)` : row.name;
    return { ...at, node: make("text", { class: "name" }, svg, text) };
  });
  placeLabels(labels, obstacles, box);
}

// Dashed lines with their names in the margin; returns what labels must not cover.
function drawReferences(svg, box, y, lines) {
  const heights = spread(lines.map((l) => y(l.bits)), 15);
  return lines.map(({ name, bits }, i) => {
    const at = y(bits);
    make("path", { class: "reference", d: `M${box.left} ${at}H${box.right}` }, svg);
    make("path", { class: "lead-line",
      d: `M${box.right} ${at}L${box.right + 9} ${heights[i]}` }, svg);
    make("text", { x: box.right + 13, y: heights[i] + 4, class: "reference-name" }, svg,
      `${name} ${bits.toFixed(3)}`);
    return [box.left, at - 1, box.right, at + 1];
  });
}

function key(shape, text) {
  const span = document.createElement("span");
  span.className = "key";
  const svg = make("svg", { viewBox: "0 0 12 12" }, span);
  make("circle", { cx: 6, cy: 6, r: 4.5, "stroke-width": 2, ...shape }, svg);
  span.append(text);
  return span;
}

function drawLegend() {
  const solid = (shade) => ({ fill: shade, stroke: shade });
  const keys = several
    ? data.runs.map((run, i) => key(solid(color(i)), run))
    : [key(solid("var(--accent)"), "on the front: no other row is better on both axes"),
       key(solid("var(--worse)"), "not on it: another row is at least as good on both")];
  keys.push(key({ fill: "none", stroke: "var(--soft)" },
    "hollow: simulated, part of what is promised is not saved here"));
  byId("legend").replaceChildren(...keys);
}

// ---- training curves

function drawCurve() {
  const metric = byId("metric").value;
  const shown = data.curves.filter((c) => c.metric === metric);
  const all = shown.flatMap((c) => c.points);
  const host = byId("curve");
  const { svg, box, x, y } = frame(host, all.map((p) => p[0]), all.map((p) => p[1]),
    "step", metric.replaceAll("_", " "), 320);
  const series = [...new Set(data.curves.map((c) => c.name))];
  const ends = shown.map((curve) => {
    const shade = color(series.indexOf(curve.name));
    make("polyline", { class: "line", stroke: shade,
      points: curve.points.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }, svg);
    if (curve.points.length < 40) {
      for (const [a, b] of curve.points) {
        make("circle", { cx: x(a), cy: y(b), r: 2.5, fill: shade }, svg);
      }
    }
    const last = curve.points.at(-1);
    return { x: x(last[0]), y: y(last[1]), node: make("text", { class: "name" }, svg, curve.name) };
  });
  const obstacles = shown.flatMap(({ points }) => points.slice(1).flatMap(
    ([a, b], i) => along({ x: x(points[i][0]), y: y(points[i][1]) },
      { x: x(a), y: y(b) })));
  placeLabels(ends, obstacles, box);
  const dot = make("circle", { r: 5, fill: "var(--accent)", visibility: "hidden" }, svg);
  svg.addEventListener("mousemove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse());
    let near = null;
    for (const curve of shown) {
      for (const [a, b] of curve.points) {
        const far = Math.hypot(x(a) - at.x, (y(b) - at.y) / 3);
        if (near === null || far < near.far) near = { far, curve, a, b };
      }
    }
    dot.setAttribute("cx", x(near.a));
    dot.setAttribute("cy", y(near.b));
    dot.setAttribute("visibility", "visible");
    showTip([near.curve.name, `step ${near.a.toLocaleString("en")}`,
      `${metric.replaceAll("_", " ")}: ${number(near.b)}`], event.pageX, event.pageY);
  });
  svg.addEventListener("mouseleave", () => {
    hideTip();
    dot.setAttribute("visibility", "hidden");
  });
}

// ---- start

function start() {
  const used = (axis) => data.rows.some((row) => row.values[axis.key] !== null);
  for (const axis of data.costs.filter(used)) option(byId("x-axis"), axis.key, axis.label);
  for (const axis of data.qualities.filter(used)) {
    option(byId("y-axis"), axis.key, axis.label);
  }
  const metrics = [...new Set(data.curves.map((c) => c.metric))];
  for (const metric of metrics) option(byId("metric"), metric, metric.replaceAll("_", " "));
  const redraw = () => {
    if (byId("y-axis").value) drawScatter(); else byId("pareto").hidden = true;
    if (metrics.length) drawCurve(); else byId("training").hidden = true;
  };
  for (const id of ["x-axis", "y-axis", "lines"]) {
    byId(id).addEventListener("change", drawScatter);
  }
  byId("metric").addEventListener("change", drawCurve);
  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  drawLegend();
  redraw();
}

start();
