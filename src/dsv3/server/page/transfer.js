// Conversations as files: JSON holds everything and can be read back; Markdown is what is shown, to read or print.

import { addTurn, newConversation, newId, path, ROOT } from "./tree.js";

const FORMAT = "dsv3-chat";
const TEXTS = ["reasoning", "model"];
const NUMBERS = ["at", "first", "last"];
const WHOLE = ["done", "length", "ended"]; // the statuses that are taken over

export const toJson = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2);

export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push(`**System prompt**\n\n${conversation.settings.system}`);
  for (const turn of path(conversation)) {
    parts.push(`## ${turn.role === "user" ? "You" : turn.model ?? "Answer"}`, turn.text);
  }
  return `${parts.join("\n\n")}\n`;
}

/** A file's name from a title. */
export function fileName(title, suffix) {
  const words = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  return `${words || "conversation"}.${suffix}`;
}

/** The conversations in a file that `toJson` wrote, or in one of `dsv3 chat`'s /save. Throws Error if it is neither. */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON");
  }
  let found = [];
  if (data?.format === FORMAT && Array.isArray(data.conversations)) found = data.conversations.map(checked);
  else if (Array.isArray(data) && data.every((message) => isText(message?.content))) found = [listed(data)];
  found = found.filter(({ turns }) => turns[ROOT].chosen);
  if (!found.length) throw new Error("this file holds no conversations");
  return found;
}

function listed(list) {
  const conversation = newConversation();
  let parent = ROOT;
  for (const { role, content } of list) {
    if (role === "system") conversation.settings.system = content;
    if (role !== "user" && role !== "assistant") continue;
    const turn = addTurn(conversation, parent, role, content);
    if (role === "assistant") turn.status = "done";
    parent = turn.id;
  }
  return conversation;
}

/** A conversation of what is known and well-formed in `from`, wherever that comes from: no cycles, no odd types. */
function checked(from) {
  const conversation = newConversation();
  for (const [name, value] of Object.entries(isText(from?.settings) ? {} : from?.settings ?? {})) {
    if (isText(value) || Number.isFinite(value)) conversation.settings[name] = value;
  }
  conversation.id = isText(from?.id) && /^\w+$/.test(from.id) ? from.id : newId();
  conversation.title = isText(from?.title) ? from.title : "Imported";
  if (!isText(conversation.settings.system)) delete conversation.settings.system;
  for (const name of ["created", "updated"]) if (Number.isFinite(from?.[name])) conversation[name] = from[name];
  const seen = new Set();
  const left = [[from?.turns?.[ROOT], conversation.turns[ROOT]]]; // turns whose children are yet to be taken
  while (left.length) {
    const [source, target] = left.pop();
    for (const id of Array.isArray(source?.children) ? source.children : []) {
      const turn = isText(id) ? from.turns[id] : null;
      if (seen.has(id) || !isText(turn?.text) || !["user", "assistant"].includes(turn.role)) continue;
      seen.add(id);
      const copy = { id: newId(), parent: target.id, role: turn.role, text: turn.text, children: [], chosen: null };
      for (const name of TEXTS) if (isText(turn[name])) copy[name] = turn[name];
      for (const name of NUMBERS) if (Number.isFinite(turn[name])) copy[name] = turn[name];
      if (turn.role === "assistant") copy.status = WHOLE.includes(turn.status) ? turn.status : "stopped";
      const { prompt, completion, cached } = turn.usage ?? {};
      if (Number.isFinite(prompt) && Number.isFinite(completion)) {
        copy.usage = { prompt, completion, cached: Number.isFinite(cached) ? cached : 0 };
      }
      conversation.turns[copy.id] = copy;
      target.children.push(copy.id);
      if (source.chosen === id || target.chosen === null) target.chosen = copy.id;
      left.push([turn, copy]);
    }
  }
  return conversation;
}

const isText = (value) => typeof value === "string";
