// The live widget's element: a line of words, the strip of the steps, a line of numbers. It draws only while it can be seen.

import { wordsOf } from "./live_words.js";

const SVG = "http://www.w3.org/2000/svg";
/** Height of the strip's drawing; its width is the number of steps. */
const TALL = 24;
/** More steps than this are drawn without lines between them. */
const SEPARATE = 64;
/** Shades of the rows that are still moving, from nearly final to far. */
const SHADES = 4;
/** States of a run that has not ended. */
export const GOING_ON = new Set(["starting", "running", "sequential"]);

const block = (from, to, height) => (to > from ? `M${from} ${TALL}V${TALL - height}H${to}V${TALL}Z` : "");

/** The strip's paths: rounds in two shades in turn, moving rows as bars (short = nearly final), the rest as a line. */
export function stripPaths(message) {
  const rows = Math.max(0, Math.floor(message.rows) || 0);
  const final = Math.min(rows, Math.max(0, Math.floor(message.frozen) || 0));
  const paths = { even: "", odd: "", rest: "", lines: "" };
  for (let shade = 0; shade < SHADES; shade += 1) paths[`far${shade}`] = "";

  let from = 0;
  const ends = [...(message.jumps ?? []), final].map((end) => Math.min(final, end));
  ends.forEach((end, round) => {
    paths[round % 2 ? "odd" : "even"] += block(from, end, TALL);
    from = Math.max(from, end);
  });
  if (message.state === "running" || message.state === "stopped") {
    (message.levels ?? []).forEach((given, place) => {
      const row = Math.floor(message.first) + place;
      const level = Math.min(1, Math.max(0, given));
      if (!(row >= final && row < rows)) return;
      const shade = Math.min(SHADES - 1, Math.floor(level * SHADES));
      paths[`far${shade}`] += block(row, row + 1, TALL * (0.25 + 0.65 * level));
      from = Math.max(from, row + 1);
    });
  }
  paths.rest = block(from, Math.max(rows, 1), 2);
  if (rows <= SEPARATE) for (let row = 1; row < rows; row += 1) paths.lines += `M${row} 0V${TALL}`;
  return { rows: Math.max(rows, 1), paths };
}

function element(parent, tag, className, attributes = {}) {
  const made = document.createElement(tag);
  made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent?.append(made);
  return made;
}

export class LiveView {
  #message = { state: "idle" };
  /** the message that a screen reader was told last */
  #spoken = this.#message;
  #seen = false;
  #frame = 0;
  #observer;
  #paths = {};

  /**
   * @param {() => void} resized told when the note appears or goes, which changes {@link LiveView#height}
   * @param {() => string} locale of the frontend, such as fr
   */
  constructor(resized, locale) {
    this.resized = resized;
    this.locale = locale;
    this.element = element(null, "div", "paratafusion-live", { role: "group", tabindex: "0" });
    this.words = {};
    this.#line("title", "progress");
    this.strip = document.createElementNS(SVG, "svg");
    this.strip.setAttribute("class", "paratafusion-live-strip");
    this.strip.setAttribute("role", "img");
    this.strip.setAttribute("preserveAspectRatio", "none");
    const shades = Array.from({ length: SHADES }, (_, shade) => `far${shade}`);
    for (const name of ["rest", "even", "odd", ...shades, "lines"]) {
      this.#paths[name] = document.createElementNS(SVG, "path");
      this.#paths[name].setAttribute("class", `paratafusion-live-${name}`);
      this.strip.append(this.#paths[name]);
    }
    this.element.append(this.strip);
    this.#line("effort", "gain");
    this.words.note = element(this.element, "div", "paratafusion-live-note", { "aria-hidden": "true" });
    this.status = element(this.element, "div", "paratafusion-live-spoken", { role: "status" });
    this.#observer = new IntersectionObserver((entries) => {
      this.#seen = entries[entries.length - 1].isIntersecting;
      if (this.#seen) this.#ask();
    });
    this.#draw();
  }

  /** Whether no run was shown yet. */
  get idle() {
    return this.#message.state === "idle";
  }

  /** Draw whenever it can be seen, from now on; not after {@link LiveView#dispose}, until asked again. */
  watch() {
    this.#observer.observe(this.element);
  }

  /** What the element needs, in CSS pixels. */
  get height() {
    return wordsOf(this.#message, this.locale()).note ? 114 : 68;
  }

  /** Take a message; it is drawn in the next frame in which the element can be seen, and not spoken if it is old. */
  show(message, old = false) {
    const before = this.height;
    this.#message = message;
    if (old) this.#spoken = message;
    if (this.height !== before) this.resized();
    if (this.#seen) this.#ask();
  }

  /** Leave nothing behind. */
  dispose() {
    this.#observer.disconnect();
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#seen = false;
  }

  /** Two pieces of text, left and right; a screen reader has them in the label. */
  #line(...names) {
    const line = element(this.element, "div", "paratafusion-live-line", { "aria-hidden": "true" });
    for (const name of names) this.words[name] = element(line, "span", `paratafusion-live-${name}`);
  }

  #ask() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#seen) this.#draw();
    });
  }

  #draw() {
    const words = wordsOf(this.#message, this.locale());
    const { rows, paths } = stripPaths(this.#message);
    this.element.dataset.state = this.#message.state;
    this.element.classList.toggle("paratafusion-live-plain", Boolean(this.#message.plain));
    for (const [name, target] of Object.entries(this.words)) this.#write(target, words[name]);
    this.words.note.hidden = !words.note;
    this.words.note.classList.toggle("paratafusion-live-warning", words.note.startsWith("⚠"));
    this.element.title = words.label;
    this.element.setAttribute("aria-label", words.label);
    this.strip.setAttribute("aria-label", [words.title, words.progress].filter(Boolean).join(", "));
    this.strip.setAttribute("viewBox", `0 0 ${rows} ${TALL}`);
    for (const [name, path] of Object.entries(this.#paths)) path.setAttribute("d", paths[name]);
    this.#speak(words);
  }

  /** Tell a screen reader how each run ends, equal ends too, and before that, where it shows, that it has begun. */
  #speak(words) {
    const [message, before] = [this.#message, this.#spoken];
    const begun = GOING_ON.has(message.state);
    if (message === before || (begun && GOING_ON.has(before.state))) return;
    this.#spoken = message;
    this.status.textContent = begun ? words.begun : words.label; // a new text node, which is spoken even if it is equal
  }

  #write(target, text) {
    if (target.textContent !== text) target.textContent = text;
  }
}
