// A plot of lines over the last minutes, as SVG made of elements; its colours are the style sheet's.

import { element, setText } from "./dom.js";
import { NONE, figure, whole } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 170;
const EDGE = { left: 44, right: 10, top: 8, bottom: 22 };
const GAP_S = 20; // points further apart are not joined
const MOST_LINES = 9;
const SPANS_S = [120, 300, 600]; // the shortest that holds all is shown

export class Plot {
  /** `unit` is said behind figures. */
  constructor(place, label, unit) {
    this.unit = unit;
    this.label = label;
    this.lines = [];
    this.at = 0;
    this.span = SPANS_S[0];
    this.svg = shape("svg", { height: HEIGHT, role: "img" });
    this.readout = element("p", { class: "readout" });
    this.legend = element("ul", { class: "legend" });
    place.append(this.svg, this.readout, this.legend);
    this.pointer = null;
    this.svg.addEventListener("pointermove", (event) => {
      this.pointer = event.offsetX;
      this.draw();
    });
    this.svg.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /** Show lines `{name, points, colour}` that end at `at` (Unix seconds). */
  show(lines, at) {
    this.lines = lines.slice(0, MOST_LINES);
    this.at = at;
    const first = Math.min(at, ...this.lines.map((line) => line.points[0]?.[0] ?? at));
    this.span = SPANS_S.find((span) => span >= at - first) ?? SPANS_S.at(-1);
    this.draw();
  }

  draw() {
    const width = this.svg.parentElement.clientWidth;
    if (width === 0) return; // not to be seen now
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    const most = Math.max(...this.lines.flatMap((line) => line.points.map(([, value]) => value)), 0);
    const ticks = steps(most);
    const top = ticks.at(-1);
    const x = (at) => EDGE.left + (1 - (this.at - at) / this.span) * (width - EDGE.left - EDGE.right);
    const y = (value) => HEIGHT - EDGE.bottom - (value / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    const parts = [...this.axes(width, ticks, x, y)];
    for (const line of this.lines) {
      for (const run of runs(line.points)) {
        const d = run.map(([at, value], i) => `${i === 0 ? "M" : "L"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
        parts.push(
          run.length > 1
            ? shape("path", { d, class: `line ${line.colour}` })
            : shape("circle", { cx: x(run[0][0]), cy: y(run[0][1]), r: 1.5, class: `dot ${line.colour}` }),
        );
      }
    }
    const looked = this.looked(x);
    if (looked !== null) parts.push(shape("line", { x1: x(looked), x2: x(looked), y1: EDGE.top, y2: HEIGHT - EDGE.bottom, class: "cross" }));
    this.svg.replaceChildren(...parts);
    this.tell(looked);
  }

  *axes(width, ticks, x, y) {
    for (const tick of ticks) {
      yield shape("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick), class: "grid" });
      yield text(EDGE.left - 6, y(tick) + 4, whole(tick), "end");
    }
    const every = this.span / (this.span === 120 ? 2 : 5) / 60; // minutes
    for (let ago = 0; ago * 60 <= this.span; ago += every) {
      const words = ago === 0 ? "now" : `−${ago} min`;
      const anchor = ago === 0 ? "end" : ago * 60 === this.span ? "start" : "middle";
      if (width >= 420 || anchor !== "middle") yield text(x(this.at - ago * 60), HEIGHT - 6, words, anchor);
    }
  }

  /** Return the moment under the pointer that has figures. */
  looked(x) {
    if (this.pointer === null) return null;
    let best = null;
    for (const line of this.lines) {
      for (const [at] of line.points) {
        if (best === null || Math.abs(x(at) - this.pointer) < Math.abs(x(best) - this.pointer)) best = at;
      }
    }
    return best;
  }

  tell(looked) {
    const at = looked ?? this.at;
    const said = this.lines.map((line) => {
      const point = line.points.findLast(([when]) => when <= at + 0.001 && when > at - GAP_S);
      return [line.name, point === undefined ? NONE : `${figure(point[1])} ${this.unit}`, line.colour];
    });
    setText(this.readout, this.lines.length === 0 ? "no figures yet" : looked === null ? "" : `${Math.round(this.at - looked)} s ago`);
    this.legend.replaceChildren(
      ...said.map(([name, value, colour]) =>
        element("li", { class: colour }, element("span", { class: "series", text: name }), element("b", { text: value })),
      ),
    );
    this.svg.setAttribute("aria-label", `${this.label}: ${said.map(([name, value]) => `${name} ${value}`).join(", ") || "no figures yet"}`);
  }
}

function shape(tag, attributes) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function text(x, y, words, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = words;
  return made;
}

/** Return round ticks from 0 to at least `most`. */
function steps(most) {
  if (most <= 0) return [0, 1];
  const rough = most / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let i = 0; (i - 1) * step < most; i += 1) ticks.push(Number((i * step).toPrecision(6)));
  return ticks;
}

/** Split points where too much time is between two. */
function runs(points) {
  const found = [];
  points.forEach((point, index) => {
    if (index === 0 || point[0] - points[index - 1][0] > GAP_S) found.push([]);
    found.at(-1).push(point);
  });
  return found;
}
