// A conversation is a tree of turns, so that nothing is lost when a turn is edited or an answer made again: the new
// one becomes a sibling, and each turn remembers which of its children is shown.
//
// A turn: {id, parent, role: "user" | "assistant", text, children: [id], chosen: id | null, at}, and of answers
//   reasoning  what the model thought, where the server tells
//   status     "writing", "done", "length" (token limit), "ended" (another reason), "stopped" or "failed"
//   error      {title, message, status, until} of a failure; until: when the server wants to be asked again (ms)
//   usage      {prompt, completion, cached} tokens; first, last: ms from the request to those tokens

export const ROOT = "root";

/** An id that is unique without crypto.randomUUID, which plain http does not have. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(values = {}) {
  const now = Date.now();
  const root = { id: ROOT, parent: null, children: [], chosen: null };
  return { id: newId(), title: "", created: now, updated: now, settings: { ...values }, turns: { [ROOT]: root } };
}

export function addTurn(conversation, parent, role, text) {
  const turn = { id: newId(), parent, role, text, children: [], chosen: null, at: Date.now() };
  conversation.turns[turn.id] = turn;
  conversation.turns[parent].children.push(turn.id);
  conversation.turns[parent].chosen = turn.id;
  conversation.updated = turn.at;
  if (role === "user" && !conversation.title) conversation.title = titleOf(text);
  return turn;
}

/** The turns that are shown, first to last. */
export function path(conversation) {
  const turns = [];
  let turn = conversation.turns[ROOT];
  while (turn.chosen) {
    turn = conversation.turns[turn.chosen];
    turns.push(turn);
  }
  return turns;
}

/** The ids of a turn and of those that stand in its place. */
export const siblings = (conversation, turn) => conversation.turns[turn.parent].children;

/** Shows another of a turn's siblings. */
export function choose(conversation, id) {
  conversation.turns[conversation.turns[id].parent].chosen = id;
}

/** The messages to send for an answer to `turn`: neighbours of one role are joined, empty answers left out. */
export function messages(conversation, turn) {
  const turns = [];
  for (let at = turn; at.id !== ROOT; at = conversation.turns[at.parent]) turns.push(at);
  const system = conversation.settings.system?.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const { role, text } of turns.reverse()) {
    if (!text) continue;
    if (found.at(-1)?.role === role) found.at(-1).content += `\n\n${text}`;
    else found.push({ role, content: text });
  }
  return found;
}

function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length <= 48 ? line : `${line.slice(0, 48).replace(/\s\S*$/, "")}…`;
}
