// Save Trajectory's file name with text placeholders, and room for the titles of the nodes that show results.

import { app } from "../../scripts/app.js";

const SAVE = "ParaTAF_SaveTrajectory";
/** Nodes whose titles are cut at the width that the classic canvas gives them. */
const LONG_TITLES = new Set(["ParaTAF_Report", "ParaTAF_Compare"]);
const WIDTH = 270;

/**
 * %date:yyyy-MM-dd% and %Node title.widget%, filled in as for the frontend's own save nodes. It keeps the function
 * where its scripts/utils.js finds it; an import of that file would warn, and fail where there is none.
 */
function filledIn(text) {
  try {
    return globalThis.comfyAPI.utils.applyTextReplacements(app.rootGraph ?? app.graph, text);
  } catch {
    return text; // another frontend: the server says what it does not take
  }
}

app.registerExtension({
  name: "paratafusion.nodes",
  nodeCreated(node) {
    const kind = node.comfyClass ?? node.constructor?.comfyClass;
    if (LONG_TITLES.has(kind) && node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
    const prefix = kind === SAVE && node.widgets?.find((widget) => widget.name === "filename_prefix");
    if (prefix) prefix.serializeValue = () => filledIn(prefix.value); // of the queued graph, not of the saved one
  },
});
