// Plots of figures over rounds or steps, drawn by uPlot (uplot/LICENSE). Hovering shows the values.

import { byId, element } from "./dom.js";
import { NONE } from "./words.js";

const HEIGHT = 200;
const WHOLE_NUMBERS = [1, 2, 5].flatMap((digit) => [1, 10, 100, 1e3, 1e4, 1e5].map((power) => digit * power)).sort((a, b) => a - b);

const drawn = new Map();

/**
 * Draw a plot into the figure with this id, or hide the figure where there is no value.
 *
 * A plot has a title, the name and the values of its x axis (`along`, `x`), a function that words its y values
 * (`format`), and its series: each with label, values (null: none), colour (a CSS variable), and perhaps `dash`,
 * `bar` (a bar instead of a line) or `spread` (the label of a series up to which the area is filled).
 */
export function drawPlot(id, plot) {
  const figure = byId(id);
  const hasValues = plot.series.some(({ values }) => values.some((value) => value != null));
  figure.hidden = !hasValues;
  const key = JSON.stringify(plot);
  if (!hasValues || drawn.get(id)?.key === key) return;
  const was = drawn.get(id);
  if (was && was.shape === shapeOf(plot)) {
    was.plot.series = plot.series;
    was.chart.setData(dataOf(plot));
    showLast(was.chart);
    drawn.set(id, { ...was, key });
    return;
  }
  build(id, figure, plot, key);
}

const shapeOf = (plot) => JSON.stringify([plot.title, plot.along, plot.series.map(({ label }) => label)]);

function build(id, figure, plot, key) {
  drawn.get(id)?.chart.destroy();
  figure.replaceChildren(element("figcaption", {}, plot.title));
  const held = { ...plot };
  const chart = new uPlot(optionsOf(held, figure.clientWidth), dataOf(plot), figure);
  showLast(chart);
  for (const canvas of figure.querySelectorAll("canvas")) {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${plot.title}; the table below has the figures`);
  }
  drawn.set(id, { key, shape: shapeOf(plot), chart, plot: held });
}

/** Show the last values in the legend, as long as the pointer is on none. */
const showLast = (chart) => chart.cursor.idx == null && chart.setLegend({ idx: chart.data[0].length - 1 }, false);

const isBar = (plot) => plot.series.some(({ bar }) => bar);

/** Return x and y values as uPlot takes them. Bars stand on each other, so theirs are sums, the highest first. */
function dataOf(plot) {
  if (!isBar(plot)) return [plot.x, ...plot.series.map(({ values }) => values)];
  const sums = plot.series.map((_, place) =>
    plot.x.map((_, at) => plot.series.slice(place).reduce((sum, { values }) => sum + (values[at] ?? 0), 0)));
  return [plot.x, ...sums];
}

function optionsOf(plot, width) {
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const labels = plot.series.map(({ label }) => label);
  const margin = isBar(plot) ? 0.6 : 0;
  return {
    width,
    height: HEIGHT,
    scales: {
      x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low - margin, high + margin]) },
      y: isBar(plot) || plot.fromZero ? { range: (_, low, high) => [0, (high || 1) * 1.05] } : {},
    },
    axes: [{ ...axis, incrs: WHOLE_NUMBERS, size: 30 }, { ...axis, size: 66, values: (_, splits) => splits.map(plot.format) }],
    hooks: { setLegend: [showLast] },
    series: [{ label: plot.along, value: (_, value) => (value == null ? NONE : String(value)) }, ...plot.series.map((_, place) => seriesOf(plot, place))],
    bands: plot.series.flatMap(({ spread, colour: name }, place) =>
      (spread ? [{ series: [place + 1, labels.indexOf(spread) + 1], fill: `${colour(name)}22` }] : [])),
  };
}

function seriesOf(plot, place) {
  const { label, colour: name, dash, bar, isEdge } = plot.series[place];
  const ink = colour(name);
  return {
    label,
    stroke: isEdge ? `${ink}66` : ink,
    width: isEdge ? 1 : 2,
    dash,
    spanGaps: false,
    points: isEdge || bar ? { show: false } : { size: 5 },
    value: (_, sum, __, at) => (at == null ? NONE : wordsOf(plot.series[place].values[at], plot.format)),
    ...(bar ? { fill: ink, paths: uPlot.paths.bars({ size: [0.7, 48] }) } : {}),
  };
}

const wordsOf = (value, format) => (value == null ? NONE : format(value));

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function rebuild() {
  for (const [id, { key, plot }] of drawn) {
    if (!byId(id).hidden) build(id, byId(id), plot, key);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);

let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  rebuild();
});
