// How figures and states read.

export const NONE = "–";

export const PHASES = {
  collecting: ["Collecting", "Agents pre-train on their own data and upload."],
  aggregating: ["Averaging", "The weights of all contributions become one model."],
  fine_tuning: ["Fine-tuning", "The best candidate is trained on the combined data."],
  evaluating: ["Evaluating", "The result is measured on held-out data."],
  published: ["Published", "Every agent can download the global model."],
  failed: ["Failed", "The round ended without a model."],
};

const CANDIDATES = {
  aligned: "Aligned average",
  average: "Average",
  greedy_soup: "Greedy soup",
  best_agent: "Best agent",
  previous: "Previous global model",
};

export const FLAGS = {
  labels: "⚑ labels contradict those of the others",
  model: "⚑ model fails on the images of the others",
};

export const LEFT_OUT = {
  large_update: "left out of the model: update too large",
  quarantined: "left out of the model: in quarantine",
};

export const WAITS_FOR = {
  hours: "outside of its hours",
  command: "its ready_command says that it is not the time",
  time: "waits for the time at which it pre-trains",
  examples: "waits for new examples",
  upload_hours: "waits for the hours in which it uploads",
};

export const ROLL_OUTS = {
  canary: ["warn", "tried out by the canary"],
  released: ["", "for all agents"],
  withdrawn: ["bad", "withdrawn"],
};

export const percent = (ratio) => (ratio == null ? NONE : `${(100 * ratio).toFixed(1)} %`);

export const roundName = (number) => (number ? `Round ${number}` : "Warm-up");

export const phaseName = (phase) => PHASES[phase]?.[0] ?? phase;

export const candidateName = (candidate) => CANDIDATES[candidate] ?? candidate;

export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 1) return `${Number(seconds.toFixed(2))} s`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Return a time to come, which is known roughly: "40 s left", "3 min left". */
export function timeLeft(seconds) {
  if (seconds == null) return "";
  if (seconds < 90) return `${Math.ceil(seconds)} s left`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min left`;
  return `${(seconds / 3600).toFixed(1)} h left`;
}

const UNITS = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]];

const unitFor = (bytes) => UNITS.find(([, size]) => bytes >= size) ?? UNITS.at(-1);

const inUnit = (bytes, [name, size]) => (bytes / size).toFixed(name === "B" ? 0 : 1);

export function size(bytes) {
  if (bytes == null) return NONE;
  const unit = unitFor(bytes);
  return `${inUnit(bytes, unit)} ${unit[0]}`;
}

/** Return "3.1 of 9.1 MB". */
export function sizeOf(done, total) {
  if (total == null) return size(done);
  const unit = unitFor(total);
  return `${inUnit(done, unit)} of ${inUnit(total, unit)} ${unit[0]}`;
}

export function ordinal(number) {
  const teens = number % 100 > 10 && number % 100 < 14;
  return `${number}${teens ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th")}`;
}

/** Return the time of day, with the date before it if that is another day. Both are in seconds since the epoch. */
export function clockTime(at, now) {
  const [then, today] = [new Date(1000 * at), new Date(1000 * now)];
  const time = then.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const day = then.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return then.toDateString() === today.toDateString() ? time : `${day}, ${time}`;
}
