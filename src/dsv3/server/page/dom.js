// Small helpers for building elements. Text always goes in as text: nothing in this page parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element of index.html with this id. */
export const byId = (id) => document.getElementById(id);

/** An element with attributes ("onclick" and such are listeners; null and false leave one out) and children. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** One of the drawings at the end of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon alone; the label is for tooltips and screen readers. */
export function iconButton(name, label, onclick) {
  return h("button", { type: "button", class: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

/** Says something to screen readers. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Copies text, and shows on the button that it worked. */
export async function copy(text, button) {
  const copied = await toClipboard(text);
  button.replaceChildren(icon(copied ? "check" : "cross"));
  announce(copied ? "Copied" : "This browser does not let the page copy");
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text); // there on https and localhost only
    return true;
  } catch {
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Gives the browser a file to save. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A short message at the foot of the page, with something to do about it for a while. */
export function toast(text, action = null, act = null) {
  const box = byId("toast");
  clearTimeout(toast.timer);
  const button = action && h("button", { type: "button", onclick: () => { box.hidden = true; act(); } }, action);
  box.replaceChildren(h("span", {}, text), ...(button ? [button] : []));
  box.hidden = false;
  toast.timer = setTimeout(() => { box.hidden = true; }, 8000);
}

/** Makes a text area as high as its text; style.css says where it begins to scroll. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Whether a key was pressed to compose a character (Japanese, Chinese, Korean, ...), not for the page. */
export const composing = (event) => event.isComposing || event.keyCode === 229;

/** Whether the page is used by touch, where Enter is for new lines and focus would open the keyboard. */
export const byTouch = () => matchMedia("(pointer: coarse)").matches;
