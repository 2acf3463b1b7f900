// What a person may set: small things in localStorage, and the form of a conversation's system prompt and sampling.

import { byId, h } from "./dom.js";

/** The sampling parameters, by their names in the API. Empty leaves one to the server. */
export const settings = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.01, hint: "0 always takes the likeliest" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, hint: "the longest answer" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, hint: "only the likeliest, up to this share" },
  { name: "top_k", label: "Top k", min: 0, step: 1, hint: "only so many of the likeliest" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "only this likely, of the likeliest" },
  { name: "seed", label: "Seed", min: 0, step: 1, hint: "the same seed, the same answer" },
  { name: "presence_penalty", label: "Presence", min: -2, max: 2, step: 0.01, penalty: true },
  { name: "frequency_penalty", label: "Frequency", min: -2, max: 2, step: 0.01, penalty: true },
  { name: "repetition_penalty", label: "Repetition", min: 0.01, max: 2, step: 0.01, penalty: true },
];

/** Reads a text kept in this browser ("" if there is none, or no storage), or keeps `value`; "" removes it. */
export function setting(name, value, storage = "localStorage") {
  try {
    if (value === undefined) return window[storage].getItem(name) ?? "";
    if (value) window[storage].setItem(name, value);
    else window[storage].removeItem(name);
  } catch {
    // No storage: the page works, and forgets.
  }
  return value ?? "";
}

/** The system prompt and sampling that new conversations begin with: those set last. */
export function lastValues() {
  try {
    return JSON.parse(setting("settings") || "{}");
  } catch {
    return {};
  }
}

/** Whether anything is set that shapes answers. */
export const anySet = (values) =>
  Boolean(values.system?.trim()) || settings.some(({ name }) => Number.isFinite(values[name]));

/** Builds the number fields; `changed(name, value)` is called as they are filled in, with null for empty. */
export function buildFields(changed) {
  for (const { name, label, min, max, step, hint, penalty } of settings) {
    const input = h("input", {
      id: `set-${name}`, type: "number", inputmode: "decimal", min, max, step, placeholder: "default",
      "aria-describedby": hint ? `hint-${name}` : null,
      oninput: () => input.validity.valid && changed(name, input.value === "" ? null : input.valueAsNumber),
    });
    const about = hint ? h("small", { id: `hint-${name}` }, hint) : null;
    const field = h("div", { class: "field" }, h("label", { for: input.id }, label), input, about);
    byId(penalty ? "penalties" : "sampling").append(field);
  }
}

export function showFields(values) {
  byId("system").value = values.system ?? "";
  for (const { name } of settings) byId(`set-${name}`).value = values[name] ?? "";
}
