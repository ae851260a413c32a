// What the live widget says, as plain text. A message is what nodes/host/live.py sends; every field may be missing.

/** @typedef {{title: string, progress: string, effort: string, gain: string, note: string, label: string}} Words */

const count = (value) => (Number.isFinite(value) ? Math.max(0, Math.round(value)) : 0);

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** Steps where the sampler evaluates the model once a step, evaluations where it does more often. */
const unitOf = (message) => (message.rows === message.steps ? "step" : "evaluation");

function titleOf(message) {
  const rounds = count(message.round);
  switch (message.state) {
    case "running":
      return `Round ${rounds}`;
    case "sequential":
      return "Sequential";
    case "sketch":
      return `Sketch, ${plural(rounds, "round")}`;
    case "stopped":
      return rounds ? `Stopped in round ${rounds}` : "Stopped";
    case "done":
      if (!count(message.rows)) return "Nothing to do";
      return message.plain ? "Done, sequentially" : `Done in ${plural(rounds, "round")}`;
    default:
      return "Not run yet";
  }
}

function progressOf(message) {
  const rows = count(message.rows);
  if (!rows) return "";
  const whole = plural(rows, unitOf(message));
  return message.state === "done" ? whole : `${count(message.frozen)} of ${whole}`;
}

function effortOf(message) {
  if (message.state === "idle") return "Fills as steps become final";
  const rows = count(message.rows);
  if (!rows || message.plain || message.state === "sequential") return "";
  return `${plural(count(message.nfe), "row")} for ${plural(rows, unitOf(message))}`;
}

/** How much faster, and what kind of number it is: a ratio of times only where times were measured. */
function gainOf(message) {
  if (message.plain || message.state === "sequential") return "";
  if (Number.isFinite(message.speedup)) {
    return `${message.speedup.toFixed(1)}× ${message.speedup_kind === "measured" ? "measured" : "predicted"}`;
  }
  const rounds = count(message.round);
  const own = count(message.frozen) - count(message.start); // not what an earlier run had made final
  return rounds ? `${(own / rounds).toFixed(1)} ${unitOf(message)}s per call` : "";
}

function noteOf(message) {
  if (typeof message.reason === "string" && message.reason) return `⚠ Not parallel: ${message.reason}`;
  if (typeof message.doubt === "string" && message.doubt) return `⚠ In doubt: ${message.doubt}`;
  if (typeof message.warm !== "string" || !message.warm) return "";
  return message.warm.startsWith("cold") ? `Started ${message.warm}` : `Warm start: ${message.warm}`;
}

function labelOf(message, words) {
  const rows = count(message.rows);
  const effort = words.effort && rows ? `${plural(count(message.nfe), "row")} evaluated, ${rows} sequentially` : "";
  const final = words.progress && message.state !== "done" ? `${words.progress} final` : words.progress;
  return ["Parallel sampling", words.title, final, effort, words.gain, words.note].filter(Boolean).join(". ");
}

/** @returns {Words} all that is said about a message; `label` is the whole for a screen reader and a tooltip. */
export function wordsOf(message) {
  const words = {
    title: titleOf(message),
    progress: progressOf(message),
    effort: effortOf(message),
    gain: gainOf(message),
    note: noteOf(message),
  };
  return { ...words, label: labelOf(message, words) };
}
