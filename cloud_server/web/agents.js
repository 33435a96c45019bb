// The table of agents: those in trouble first, searchable, one page at a time.

import { byId, draw, element, note, pager, table } from "./dom.js";
import { FLAGS, LEFT_OUT, WAITS_FOR, clockTime, ordinal, size, sizeOf, timeLeft } from "./words.js";

const PAGE_ROWS = 25;
const COLUMNS = [["Agent", ""], ["State", ""], ["Local", "number"], ["Before", "number"], ["After", "number"], ["Gain", "number"]];
const OUTCOMES = {
  accepted: ["good", "✓ contributed"], rejected: ["bad", "✗ rejected"], late: ["warn", "late, joins the next round"],
};
const WAITING = { pending: "waits for the draw", not_drawn: "not drawn, waits for the model" };
const DOING = {
  reading: "reading its data", pre_training: "pre-training", uploading: "uploading", downloading: "downloading",
  evaluating: "evaluating", adapting: "adapting",
};

let page = 0;
let shown = { agents: [], now: 0, figures: null };

/** Show these agents; `now` is the server's clock, in seconds, and `figures` reads their figures. */
export function showAgents(agents, now, figures) {
  shown = { agents, now, figures };
  byId("agents-card").hidden = false;
  byId("agents-find").hidden = agents.length <= PAGE_ROWS;
  const wanted = byId("agents-search").value.trim().toLowerCase();
  const found = agents.filter((agent) => !wanted || agent.agent_id.toLowerCase().includes(wanted)).sort(byTrouble);
  const numPages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  page = Math.min(page, numPages - 1);
  const rows = found.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS);
  draw("agents", [rows, page, found.length, agents.length, wanted], () => agentRows(rows, found, numPages));
}

function agentRows(rows, found, numPages) {
  if (!shown.agents.length) {
    const command = `edge-agent --server ${location.hostname}:50051`;
    return [element("p", { class: "soft" }, "None has joined yet. Start one on a device: ", element("code", {}, command))];
  }
  if (!found.length) return [element("p", { class: "soft" }, "No agent has this in its name.")];
  const count = `${found.length} of ${shown.agents.length} agents, those in trouble first`;
  return [
    ...(shown.agents.length > PAGE_ROWS ? [note(count)] : []),
    table(COLUMNS, rows.map(agentRow)),
    ...pager("agents", page, numPages, turnTo),
  ];
}

function turnTo(to) {
  page = to;
  showAgents(shown.agents, shown.now, shown.figures);
}

byId("agents-search").addEventListener("input", () => turnTo(0));

function byTrouble(one, other) {
  return trouble(one) - trouble(other)
    || (other.progress?.seconds_left ?? 0) - (one.progress?.seconds_left ?? 0)
    || one.slot - other.slot;
}

/** Return a rank: the lower, the more an operator should look at the agent. */
function trouble(agent) {
  if (agent.outcome === "rejected" || agent.audit?.flags.length || agent.audit?.left_out) return 0;
  if (!agent.outcome && agent.state === "away") return 1;
  if (!agent.outcome) return agent.progress ? 2 : 3;
  if (agent.outcome === "late") return 4;
  return agent.state === "away" ? 5 : 6;
}

function agentRow(agent) {
  const { figures } = shown;
  const [local, before, after, adapted] = ["local", "before", "after", "adapted"].map((stage) => figures.of(agent, stage));
  return [
    [agent.agent_id, " ", element("span", { class: "soft" }, `#${agent.slot}`)],
    agentState(agent),
    figures.text(local),
    figures.text(before),
    adapted == null ? figures.text(after) : [figures.text(after), note(`adapted ${figures.text(adapted)}`)],
    figures.gain(before ?? local, adapted ?? after),
  ];
}

function agentState(agent) {
  const isAway = agent.state === "away";
  const doing = isAway ? null : agent.progress;
  const [look, text] = OUTCOMES[agent.outcome] ?? ["soft", WAITING[agent.selection] ?? (doing ? "" : "working")];
  const parts = text && (agent.outcome || !isAway) ? [element("span", { class: look }, text)] : [];
  if (isAway) parts.push(element("span", { class: "warn" }, (parts.length ? ", " : "") + awayText(agent)));
  if (doing) parts.push(...progressParts(doing, agent, parts.length > 0));
  if (!agent.is_ready) parts.push(note("not ready"));
  if (WAITS_FOR[agent.waits_for]) parts.push(note(WAITS_FOR[agent.waits_for]));
  if (agent.upload_place && !doing) parts.push(note(`waits to upload, place ${agent.upload_place}`));
  if (agent.is_canary) parts.push(note("in the canary: has the new model first"));
  if (agent.applied != null || agent.model_round != null) parts.push(note(modelInUse(agent)));
  parts.push(...auditParts(agent.audit));
  if (agent.message) parts.push(note(agent.message));
  return parts;
}

const awayText = (agent) => (agent.away_since == null ? "away" : `away since ${clockTime(agent.away_since, shown.now)}`);

function modelInUse(agent) {
  if (agent.applied === false) return "kept its own model";
  const uses = `uses the global model${agent.model_round == null ? "" : ` of round ${agent.model_round}`}`;
  return shown.figures.of(agent, "adapted") == null ? uses : `${uses}, adapted`;
}

/** Return a line about what an agent is doing, and a bar where its total is known. */
function progressParts(doing, agent, isSecondLine) {
  const text = progressText(doing, agent);
  const line = isSecondLine ? note(text) : element("span", {}, text);
  if (!doing.total || doing.phase === "queued") return [line];
  const value = Math.min(1, doing.done / doing.total);
  return [line, element("progress", { value, max: 1, "aria-label": `${agent.agent_id}: ${text}` })];
}

/** Return "pre-training 40 %, 3 min left", "uploading 3.1 of 9.1 MB at 1.2 MB/s", or "queued as 4th". */
export function progressText(doing, agent = {}) {
  if (doing.phase === "queued") return `queued as ${ordinal(agent.upload_place ?? doing.done)}`;
  const parts = [`${DOING[doing.phase] ?? doing.phase} ${amount(doing)}`.trim()];
  if (doing.seconds_left != null) parts.push(timeLeft(doing.seconds_left));
  if (doing.loss != null) parts.push(`loss ${doing.loss.toPrecision(3)}`);
  return parts.join(", ");
}

function amount(doing) {
  if (doing.unit === "bytes") {
    return sizeOf(doing.done, doing.total) + (doing.rate == null ? "" : ` at ${size(doing.rate)}/s`);
  }
  return doing.total ? `${Math.floor((100 * doing.done) / doing.total)} %` : `${doing.done} ${doing.unit}`;
}

function auditParts(audit) {
  if (!audit) return [];
  const parts = [];
  if (audit.flags.length) parts.push(note(audit.flags.map((flag) => FLAGS[flag] ?? flag).join(", "), "bad"));
  if (audit.is_clipped) parts.push(note(`update clipped, ${audit.norm_ratio?.toPrecision(3) ?? "many"} times the median`, "warn"));
  if (audit.left_out) parts.push(note(LEFT_OUT[audit.left_out] ?? "left out of the model", "bad"));
  return parts;
}
