// The two drawings: answer probability over alpha, and the error of each layer.

const SPACE = "http://www.w3.org/2000/svg";

function shape(name, attributes = {}, text = null) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function canvas(place, width, height, label) {
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  place.replaceChildren(svg);
  return svg;
}

// `sweep`: { alphas: [...], forget: [...] | null, retain: [...] | null, goal: number | null }.
export function drawSweep(place, sweep, alpha) {
  const width = Math.max(300, Math.min(1000, place.clientWidth || 640));
  const height = width < 480 ? 230 : 260;
  const left = 36, right = width < 480 ? 58 : 84, top = 12, bottom = 34;
  const x = (a) => left + a * (width - left - right);
  const y = (p) => top + (1 - p) * (height - top - bottom);
  const words = ["forget", "retain"].filter((set) => sweep[set]).map((set) =>
    `${set} set ${sweep.alphas.map((a, i) => `${sweep[set][i].toFixed(2)} at alpha ${a}`).join(", ")}`);
  const svg = canvas(place, width, height, `Answer probability over alpha: ${words.join("; ")}`);
  for (const p of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(p), y2: y(p) }));
    svg.append(shape("text", { x: left - 8, y: y(p) + 4, "text-anchor": "end" }, p === 0 || p === 1 ? String(p) : p.toFixed(2).slice(1)));
  }
  for (const a of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(shape("text", { x: x(a), y: height - 12, "text-anchor": "middle" }, String(a)));
  }
  svg.append(shape("text", { x: width - right + 14, y: height - 12 }, "alpha"));
  if (sweep.goal !== null && sweep.goal !== undefined) {
    svg.append(shape("line", { class: "goal", x1: left, x2: width - right, y1: y(sweep.goal), y2: y(sweep.goal) }));
    svg.append(shape("text", { x: x(0.5), y: y(sweep.goal) - 6, "text-anchor": "middle" }, "a model that never saw the forget set"));
  }
  svg.append(shape("line", { class: "now", x1: x(alpha), x2: x(alpha), y1: top, y2: height - bottom }));
  const ends = [];
  for (const set of ["retain", "forget"]) {
    const values = sweep[set];
    if (!values) continue;
    const points = sweep.alphas.map((a, i) => `${x(a)},${y(values[i])}`).join(" ");
    // Between two points nothing was measured: the line only says which belong together.
    svg.append(shape("polyline", { class: sweep.alphas.length > 2 ? set : `${set} guess`, points }));
    sweep.alphas.forEach((a, i) => svg.append(shape("circle", { class: `dot-${set}`, cx: x(a), cy: y(values[i]), r: 4.5 })));
    ends.push({ set, y: y(values.at(-1)) });
  }
  if (ends.length === 2 && Math.abs(ends[0].y - ends[1].y) < 16) {
    const middle = (ends[0].y + ends[1].y) / 2;
    const upper = ends[0].y <= ends[1].y ? 0 : 1;
    ends[upper].y = middle - 8;
    ends[1 - upper].y = middle + 8;
  }
  for (const end of ends) {
    svg.append(shape("text", { class: `t-${end.set}`, x: x(sweep.alphas.at(-1)) + 12, y: end.y + 4 }, end.set));
  }
}

// Bars of ||base - W|| / ||W|| by layer: where the memory was taken from.
export function drawLayers(place, layers) {
  const width = Math.max(300, Math.min(1000, place.clientWidth || 640)), height = 130;
  const left = 36, top = 4, bottom = 24;
  const most = Math.max(...layers.map((layer) => layer.base_error)) || 1;
  const step = (width - left) / layers.length;
  const svg = canvas(place, width, height, `Error of the base by layer, at most ${most.toFixed(3)}`);
  svg.append(shape("text", { x: left - 8, y: top + 8, "text-anchor": "end" }, most.toFixed(2).replace(/^0/, "")));
  svg.append(shape("text", { x: left - 8, y: height - bottom, "text-anchor": "end" }, "0"));
  layers.forEach((layer, i) => {
    const tall = ((height - top - bottom) * layer.base_error) / most;
    const bar = shape("rect", { class: "bar", x: left + i * step + step * 0.12, y: height - bottom - tall, width: step * 0.76, height: Math.max(1, tall), rx: Math.min(3, step / 4) });
    bar.append(shape("title", {}, `${layer.name}: base error ${layer.base_error.toFixed(4)}, rank ${layer.rank ?? "-"}`));
    svg.append(bar);
    const every = Math.ceil(layers.length / (width / 44));
    if (i % every === 0) svg.append(shape("text", { x: left + (i + 0.5) * step, y: height - 6, "text-anchor": "middle" }, String(i)));
  });
}
