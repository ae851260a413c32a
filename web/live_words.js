// What the live widget says, as plain text. A message is what nodes/host/live.py sends; every field may be missing.

import { TEXTS } from "./live_texts.js";

/** @typedef {{title: string, progress: string, effort: string, gain: string, note: string, label: string, begun: string}} Words */

const count = (value) => (Number.isFinite(value) ? Math.max(0, Math.round(value)) : 0);

/** A speaker of the language of a locale such as fr or zh-TW; English where there is none. */
function speaker(locale) {
  const texts = TEXTS[String(locale).split("-")[0]] ?? TEXTS.en;
  const say = (key, values = {}) => texts[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
  const many = (key, n) => texts[key][n === 1 ? 0 : 1].replace("{n}", n);
  return { say, many };
}

/** Steps where the sampler evaluates the model once a step, evaluations where it does more often. */
const unitOf = (message) => (message.rows === message.steps ? "step" : "evaluation");

/** States of a solver's own run, of which rounds and rows tell. */
const SOLVED = new Set(["running", "sketch", "stopped", "done"]);

function titleOf(message, { say, many }) {
  const n = count(message.round);
  const rounds = many("round", n);
  switch (message.state) {
    case "running":
      return say("running", { n });
    case "starting":
      return say("begun");
    case "cached":
      return say("cached");
    case "sequential":
      return say("sequential");
    case "sketch":
      return say("sketch", { rounds });
    case "stopped":
      return n ? say("stoppedIn", { n }) : say("stopped");
    case "done":
      if (!count(message.rows)) return say("nothing");
      return message.plain ? say("plain") : say("done", { rounds });
    default:
      return say("idle");
  }
}

/** A speed is a ratio of times, estimated from the calls of this machine; of a sketch it says nothing. */
const knowsSpeed = (message) =>
  (message.state === "running" || message.state === "done") && !message.plain && Number.isFinite(message.speedup);

/** How far a run is; the speed of one that has ended. */
function progressOf(message, { say, many }) {
  const rows = count(message.rows);
  if (!rows) return "";
  const whole = many(unitOf(message), rows);
  if (message.state !== "done") return say("part", { n: count(message.frozen), whole });
  return knowsSpeed(message) ? say("speed", { n: message.speedup.toFixed(1) }) : whole;
}

function effortOf(message, { say, many }) {
  if (message.state === "idle") return say("hint");
  const rows = count(message.rows);
  if (!rows || message.plain || !SOLVED.has(message.state)) return "";
  return say("effort", { rows: many("row", count(message.nfe)), whole: many(unitOf(message), rows) });
}

/** The speed so far of a run that goes on; else, steps that a model call of this run has made final, on average. */
function gainOf(message, { say }) {
  if (message.state === "running" && knowsSpeed(message)) return say("speed", { n: message.speedup.toFixed(1) });
  const rounds = count(message.round);
  if (message.plain || !SOLVED.has(message.state) || !rounds) return "";
  const own = count(message.frozen) - count(message.start); // not what an earlier run had made final
  return say(`${unitOf(message)}sPerCall`, { n: (own / rounds).toFixed(1) });
}

function noteOf(message, { say }) {
  const given = (why) => typeof why === "string" && why;
  if (given(message.reason)) return `⚠ ${say("notParallel", { why: message.reason })}`;
  if (given(message.doubt)) return `⚠ ${say("doubt", { why: message.doubt })}`;
  if (!given(message.warm)) return given(message.plan) ? say("plan", { why: message.plan }) : "";
  const cold = message.warm.match(/^cold: (.*)$/s);
  return cold ? say("cold", { why: cold[1] }) : say("warm", { why: message.warm });
}

function labelOf(message, words, { say, many }) {
  const n = count(message.rows);
  const effort = words.effort && n ? say("spent", { rows: many("row", count(message.nfe)), n }) : "";
  const final = words.progress && message.state !== "done" ? say("final", { part: words.progress }) : words.progress;
  const calls = words.gain && !knowsSpeed(message) ? say("callsOnly") : "";
  return [say("label"), words.title, final, effort, words.gain, calls, words.note].filter(Boolean).join(". ");
}

/**
 * All that is said about a message; `label` is the whole for a screen reader and a tooltip, `begun` that it has begun.
 * @returns {Words}
 */
export function wordsOf(message, locale = "en") {
  const speak = speaker(locale);
  const words = {
    title: titleOf(message, speak),
    progress: progressOf(message, speak),
    effort: effortOf(message, speak),
    gain: gainOf(message, speak),
    note: noteOf(message, speak),
  };
  return { ...words, label: labelOf(message, words, speak), begun: `${speak.say("label")}. ${speak.say("begun")}` };
}
