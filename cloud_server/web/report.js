// The report of a past round, which `#round-3` in the page's address opens.

import { byId, element, note, table } from "./dom.js";
import { figuresOf } from "./figures.js";
import { candidates, rollOut } from "./round.js";
import { FLAGS, LEFT_OUT, NONE, duration, roundName, size } from "./words.js";

const PARTS = {
  collect: "collecting", audit: "audit", aggregate: "averaging", fine_tune: "fine-tuning", evaluate: "evaluating", publish: "publishing",
};

async function open() {
  const [, digits] = /^#round-(\d+)$/.exec(location.hash) ?? [];
  const section = byId("report");
  section.hidden = digits === undefined;
  if (digits === undefined) return;
  const number = Number(digits);
  const children = await contents(number).catch(() => [heading(number), element("p", { class: "bad" }, "The server does not answer.")]);
  section.replaceChildren(...children);
  section.focus({ preventScroll: true });
  section.scrollIntoView({ block: "start" });
}

addEventListener("hashchange", open);
open();

const heading = (number) => element("h2", { id: "report-title" }, `Report of ${roundName(number).toLowerCase()}`);

async function contents(number) {
  const path = `api/rounds/${number}/report.json`;
  const reply = await fetch(path);
  if (!reply.ok) return [heading(number), element("p", { class: "warn" }, await reply.text())];
  const report = { agents: [], rejected: [], seconds: {}, ...(await reply.json()) };
  const figures = figuresOf(report);
  return [
    element("div", { class: "bar" }, heading(number), element("a", { href: "#" }, "Close")),
    element("p", {}, sentence(report, figures)),
    ...rollOut(report.roll_out),
    element("p", { class: "downloads" },
      element("a", { href: path, download: "" }, "Download the report"), ...(await model(number, report))),
    ...candidates(report, figures), ...agents(report, figures), ...classes(report, figures), ...notIn(report), ...seconds(report),
  ];
}

function sentence(report, figures) {
  if (report.outcome !== "published") return report.failure || "The round failed.";
  const score = figures.of(report, "published");
  const measured = score == null ? "was not measured" : `has ${figures.phrase(score)}`;
  return `${report.model} on ${report.dataset}: ${report.agents.length} contributions, and the global model ${measured}.`;
}

/** Return the link to the model, or why there is none. */
async function model(number, report) {
  if (!report.weights) return [];
  const path = `api/rounds/${number}/model.safetensors`;
  const { status } = await fetch(path, { method: "HEAD" });
  if (status === 410) return [note("The model was removed; the server keeps those of its last rounds.")];
  if (status !== 200) return [note("The model is not there.")];
  return [
    element("a", { href: path, download: "" }, `Download the model (${size(report.weights.bytes)})`),
    ...(report.rest ? [rest(number, report)] : []),
    note(`SHA-256 ${report.weights.sha256}`),
  ];
}

/** Return the link to the parts of the model that do not travel. */
const rest = (number, report) => element(
  "a", { href: `api/rounds/${number}/rest.safetensors`, download: "" }, `Download the rest of it (${size(report.rest.bytes)})`);

function agents(report, figures) {
  if (!report.agents.length) return [];
  const audits = new Map((report.audit ?? []).map((audit) => [audit.agent_id, audit]));
  const columns = [["Agent", ""], ["Examples", "number"], ["Shared", "number"], ["Local", "number"], ["Before", "number"], ["After", "number"], ["Adapted", "number"]];
  return [element("h3", {}, "Contributions"), table(columns, report.agents.map((agent) => [
    [agent.agent_id, ...remarks(agent, audits.get(agent.agent_id))],
    String(agent.num_examples), String(agent.num_shared ?? NONE),
    ...["local", "before", "after", "adapted"].map((stage) => figures.text(figures.of(agent, stage))),
  ]))];
}

function remarks(agent, audit) {
  const remarks = [];
  if (audit?.flags.length) remarks.push(note(audit.flags.map((flag) => FLAGS[flag] ?? flag).join(", "), "bad"));
  if (agent.left_out) remarks.push(note(LEFT_OUT[agent.left_out.reason] ?? agent.left_out.message, "bad"));
  if (agent.applied === false) remarks.push(note(agent.reason ? `kept its own model: ${agent.reason}` : "kept its own model"));
  return remarks;
}

function classes(report, figures) {
  if (!report.classes?.length) return [];
  const columns = [["Class", ""], ["Held out", "number"], ["Start", "number"], ["Published", "number"]];
  return [element("h3", {}, `${figures.title} by class`), table(columns, report.classes.map((item) => [
    item.name ?? String(item.label), String(item.num_examples), figures.text(figures.of(item, "start")), figures.text(figures.of(item, "published")),
  ]))];
}

/** Return who is not in the model. */
function notIn(report) {
  const lists = [["late", "Late"], ["not_ready", "Not ready"], ["vanished", "Not heard of"], ["drawn", "Drawn"], ["canary", "Canary"]];
  const rejected = report.rejected.map((each) => element("p", {}, `Rejected: ${each.agent_id}`, note(each.message)));
  const named = lists.filter(([name]) => report[name]?.length)
    .map(([name, title]) => element("p", {}, `${title}: ${report[name].join(", ")}`));
  return [...rejected, ...named, ...(report.audit_note ? [element("p", { class: "warn" }, report.audit_note)] : [])];
}

function seconds(report) {
  const parts = Object.entries(report.seconds);
  if (!parts.length) return [];
  return [element("h3", {}, "Time"), table([["Part", ""], ["Time", "number"]],
    parts.map(([name, value]) => [PARTS[name] ?? name, duration(value)]))];
}
