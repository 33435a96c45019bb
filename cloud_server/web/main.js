// Shows the status as its events come in (api/events), through restarts of the server.

import { showAgents } from "./agents.js";
import { byId, draw, element } from "./dom.js";
import { figuresOf } from "./figures.js";
import { showHistory } from "./history.js";
import "./report.js";
import { headline, phases, progress, quorum, result, rounds } from "./round.js";
import { phaseName, roundName } from "./words.js";

// A stream that the browser has given up is opened again after this time.
const RECONNECT_MS = 2000;
// There is an event in every second. After this time without one the connection is as good as lost.
const SILENCE_MS = 10000;

let status = {};
let agents = new Map();
let silence;

/** Return the whole status after an event; cloud_server/showing/feed.py says what is in one. */
function after(event) {
  if (event.whole) [status, agents] = [{}, new Map()];
  for (const agent of event.agents) agents.set(agent.agent_id, agent);
  for (const agentId of event.gone) agents.delete(agentId);
  if (event.whole || event.agents.length || event.gone.length) status.agents = [...agents.values()];
  return Object.assign(status, event.status);
}

function show(status, now) {
  if (status.phase === "starting") {
    return draw("headline", "starting", () => [element("h1", {}, "The server is starting")]);
  }
  const name = status.run_name ?? `run ${status.run_id}`;
  document.title = `${roundName(status.round)}, ${phaseName(status.phase).toLowerCase()} · ${name} · ECAvg`;
  draw("run", [name, status.run_id], () => [element("span", { title: `run ${status.run_id}` }, name)]);
  draw("headline", [status.round, status.phase, status.run_over, status.rounds.at(-1)], () => headline(status));
  draw("waiting", status.waiting, () => (status.waiting ? [status.waiting] : []));
  const closes = quorum(status, now);
  draw("quorum", closes, () => (closes ? [closes] : []));
  draw("phases", [status.phase, status.phases], () => phases(status));
  draw("progress", [status.phase, status.progress, status.trainer], () => progress(status));
  const figures = figuresOf(status);
  draw("result", [figures.metric, status.rounds, status.pinned_round], () => result(status.rounds, figures, status.pinned_round));
  showAgents(status.agents, now, figures);
  draw("rounds", [figures.metric, status.rounds], () => rounds(status.rounds, figures));
  showHistory(status, figures);
}

function showLink(look, text) {
  draw("link", text, () => [text]);
  byId("link").className = look;
}

function connect() {
  const stream = new EventSource("api/events");
  stream.addEventListener("message", ({ data }) => {
    const event = JSON.parse(data);
    watchSilence(stream);
    // The browser keeps how long the last update took; tests/browser reads that.
    performance.clearMeasures("update");
    const start = performance.now();
    show(after(event), event.now);
    performance.measure("update", { start });
    showLink("good", "live");
  });
  stream.addEventListener("error", () => {
    clearTimeout(silence);
    showLost();
    // The browser connects again by itself, unless it was answered something else than a stream.
    if (stream.readyState === EventSource.CLOSED) setTimeout(connect, RECONNECT_MS);
  });
}

function watchSilence(stream) {
  clearTimeout(silence);
  silence = setTimeout(() => {
    stream.close();
    showLost();
    connect();
  }, SILENCE_MS);
}

function showLost() {
  if (status.run_over) return showLink("soft", "the server has stopped");
  showLink("bad", "connection lost, trying again");
}

connect();
