// A button on every node that takes a session: what is saved, what is in it, and a fresh name.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { openPicker } from "./picker.js";

// So that the line about what is recorded fits; the report's picture needs more. A workflow brings its own sizes.
const WIDTH = 320;
const BUTTON = "Choose session…";
// The widget a choice goes to. `adds`: a line for each choice. `begins`: new statistics can be begun from here.
const NODES = {
  HSWQCalibration: { widget: "session", begins: true },
  HSWQConverter: { widget: "session", begins: true },
  HSWQFileConverter: { widget: "session" },
  HSWQReport: { widget: "session", width: 420 },
  HSWQMergeSessions: { widget: "sessions", adds: true },
};

function widgetOf(node) {
  return node.widgets?.find((widget) => widget.name === NODES[node.comfyClass]?.widget);
}

function setSession(nodes, value) {
  for (const node of nodes) {
    const widget = widgetOf(node);
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
    node.setDirtyCanvas?.(true, true);
  }
  // For undo, and the mark of an unsaved workflow; older pages have the other name.
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

// Nodes of the same graph that go along when a new session takes the place of `name`: a converter must not go on
// with the old one.
function companions(node, name) {
  return (node.graph?.nodes ?? []).filter(
    (other) => other !== node && NODES[other.comfyClass]?.begins && widgetOf(other)?.value === name,
  );
}

async function listSessions(name) {
  const reply = await api.fetchApi(`/hswq/sessions?name=${encodeURIComponent(name)}`, { cache: "no-store" });
  if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
  return reply.json();
}

function choose(node) {
  const { adds, begins } = NODES[node.comfyClass];
  const current = String(widgetOf(node).value ?? "");
  const lines = () => String(widgetOf(node).value ?? "").split("\n").map((line) => line.trim()).filter(Boolean);
  return openPicker({
    list: () => listSessions(adds ? "" : current),
    chosen: adds ? lines : () => [current],
    many: Boolean(adds),
    choose: (name) => setSession([node], adds ? [...lines(), name].join("\n") : name),
    begin: begins && {
      from: current,
      others: () => companions(node, current).map((other) => other.title),
      to: (name) => setSession([node, ...companions(node, current)], name),
    },
    linked: node.inputs?.some((input) => input.widget?.name === widgetOf(node).name && input.link != null) ?? false,
  });
}

function addButton(node) {
  if (!widgetOf(node)) return;
  // The last widget, and no part of the workflow: saved values belong to widgets by their place.
  const button = node.addWidget("button", BUTTON, null, () => choose(node), { serialize: false });
  button.serialize = false;
  button.tooltip = "The saved sessions and what is in them.";
  node.setSize([Math.max(node.size[0], NODES[node.comfyClass].width ?? WIDTH), node.computeSize()[1]]);
}

app.registerExtension({
  name: "hswq.sessions",
  nodeCreated(node) {
    if (node.comfyClass in NODES) addButton(node);
  },
});
