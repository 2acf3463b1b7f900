// The list of conversations: newest first under headings of time, or those that hold the words searched for.

import { byId, h, iconButton } from "./dom.js";
import { ROOT } from "./tree.js";

const DAY = 86_400_000;

/** Shows the conversations; `openMenu(conversation, button)` is called for a conversation's menu. */
export function showList(conversations, { query, current, running, openMenu }) {
  const list = byId("conversations");
  const focused = document.activeElement?.closest?.("[data-id]")?.dataset.id;
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const entries = [];
  let heading = null;
  for (const conversation of [...conversations].sort((a, b) => b.updated - a.updated)) {
    const found = words.length ? search(conversation, words) : "";
    if (found === null) continue;
    const when = words.length ? "Found" : age(conversation.updated);
    if (when !== heading) entries.push(h("li", { class: "heading" }, h("h2", {}, when)));
    heading = when;
    entries.push(entry(conversation, found, current, running, openMenu));
  }
  const none = words.length ? "Nothing found." : "No conversations yet.";
  if (!entries.length) entries.push(h("li", { class: "none" }, none));
  list.replaceChildren();
  for (const entry of entries) list.append(entry);
  if (focused) list.querySelector(`[data-id="${focused}"] a`)?.focus();
}

function entry(conversation, found, current, running, openMenu) {
  const { id, title } = conversation;
  const link = h(
    "a",
    { href: `#${id}`, "aria-current": id === current ? "page" : null, title },
    h("span", { class: "title" }, title),
    found ? h("span", { class: "snippet" }, found) : null,
  );
  const menu = iconButton("more", `More: ${title}`, () => openMenu(conversation, menu));
  return h("li", { "data-id": id, class: running.has(id) ? "running" : null }, link, menu);
}

function age(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / DAY);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 8 ? "Last 7 days" : new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}

/** Null unless title and turns together hold all words; the text around the first word found in a turn, or "". */
function search(conversation, words) {
  const texts = Object.values(conversation.turns).filter(({ id }) => id !== ROOT).map(({ text }) => text);
  const all = [conversation.title, ...texts].join("\n").toLowerCase();
  if (!words.every((word) => all.includes(word))) return null;
  for (const text of texts) {
    const at = text.toLowerCase().indexOf(words[0]);
    if (at >= 0) return (at > 20 ? "…" : "") + text.slice(Math.max(0, at - 20), at + 80).replace(/\s+/g, " ");
  }
  return "";
}
