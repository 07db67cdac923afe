"use strict";
// Drawing: scales, axes, labels that cover nothing, and the tooltip.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Round numbers that cover [low, high] in about `count` steps.
function ticks(low, high, count) {
  const rough = (high - low) / count || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(i * step || 0);
  }
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const show = (v) => (digits > 6 ? v.toExponential(1) : v.toLocaleString("en",
    { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  return found.map((v) => [v, show(v)]);
}

// An empty plot over the given values; returns its parts and both scales.
function frame(host, xs, ys, xLabel, yLabel, height, margin = 0) {
  host.replaceChildren();
  const width = Math.max(360, Math.min(host.clientWidth - 16, 1400));
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, host);
  svg.setAttribute("aria-label", `${yLabel} against ${xLabel}`);
  const box = { left: 66, right: width - 22 - margin, top: 16, bottom: height - 46 };
  const scale = (values, from, to, pad) => {
    let low = Math.min(...values), high = Math.max(...values);
    const room = (high - low) * pad || Math.abs(high) * 0.1 || 1;
    if (low >= 0 && low - room < 0) low = 0; else low -= room;
    high += room;
    const at = (v) => from + ((v - low) / (high - low)) * (to - from);
    return Object.assign(at, { low, high });
  };
  const x = scale(xs, box.left, box.right, 0.08);
  const y = scale(ys, box.bottom, box.top, 0.08);
  for (const [value, text] of ticks(x.low, x.high, width / 110)) {
    const at = x(value);
    make("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, class: "grid" }, svg);
    make("text", { x: at, y: box.bottom + 18, "text-anchor": "middle", class: "axis" },
      svg, text);
  }
  for (const [value, text] of ticks(y.low, y.high, 7)) {
    const at = y(value);
    make("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "grid" }, svg);
    make("text", { x: box.left - 8, y: at + 4, "text-anchor": "end", class: "axis" },
      svg, text);
  }
  const middle = (box.top + box.bottom) / 2;
  make("text", { x: (box.left + box.right) / 2, y: height - 8, "text-anchor": "middle" },
    svg, xLabel);
  make("text", { x: 16, y: middle, "text-anchor": "middle",
    transform: `rotate(-90 16 ${middle})` }, svg, yLabel);
  return { svg, box, x, y };
}

function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  return Math.max(width, 0) * Math.max(height, 0);
}

// Moves each <text> beside its point, where it covers nothing if there is room.
function placeLabels(labels, obstacles, box) {
  // Right, left, above, below, then the corners.
  const sides = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
  const taken = obstacles.concat(
    labels.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]));
  const bounds = [box.left, box.top, box.right, box.bottom];
  for (const { node, x, y } of labels) {
    const { width, height } = node.getBBox();
    let best = null;
    for (const distance of [1, 2.2, 3.6, 5]) {
      for (const [dx, dy] of sides) {
        const gap = 9 * distance;
        const left = x + dx * gap - (dx < 0 ? width : dx ? 0 : width / 2);
        const top = y + dy * gap - (dy < 0 ? height : dy ? 0 : height / 2);
        const area = [left, top, left + width, top + height];
        let cost = taken.reduce((sum, other) => sum + overlap(area, other), 0);
        cost += 4 * (width * height - overlap(area, bounds));
        if (best === null || cost < best.cost - 1e-6) best = { cost, area };
      }
    }
    taken.push(best.area);
    node.setAttribute("x", best.area[0]);
    node.setAttribute("y", best.area[3] - height * 0.24);
  }
}

// Small boxes that cover a straight line.
function along(from, to) {
  const num = Math.max(1,
    Math.floor(Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y)) / 6));
  return Array.from({ length: num + 1 }, (_, i) => {
    const x = from.x + ((to.x - from.x) * i) / num;
    const y = from.y + ((to.y - from.y) * i) / num;
    return [x - 3, y - 2, x + 3, y + 2];
  });
}

// Heights moved apart to at least `gap`, in the same order, as little as needed.
function spread(heights, gap) {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b]);
  const groups = [];
  for (const i of order) {
    groups.push({ middle: heights[i], members: [i] });
    while (groups.length > 1) {
      const [low, high] = groups.slice(-2);
      const n = low.members.length, m = high.members.length;
      if (high.middle - low.middle >= (gap * (n + m)) / 2) break;
      groups.splice(-2, 2, { middle: (low.middle * n + high.middle * m) / (n + m),
        members: low.members.concat(high.members) });
    }
  }
  const found = [];
  for (const { middle, members } of groups) {
    members.forEach((i, k) => {
      found[i] = middle + gap * (k - (members.length - 1) / 2);
    });
  }
  return found;
}

const tip = document.getElementById("tip");

// A tooltip of lines of text, the first one bold, near a page position.
function showTip(lines, pageX, pageY) {
  tip.replaceChildren(...lines.filter(Boolean).map((text, i) => {
    const node = document.createElement(i ? "span" : "b");
    node.textContent = text;
    return node;
  }));
  tip.hidden = false;
  const right = window.scrollX + document.documentElement.clientWidth;
  const left = pageX + 16 + tip.offsetWidth > right
    ? pageX - 16 - tip.offsetWidth : pageX + 16;
  tip.style.left = `${Math.max(left, 0)}px`;
  tip.style.top = `${Math.max(pageY - tip.offsetHeight / 2, 0)}px`;
}

function hideTip() {
  tip.hidden = true;
}

function tipAt(node, lines) {
  const show = () => {
    const area = node.getBoundingClientRect();
    showTip(lines, area.right + window.scrollX - 8,
      area.top + area.height / 2 + window.scrollY);
  };
  node.addEventListener("mouseenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("mouseleave", hideTip);
  node.addEventListener("blur", hideTip);
}

// Points no other one beats on both axes, by x.
function paretoFront(points, sign) {
  let best = Infinity;
  return [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))
    .filter(({ y }) => sign * y < best && ((best = sign * y), true));
}
