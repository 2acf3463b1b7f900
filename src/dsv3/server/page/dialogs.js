// A menu beside a button, and a question that is answered with one line.

import { byId, h } from "./dom.js";

/** Opens a menu of [label, action] at a button. */
export function openMenu(button, entries) {
  const menu = byId("menu");
  const choose = (action) => () => {
    menu.hidePopover();
    action();
  };
  const buttons = entries.map(([label, action]) => h("button", { type: "button", onclick: choose(action) }, label));
  menu.replaceChildren(...buttons);
  menu.showPopover();
  const { bottom, right } = button.getBoundingClientRect();
  menu.style.top = `${Math.min(bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.style.left = `${Math.max(8, Math.min(right, innerWidth - 8) - menu.offsetWidth)}px`;
  buttons[0].focus();
}

/** Asks for a line of text; `then` is called with it unless the dialog is closed. A secret may be empty: none. */
export function prompt({ title, about = "", value, secret = false }, then) {
  const dialog = byId("prompt");
  const input = byId("prompt-input");
  byId("prompt-title").textContent = title;
  byId("prompt-about").textContent = about;
  input.type = secret ? "password" : "text";
  input.value = value;
  byId("prompt-form").onsubmit = (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (!text && !secret) return;
    dialog.close();
    then(text);
  };
  if (!dialog.open) dialog.showModal();
  input.select();
}
