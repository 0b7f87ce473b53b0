// The list of saved sessions as a dialog. Names come from the disk: text goes into the page as text, never as HTML.

import { element, openDialog } from "./dialog.js";

const SEPARATOR = " · ";

// "SDXL · 794 layers · 312 calls · 8 images · 32 states · 22 Nov 2025, 14:02", without what there is none of
function content(row) {
  const counts = ["layer", "call", "image", "state"].filter((key) => row[`${key}s`]);
  const amount = (key) => `${row[`${key}s`]} ${key}${row[`${key}s`] === 1 ? "" : "s"}`;
  const time = { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" };
  const updated = new Date(row.updated * 1000).toLocaleString([], time);
  return [row.family, ...counts.map(amount), updated].join(SEPARATOR);
}

// Why a session cannot be chosen here; null if it can.
function obstacle(row, rows, options) {
  if (row.problem) return row.problem;
  if (!options.many) return null;
  if (!row.model) return "no session of this pack";
  const taken = options.chosen();
  if (taken.includes(row.name)) return "in the list";
  const first = rows.find((other) => taken.includes(other.name) && !other.problem);
  return first && first.model !== row.model ? "of another model" : null;
}

function sessionButton(row, rows, options, done) {
  const why = obstacle(row, rows, options);
  const current = options.chosen().includes(row.name);
  const button = element("button", { className: "hswq-session", type: "button", disabled: Boolean(why) });
  if (current) button.setAttribute("aria-current", "true");
  const head = element("span", { className: "hswq-name" }, row.name);
  if (why) head.append(element("span", { className: "hswq-why" }, why));
  button.append(head);
  if (!row.problem) button.append(element("span", { className: "hswq-content" }, content(row)));
  button.addEventListener("click", () => {
    options.choose(row.name);
    done();
  });
  return button;
}

function showList(dialog, found, options) {
  const list = element("div", { className: "hswq-list" });
  const again = () => (options.many ? showList(dialog, found, options) : dialog.close());
  for (const row of found.sessions) list.append(sessionButton(row, found.sessions, options, again));
  if (!found.sessions.length) {
    const hint = "No session is saved yet: generate with HSWQ Calibration between model loader and sampler.";
    list.append(element("p", { className: "hswq-text" }, hint));
  }
  const parts = [list];
  if (options.linked) {
    parts.unshift(element("p", { className: "hswq-text" }, "The input is linked: what comes through the link counts."));
  }
  const buttons = [{ label: options.many ? "Done" : "Close", act: () => dialog.close() }];
  if (options.begin) {
    buttons.unshift({ label: "Start a new session…", first: true, act: () => showBegin(dialog, found, options) });
  }
  dialog.show(options.many ? "Sessions to merge" : "Choose a session", parts, buttons);
  const start = list.querySelector("[aria-current]:enabled") ?? list.querySelector("button:enabled");
  start?.focus({ focusVisible: false });
}

function showBegin(dialog, found, options) {
  const { from, others, to } = options.begin;
  const lines = [`${from} stays as it is; new statistics go to ${found.next}.`];
  const along = others();
  if (along.length) lines.push(`Changes with it: ${along.join(", ")}.`);
  const parts = lines.map((line) => element("p", { className: "hswq-text" }, line));
  const start = () => {
    to(found.next);
    dialog.close();
  };
  dialog.show("Start a new session", parts, [
    { label: "Cancel", act: () => dialog.close() },
    { label: `Start ${found.next}`, primary: true, act: start },
  ]);
}

// Opens the dialog.
//   list    () => promise of {sessions, next}, see the server's /hswq/sessions
//   chosen  () => names that are chosen now; many: whether there can be several
//   choose  (name) => the choice is made
//   begin   {from, others, to}: how a new session begins, or false
//   linked  whether a link decides instead of the widget
export async function openPicker(options) {
  const dialog = openDialog();
  dialog.show(options.many ? "Sessions to merge" : "Choose a session", [
    element("p", { className: "hswq-text" }, "Reading the sessions…"),
  ]);
  try {
    showList(dialog, await options.list(), options);
  } catch (error) {
    const close = { label: "Close", act: () => dialog.close() };
    dialog.show("Choose a session", [element("p", { className: "hswq-text" }, `No list: ${error.message}`)], [close]);
  }
}
