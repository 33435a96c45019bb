// The history of the run: plots over the rounds, the loss of the fine-tune as it runs, and a table.

import { byId, draw, element, pager, table } from "./dom.js";
import { drawPlot } from "./plots.js";
import { NONE, duration, phaseName, roundName, size } from "./words.js";

const TABLE_ROUNDS = 20;
// So long passes at least between two requests for the same figures.
const REFETCH_MS = 2000;
const WORK = ["collecting", "aggregating", "fine_tuning", "evaluating"];

const asked = new Map();
let page = 0;
let range = null;
let figures = null;

/** Fetch and draw what has changed with this status; `read` reads the figures of its task. */
export function showHistory(status, read) {
  figures = read;
  const ended = status.rounds.at(-1);
  const number = lossesOf(status);
  byId("history-card").hidden = !ended && status.progress?.loss == null;
  const numReports = status.agents.filter((agent) => figures.of(agent, "after") != null).length;
  if (ended) refresh("rounds", [status.run_id, ended.round, numReports], fetchRounds);
  if (number != null) refresh("losses", [status.run_id, number, status.phase, status.progress?.done], () => fetchLosses(number));
}

/** Fetch something again if what it depends on has changed; after an error the next status asks again. */
function refresh(name, dependsOn, fetchAgain) {
  const key = JSON.stringify(dependsOn);
  const was = asked.get(name) ?? { key: "", at: -Infinity };
  if (key === was.key || performance.now() - was.at < REFETCH_MS) return;
  asked.set(name, { key: was.key, at: performance.now() });
  fetchAgain().then(() => { asked.get(name).key = key; }).catch(() => {});
}

/** Return the round whose fine-tune is shown: the one under way, or the last one that was published. */
function lossesOf(status) {
  if (status.phase === "fine_tuning" || status.phase === "evaluating") return status.round;
  return status.rounds.findLast((round) => round.outcome === "published")?.round;
}

async function ask(path) {
  const reply = await fetch(path);
  if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
  return reply.json();
}

async function fetchRounds() {
  const history = await ask("api/history");
  const isNew = range?.last !== history.last;
  range = history;
  drawRounds(history);
  // The page of the table that somebody reads stays as it is.
  if (isNew && page === 0) await fetchPage(0);
}

async function fetchLosses(number) {
  const { points } = await ask(`api/rounds/${number}/loss`);
  drawPlot("plot-loss", {
    title: `Loss of the fine-tune, ${roundName(number).toLowerCase()}`, along: "step", format: (loss) => String(Number(loss.toPrecision(3))),
    x: points.map(([step]) => step),
    series: [{ label: "loss", colour: "--plot-5", values: points.map(([, loss]) => loss) }],
  });
}

function drawRounds({ rounds, every }) {
  const column = (of) => rounds.map((round) => of(round) ?? null);
  const x = column((round) => round.round);
  const over = { along: "round", x };
  drawPlot("plot-score", { ...over, title: `${figures.title} over the rounds`, format: figures.text, series: [
    { label: "edges, lowest", colour: "--plot-1", isEdge: true, values: column((round) => round.local?.low) },
    { label: "edges, highest", colour: "--plot-1", isEdge: true, spread: "edges, lowest", values: column((round) => round.local?.high) },
    { label: "edges, mean", colour: "--plot-1", values: column((round) => round.local?.mean) },
    { label: "average", colour: "--plot-2", dash: [6, 4], values: column((round) => round.average) },
    { label: "start", colour: "--plot-3", dash: [2, 3], values: column((round) => round.start) },
    { label: "fine-tuned", colour: "--plot-4", dash: [8, 3], values: column((round) => round.fine_tuned) },
    ...(rounds.some((round) => round.fine_tuned_average != null) ? [
      { label: "average of the fine-tune", colour: "--plot-6", dash: [2, 6], values: column((round) => round.fine_tuned_average) },
    ] : []),
    { label: "published", colour: "--plot-5", values: column((round) => round.published) },
    { label: "edges after, mean", colour: "--plot-6", values: column((round) => round.after?.mean) },
  ] });
  drawPlot("plot-seconds", { ...over, title: "Time by phase", format: duration, series: WORK.map((phase, place) => (
    { label: phaseName(phase).toLowerCase(), colour: `--plot-${place + 1}`, bar: true, values: column((round) => round.seconds[phase]) })) });
  drawPlot("plot-bytes", { ...over, title: "Bytes moved", format: size, fromZero: true, series: [
    { label: "from agents", colour: "--plot-2", values: column((round) => round.received_bytes) },
    { label: "to agents", colour: "--plot-5", values: column((round) => round.sent_bytes) },
  ] });
  draw("history-note", every, () => (every > 1 ? [`The plots show every ${every}th round; the table has all.`] : []));
}

async function fetchPage(to) {
  const last = range.last - to * TABLE_ROUNDS;
  const { rounds } = await ask(`api/history?first=${last - TABLE_ROUNDS + 1}&last=${last}`);
  page = to;
  drawTable(rounds);
}

function drawTable(rounds) {
  const numPages = Math.ceil((range.last - range.first + 1) / TABLE_ROUNDS);
  const turn = (to) => fetchPage(to).catch(() => {});
  byId("history-details").hidden = false;
  draw("history", [rounds, page, numPages], () => [
    table(COLUMNS, rounds.toReversed().map(row)), ...pager("history", page, numPages, turn),
  ]);
}

const COLUMNS = [["Round", ""], ...[
  "Edges, mean", "lowest", "highest", "Average", "Start", "Fine-tuned", "Published", "Edges after", "Time", "From agents", "To agents",
].map((name) => [name, "number"])];

function row(round) {
  const seconds = Object.values(round.seconds);
  const { local, average, start, fine_tuned: fineTuned, published, after } = round;
  const scores = [local?.mean, local?.low, local?.high, average, start, fineTuned, published, after?.mean];
  return [
    element("a", { href: `#round-${round.round}` }, roundName(round.round)),
    ...scores.map(figures.text),
    seconds.length ? duration(seconds.reduce((sum, each) => sum + each, 0)) : NONE,
    size(round.received_bytes), size(round.sent_bytes),
  ];
}
