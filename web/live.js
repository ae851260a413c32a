// The live convergence widget on the parallel sampler nodes, fed by the host's event channel.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { GOING_ON, LiveView } from "./live_view.js";

const EVENT = "paratafusion.progress";
const BEGUN = "paratafusion.begun";
/** The host's own, when a queued graph has ended. */
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
/** Milliseconds in which a run's last message may come behind the end of its graph. */
const GRACE = 1000;
const NODES = new Set(["ParaTAF_KSampler", "ParaTAF_KSamplerAdvanced", "ParaTAF_Sampler"]);
const NAME = "paratafusion_live";
/** Space around the element in the classic canvas. */
const MARGIN = 8;
/** Width of a new node, for the words of the widget; KSampler's own. */
const WIDTH = 270;
/** Last messages kept for workflows that are left and come back (another tab, undo). */
const REMEMBERED = 64;

/** node -> its view */
const views = new WeakMap();
/** "workflow/node" -> its last message; without a workflow where that is not known */
const remembered = new Map();
/** the workflow that was queued last */
let queued = null;

const locale = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

const root = () => app.rootGraph ?? app.graph;

/** The node of an execution id, such as 5, or 12:5 for node 5 inside the subgraph node 12. */
function nodeAt(id) {
  let graph = root();
  const path = String(id).split(":");
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(path[path.length - 1]) ?? null;
}

function deliver(message, old = false) {
  if (message.workflow && root()?.id && message.workflow !== root().id) return;
  const node = nodeAt(message.node);
  if (node) views.get(node)?.show(message, old);
}

function take(message) {
  const key = `${message.workflow ?? ""}/${message.node}`;
  remembered.delete(key);
  remembered.set(key, message);
  if (remembered.size > REMEMBERED) remembered.delete(remembered.keys().next().value);
  deliver(message);
}

/** Runs of a graph that has ended cannot go on: their last message was lost. */
function endAll(prompt) {
  for (const message of [...remembered.values()]) {
    if (GOING_ON.has(message.state) && message.prompt === prompt) take({ ...message, state: "stopped" });
  }
}

/**
 * The host had the results of these nodes and does not run them: after a reload nothing else tells of that. It does not
 * say of which workflow they are; that is the one that was queued last.
 */
function takeCached(nodes = []) {
  if (queued === null || root()?.id !== queued) return;
  for (const id of nodes) {
    const view = views.get(nodeAt(id));
    if (view?.idle) view.show({ state: "cached" });
  }
}

/** Grow a node of the classic canvas to what its widgets need; Vue nodes do so by themselves. */
function makeRoom(node) {
  if (globalThis.LiteGraph?.vueNodesMode || !node.graph) return;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.graph.setDirtyCanvas(true, true);
}

/** Zooming the classic canvas, and moving it with the middle button, go on over the widget. */
function letThrough(element) {
  const pass = (kind, take, wanted = () => true) =>
    element.addEventListener(
      kind,
      (event) => {
        if (wanted(event) && element.closest(".dom-widget")) app.canvas?.[take]?.(event);
      },
      { passive: false }, // the canvas keeps the browser from zooming the page
    );
  pass("wheel", "processMouseWheel");
  pass("pointerdown", "processMouseDown", (event) => event.button === 1);
  pass("pointermove", "processMouseMove", (event) => (event.buttons & 4) !== 0);
  pass("pointerup", "processMouseUp", (event) => event.button === 1);
}

function addView(node) {
  const view = new LiveView(() => makeRoom(node), locale);
  const widget = node.addDOMWidget(NAME, "paratafusion-live", view.element, {
    serialize: false,
    hideInPanel: true,
    margin: MARGIN,
    getMinHeight: () => view.height + 2 * MARGIN,
    getMaxHeight: () => view.height + 2 * MARGIN,
  });
  widget.serialize = false; // the saved workflow; the option above is the queued prompt
  widget.label = " "; // where a frontend writes a name beside it
  letThrough(view.element);
  if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
  views.set(node, view);
  const { onAdded, onRemoved } = node;
  node.onAdded = function added(...given) {
    view.watch(); // a node may be taken out and put back
    return onAdded?.apply(this, given);
  };
  node.onRemoved = function removed(...given) {
    view.dispose();
    return onRemoved?.apply(this, given);
  };
}

function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./live.css", import.meta.url).href;
  document.head.append(link);
}

// at once: a message while the page loads would be one that nobody handles, and be lost
api.addEventListener(EVENT, ({ detail }) => take(detail));
api.addEventListener(BEGUN, ({ detail }) => take({ ...detail, state: "starting" }));
api.addEventListener("promptQueueing", () => {
  queued = root()?.id ?? null;
});
api.addEventListener("execution_cached", ({ detail }) => takeCached(detail?.nodes));
for (const end of ENDS) {
  api.addEventListener(end, ({ detail }) => setTimeout(endAll, GRACE, detail?.prompt_id));
}

app.registerExtension({
  name: "paratafusion.live",
  setup: addStyles,
  nodeCreated(node) {
    if (NODES.has(node.comfyClass ?? node.constructor?.comfyClass) && node.addDOMWidget) addView(node);
  },
  afterConfigureGraph() {
    for (const message of remembered.values()) if (message.workflow) deliver(message, true);
  },
});
