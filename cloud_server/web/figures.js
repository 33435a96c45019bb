// How the figure of a task reads: an accuracy as a percentage, and any other figure as a number.

import { element } from "./dom.js";
import { NONE, percent } from "./words.js";

/** Return what reads the figures of a status or of a report, which names task and figure unless these are accuracies. */
export function figuresOf({ task, metric = "accuracy" }) {
  // The figure of an own task may have the same name.
  const isAccuracy = metric === "accuracy" && !task;
  const field = isAccuracy ? "accuracy" : "score";
  return {
    metric,
    /** The name of the figure as a title has it. */
    title: metric.slice(0, 1).toUpperCase() + metric.slice(1),
    gainTitle: isAccuracy ? "Gain, points" : "Gain",
    /** What a model has, in a sentence. */
    phrase: (score) => (isAccuracy ? `an accuracy of ${percent(score)}` : `a score of ${number(score)} (${metric})`),
    /** The figure of one stage of a round or an agent, such as "published" or "before". */
    of: (item, stage) => item[`${field}_${stage}`],
    text: isAccuracy ? percent : number,
    gain: (before, after) => (isAccuracy ? gain(before, after, 100, 1) : gain(before, after, 1, 3)),
  };
}

const number = (score) => (score == null ? NONE : score.toFixed(3));

function gain(before, after, scale, decimals) {
  if (before == null || after == null) return NONE;
  const gained = Math.round(scale * (after - before) * 10 ** decimals) / 10 ** decimals;
  const [sign, look] = gained > 0 ? ["+", "good"] : gained < 0 ? ["−", "bad"] : ["±", "soft"];
  return element("span", { class: look }, sign + Math.abs(gained).toFixed(decimals));
}
