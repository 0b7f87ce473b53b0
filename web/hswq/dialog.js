// A small dialog in ComfyUI's colours, the browser's own <dialog>: the same in every version of the page.

const STYLE = `
.hswq-dialog { width: min(560px, 92vw); max-height: 80vh; margin: auto; padding: 0; overflow: hidden;
  color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #353535);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 8px; box-shadow: 0 8px 32px #000a;
  font: 14px/1.4 Inter, Arial, sans-serif; }
.hswq-dialog[open] { display: flex; flex-direction: column; }
.hswq-dialog::backdrop { background: #0008; }
.hswq-dialog h3 { margin: 0; padding: 14px 16px 10px; font-size: 15px; font-weight: 600; color: var(--fg-color, #fff); }
.hswq-body { padding: 0 10px; overflow-y: auto; min-height: 0; }
.hswq-list { display: flex; flex-direction: column; gap: 2px; }
.hswq-text { margin: 0; padding: 4px 6px 8px; overflow-wrap: anywhere; }
.hswq-dialog button { font: inherit; color: inherit; cursor: pointer; border: 1px solid transparent; border-radius: 6px; }
.hswq-dialog button:focus-visible { outline: 2px solid var(--p-primary-color, #60a5fa); outline-offset: -2px; }
.hswq-session { display: flex; flex-direction: column; gap: 2px; width: 100%; padding: 8px 10px; text-align: left;
  background: transparent; }
.hswq-session:hover:enabled { background: var(--content-hover-bg, #ffffff14); }
.hswq-session[aria-current] { background: var(--comfy-input-bg, #222); border-color: var(--border-color, #4e4e4e); }
.hswq-dialog .hswq-session:disabled { cursor: default; opacity: 0.55; }
.hswq-name { color: var(--fg-color, #fff); font-weight: 500; overflow-wrap: anywhere; }
.hswq-why { margin-left: 10px; font-weight: 400; font-style: italic; color: var(--descrip-text, #999); }
.hswq-content { font-size: 12px; color: var(--descrip-text, #999); overflow-wrap: anywhere; }
.hswq-buttons { display: flex; justify-content: flex-end; gap: 8px; padding: 12px 16px 14px; }
.hswq-dialog .hswq-buttons button { padding: 6px 14px; background: var(--comfy-input-bg, #222);
  border-color: var(--border-color, #4e4e4e); }
.hswq-dialog .hswq-buttons button:hover { background: var(--content-hover-bg, #ffffff14); }
.hswq-dialog .hswq-buttons .hswq-first { margin-right: auto; }
.hswq-dialog .hswq-buttons .hswq-primary { color: #fff; background: var(--primary-background, #0b8ce9);
  border-color: transparent; }
.hswq-dialog .hswq-buttons .hswq-primary:hover { background: var(--primary-background-hover, #0a7cd0); }
`;
const STYLE_ID = "hswq-style";

// A new element with these properties and this text.
export function element(tag, properties = {}, text = "") {
  const made = Object.assign(document.createElement(tag), properties);
  if (text) made.textContent = text;
  return made;
}

function addStyle() {
  if (!document.getElementById(STYLE_ID)) document.head.append(element("style", { id: STYLE_ID }, STYLE));
}

function button({ label, act, first, primary }) {
  const className = [first && "hswq-first", primary && "hswq-primary"].filter(Boolean).join(" ");
  const made = element("button", { type: "button", className }, label);
  made.addEventListener("click", act);
  return made;
}

// Opens an empty dialog: `show(title, parts, buttons)` fills it anew, `close()` ends it, as do Esc and a click beside it.
export function openDialog() {
  addStyle();
  const dialog = element("dialog", { className: "hswq-dialog" });
  const close = () => dialog.close();
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("pointerdown", (event) => event.target === dialog && close());
  // The page's shortcuts are not for a dialog.
  for (const kind of ["keydown", "keyup", "keypress", "paste", "copy"]) {
    dialog.addEventListener(kind, (event) => event.stopPropagation());
  }
  document.body.append(dialog);
  dialog.showModal();
  const show = (title, parts, buttons = []) => {
    const body = element("div", { className: "hswq-body" });
    body.append(...parts);
    const row = element("div", { className: "hswq-buttons" });
    row.append(...buttons.map(button));
    dialog.setAttribute("aria-label", title);
    dialog.replaceChildren(element("h3", {}, title), body, row);
    row.querySelector(".hswq-primary")?.focus({ focusVisible: false });
  };
  return { show, close };
}
