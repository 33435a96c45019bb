// The top of the page: the round that is under way, and the model of the round before.

import { element, note, table } from "./dom.js";
import { NONE, PHASES, ROLL_OUTS, candidateName, duration, phaseName, roundName, timeLeft } from "./words.js";

export function headline(status) {
  const [name, sentence] = PHASES[status.phase] ?? [status.phase, ""];
  const failure = status.rounds.find((round) => round.round === status.round)?.failure;
  const text = status.run_over ? "The run is over." : failure || sentence;
  return [
    element("h1", { class: status.phase === "failed" ? "bad" : "" }, `${roundName(status.round)}: ${name.toLowerCase()}`),
    element("p", {}, text),
  ];
}

/**
 * Return how many have contributed, and when the round will close if `status.waiting` does not say that already.
 * `now` is the server's clock, in seconds.
 */
export function quorum(status, now) {
  if (status.phase !== "collecting") return "";
  const { min_agents: least, max_agents: most, deadline_at: deadline } = status;
  const have = status.agents.filter((agent) => agent.outcome === "accepted").length;
  const count = `${have} of ${most} contributions.`;
  if (status.waiting) return count;
  if (deadline == null) return `${count} The round closes with ${most}.`;
  if (deadline > now) {
    return `${count} The round closes with ${most}, or in ${duration(Math.ceil(deadline - now))} with at least ${least}.`;
  }
  return `${count} The deadline has passed; the round closes with ${least}.`;
}

export function phases(status) {
  const seconds = new Map(status.phases.map((entry) => [entry.phase, entry.seconds]));
  const isShown = (phase) => seconds.has(phase) || (phase !== "failed" && status.phase !== "failed");
  return Object.keys(PHASES).filter(isShown).map((phase) => {
    const item = element("li", { class: phase === "failed" ? "failed" : seconds.has(phase) ? "past" : "" },
      element("span", {}, phaseName(phase)));
    if (phase === status.phase) item.setAttribute("aria-current", "step");
    const isEnd = phase === "published" || phase === "failed";
    if (seconds.has(phase) && !isEnd) item.append(element("span", {}, duration(seconds.get(phase))));
    return item;
  });
}

/** Return the bar of the cloud's own work, with the time left where the server knows it. */
export function progress(status) {
  const work = status.progress;
  if (!work || !work.total || status.phase === "published" || status.phase === "failed") return [];
  const share = work.done / work.total;
  const loss = work.loss == null ? "" : `loss ${work.loss.toPrecision(3)}`;
  const ends = [loss, timeLeft(status.trainer?.seconds_left)].filter(Boolean).join(", ");
  return [
    element("progress", { value: share, max: 1, "aria-label": phaseName(status.phase) }),
    element("p", { class: "soft" },
      element("span", {}, `${Math.floor(100 * share)} %, step ${work.done} of ${work.total}`), element("span", {}, ends)),
  ];
}

/** Return the model of the last round that was not withdrawn; `figures` reads its figures. */
export function result(rounds, figures, pinned) {
  const isUsed = (round) => round.outcome === "published" && round.round > 0 && round.roll_out?.state !== "withdrawn";
  const last = rounds.findLast(isUsed);
  if (!last) return [];
  const [start, end] = ["start", "published"].map((stage) => figures.of(last, stage));
  const tile = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value));
  const published = {
    start: "The start, unchanged",
    fine_tuned: "The fine-tuned model",
    fine_tuned_average: "The average of the fine-tune's weights",
  }[last.published];
  return [
    element("h2", { id: "result-title" }, `Global model of round ${last.round}`),
    ...(pinned ? [element("p", { class: "warn" }, `The model of round ${pinned} is pinned: agents use that one.`)] : []),
    element("dl", { class: "tiles" },
      tile(`${figures.title} at the start`, figures.text(start), ...(last.start ? [note(candidateName(last.start))] : [])),
      tile(`${figures.title} as published`, figures.text(end), ...(published ? [note(published)] : [])),
      tile(figures.gainTitle, figures.gain(start, end))),
    ...candidates(last, figures),
  ];
}

/** Return the candidates, the best first, and the chosen one before others that do equally well. */
export function candidates(round, figures) {
  const isStart = (name) => Number(name === round.start);
  const ranked = Object.entries(round.candidates ?? {})
    .sort(([a, one], [b, other]) => other - one || isStart(b) - isStart(a));
  if (ranked.length < 2) return [];
  const title = (name) => [
    candidateName(name),
    ...(name === round.start ? [" ", element("span", { class: "good" }, "✓ chosen")] : []),
    ...(name === "greedy_soup" && round.soup ? [note(round.soup.join(", "))] : []),
  ];
  return [
    element("h3", {}, "Where the fine-tune could start from"),
    table([["Candidate", ""], [figures.title, "number"]],
      ranked.map(([name, score]) => [title(name), figures.text(score)])),
  ];
}

/** Return the rows of the latest rounds, newest first. */
export function rounds(list, figures) {
  if (!list.length) return [];
  const columns = [["Round", ""], ["Outcome", ""], ["Contributions", "number"], ["Start", "number"], ["Published", "number"], ["Time", "number"]];
  const rows = list.toReversed().map((round) => [
    element("a", { href: `#round-${round.round}` }, roundName(round.round)), outcome(round), String(round.num_contributions ?? NONE),
    figures.text(figures.of(round, "start")), figures.text(figures.of(round, "published")), duration(round.seconds),
  ]);
  return [element("h2", { id: "rounds-title" }, "Rounds so far"), table(columns, rows)];
}

function outcome(round) {
  const isPublished = round.outcome === "published";
  return [
    element("span", { class: isPublished ? "good" : "bad" }, isPublished ? "✓ published" : `✗ ${round.outcome}`),
    ...rollOut(round.roll_out),
    ...(round.start ? [note(`start: ${candidateName(round.start).toLowerCase()}`)] : []),
    ...(round.flagged.length ? [note(`⚑ flagged: ${round.flagged.join(", ")}`, "bad")] : []),
    ...(round.audit_note ? [note(round.audit_note, "warn")] : []),
    ...(round.failure ? [note(round.failure)] : []),
  ];
}

/** Return how far the roll-out of a model is, and why; nothing where it is for all agents from the beginning. */
export function rollOut(rollOut) {
  if (!rollOut) return [];
  const [look, text] = ROLL_OUTS[rollOut.state] ?? ["", rollOut.state];
  return [note(rollOut.reason ? `${text}: ${rollOut.reason}` : text, look)];
}
