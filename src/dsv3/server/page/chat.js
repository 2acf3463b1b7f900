// The page's one place of decisions: which conversation is open, what is asked of the server, what keys do.
//
// api.js asks the server, tree.js holds a conversation's turns, store.js keeps them, thread.js and sidebar.js show
// them, markdown.js (with highlight.js) draws answers, settings.js and dialogs.js ask, transfer.js reads and writes
// files, dom.js builds elements, theme.js runs before all of them.

import * as api from "./api.js";
import { openMenu, prompt } from "./dialogs.js";
import { announce, byId, byTouch, composing, download, fit, h, toast } from "./dom.js";
import { anySet, buildFields, lastValues, setting, showFields } from "./settings.js";
import { showList } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { fromJson, fileName, toJson, toMarkdown } from "./transfer.js";
import { addTurn, choose, messages, newConversation, newId, path, ROOT } from "./tree.js";

const PROMPTS = [
  "Tell me a story about a fox.",
  "I would like to book a table for two.",
  "Write a short poem about the sea.",
  "What should I cook tonight?",
];

const conversations = new Map(); // by id; one joins when its first message is sent
const running = new Map(); // AbortController of the answer being written, by conversation
let current = newConversation(lastValues());
let models = [];

const input = byId("input");
const thread = new Thread(byId("thread"), byId("turns"), byId("jump"), {
  choose: (id) => {
    choose(current, id);
    keep(current);
    thread.show(current);
    showState();
  },
  edit: (turn, text) => ask(addTurn(current, turn.parent, "user", text)),
  regenerate: (turn) => ask(current.turns[turn.parent]),
  retry: (turn) => ask(current.turns[turn.parent], turn.text ? null : turn),
});

// ---------------------------------------- asking

function send(text = input.value) {
  if (!text.trim() || running.has(current.id)) return;
  if (text === input.value) setDraft("");
  if (!conversations.has(current.id)) {
    conversations.set(current.id, current);
    history.replaceState(null, "", `#${current.id}`);
  }
  ask(addTurn(current, path(current).at(-1)?.id ?? ROOT, "user", text.trim()));
}

/** Asks for an answer to a turn in place of one being written: a new one, or again into one that failed. */
async function ask(question, answer = null) {
  const conversation = current;
  stop();
  answer ??= addTurn(conversation, question.id, "assistant", "");
  Object.assign(answer, { status: "writing", error: undefined, reasoning: undefined, first: undefined });
  const controller = new AbortController();
  running.set(conversation.id, controller);
  thread.pinned = true;
  changed(conversation);
  if (!byTouch()) input.focus();
  announce("Writing the answer");
  try {
    await write(conversation, question, answer, controller.signal);
  } catch (error) {
    fail(answer, error);
  }
  if (running.get(conversation.id) === controller) running.delete(conversation.id);
  conversation.updated = Date.now();
  changed(conversation);
  if (conversation === current) announce(answer.error?.title ?? `The answer: ${answer.text}`);
  if (answer.error?.status === 401) askForKey(() => conversation === current && ask(question, answer), answer.error);
}

/** Fills in an answer as it arrives. Throws ApiError, or AbortError when it is stopped. */
async function write(conversation, question, answer, signal) {
  if (!models.length) await loadModels();
  const values = conversation.settings;
  answer.model = model(values)?.id;
  const body = { model: answer.model, messages: messages(conversation, question), ...api.sampling(values) };
  const start = performance.now();
  let kept = start;
  for await (const { choices, usage } of api.complete(body, signal)) {
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      answer.usage = { prompt: usage.prompt_tokens, completion: usage.completion_tokens, cached };
    }
    const { delta = {}, finish_reason: reason } = choices?.[0] ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (reason) answer.status = { stop: "done", length: "length" }[reason] ?? "ended";
    if (!delta.content && !thought) continue;
    answer.last = performance.now() - start;
    answer.first ??= answer.last;
    if (thought) answer.reasoning = (answer.reasoning ?? "") + thought;
    if (delta.content) answer.text += delta.content;
    if (conversation === current) thread.paintSoon(answer);
    if (performance.now() - kept > 1000) {
      kept = performance.now();
      keep(conversation);
    }
  }
  if (answer.status === "writing") answer.status = "ended";
}

function fail(answer, error) {
  if (answer.status !== "writing") return; // all of it had come
  if (error.name === "AbortError") {
    answer.status = "stopped";
    return;
  }
  const { title = "Something went wrong on this page", message, status, wait } = error;
  answer.status = "failed";
  answer.error = { title, message, status, until: wait && Date.now() + wait * 1000 };
}

function stop() {
  running.get(current.id)?.abort();
}

// ---------------------------------------- the server

const model = (values) => models.find(({ id }) => id === values.model) ?? models[0];

async function loadModels() {
  models = await api.models();
  byId("model").replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
  byId("unreachable").hidden = true;
  showState();
}

async function connect() {
  try {
    await loadModels();
  } catch (error) {
    byId("unreachable-title").textContent = error.title ?? "The server cannot be used";
    byId("unreachable-text").textContent = error.message;
    byId("unreachable").hidden = false;
    if (error.status === 401) askForKey(connect, error);
    else setTimeout(() => models.length || connect(), 5000); // it may be starting
  }
}

function askForKey(then, refusal = null) {
  const about = `${refusal ? `The server says: ${refusal.message}. ` : ""}The key is kept in this browser only.`;
  prompt({ title: "API key", about, value: setting("key"), secret: true }, (key) => {
    setting("key", key);
    then();
  });
}

// ---------------------------------------- conversations

/** Opens what the address names: a conversation, or a new one. */
function open() {
  const id = location.hash.slice(1);
  const found = conversations.get(id);
  if (id && !found) history.replaceState(null, "", location.pathname + location.search);
  current = found ?? newConversation(lastValues());
  for (const turn of Object.values(current.turns)) { // a page that was closed while it wrote
    if (turn.status === "writing" && !running.has(current.id)) turn.status = "stopped";
  }
  thread.show(current);
  showFields(current.settings);
  input.value = setting(draftName(), undefined, "sessionStorage");
  fit(input);
  showSidebar(byId("sidebar").hidden ? false : wide());
  showConversations();
  showState();
  if (!byTouch()) input.focus();
}

function startNew() {
  if (location.hash) location.hash = "";
  else open();
}

/** After a conversation changed: keeps it and shows it. */
function changed(conversation) {
  keep(conversation);
  if (conversation === current) {
    thread.show(conversation);
    showState();
  }
  showConversations();
}

async function keep(conversation) {
  if (!conversations.has(conversation.id)) return;
  if (!(await store.save(conversation))) toast("This browser could not keep the conversation: is its storage full?");
}

function rename(conversation) {
  prompt({ title: "Rename", value: conversation.title }, (title) => {
    conversation.title = title;
    changed(conversation);
  });
}

function remove(conversation) {
  running.get(conversation.id)?.abort();
  conversations.delete(conversation.id);
  store.remove(conversation.id);
  if (conversation === current) startNew();
  showConversations();
  toast(`Deleted “${conversation.title}”.`, "Undo", () => {
    conversations.set(conversation.id, conversation);
    keep(conversation);
    location.hash = conversation.id;
    showConversations();
  });
}

async function importFile(file) {
  let found;
  try {
    found = fromJson(await file.text());
  } catch (error) {
    toast(`Nothing was imported: ${error.message}.`);
    return;
  }
  for (const conversation of found) {
    if (conversations.has(conversation.id)) conversation.id = newId(); // beside the one that is here, not over it
    conversations.set(conversation.id, conversation);
    keep(conversation);
  }
  showConversations();
  toast(`Imported ${found.length === 1 ? "one conversation" : `${found.length} conversations`}.`);
}

const saveJson = (list, name) => download(fileName(name, "json"), toJson(list), "application/json");

/** Takes over what another tab did, unless this one is writing there. */
async function fromOtherTab(id) {
  if (running.has(id)) return;
  const found = await store.get(id);
  if (found) conversations.set(id, found);
  else conversations.delete(id);
  if (current.id === id && found) {
    current = found;
    thread.show(current);
    showState();
  }
  showConversations();
}

// ---------------------------------------- what is shown around the thread

function showConversations() {
  const query = byId("search").value;
  showList(conversations.values(), { query, current: current.id, running, openMenu: menu });
}

function showState() {
  const turns = path(current);
  const chosen = model(current.settings);
  const name = chosen?.id ?? "";
  const writing = running.has(current.id);
  byId("title").textContent = current.title || "New chat";
  document.title = [current.title, name || "Chat"].filter(Boolean).join(" · ");
  byId("welcome").hidden = turns.length > 0;
  byId("welcome-model").textContent = name || "…";
  byId("model").value = name;
  byId("model-name").textContent = name;
  byId("model-name").hidden = models.length !== 1;
  byId("model").hidden = models.length < 2;
  byId("more").hidden = !conversations.has(current.id);
  byId("open-settings").classList.toggle("set", anySet(current.settings));
  byId("send").hidden = writing;
  byId("stop").hidden = !writing;
  showContext(turns, chosen?.max_model_len);
  showSend();
}

function showContext(turns, limit) {
  const usage = turns.findLast((turn) => turn.usage)?.usage;
  const box = byId("context");
  box.hidden = !usage;
  if (!usage) return;
  const used = usage.prompt + usage.completion;
  const of = limit ? ` of ${limit.toLocaleString("en")}` : "";
  byId("context-text").textContent = `${used.toLocaleString("en")}${of} tokens`;
  byId("context-bar").hidden = !limit;
  byId("context-bar").max = limit ?? 1;
  byId("context-bar").value = used;
  box.classList.toggle("full", used > 0.9 * limit);
}

function showSend() {
  byId("send").disabled = !input.value.trim();
}

const wide = () => matchMedia("(min-width: 800px)").matches;

function showSidebar(shown) {
  byId("sidebar").hidden = !shown;
  byId("backdrop").hidden = !shown || wide();
  document.querySelector("main").inert = shown && !wide();
  byId("toggle-sidebar").setAttribute("aria-expanded", shown);
}

function menu(conversation, button) {
  const { title } = conversation;
  const markdown = () => download(fileName(title, "md"), toMarkdown(conversation), "text/markdown");
  openMenu(button, [
    ["Rename", () => rename(conversation)],
    ["Export as Markdown", markdown],
    ["Export as JSON", () => saveJson([conversation], title)],
    ["Delete", () => remove(conversation)],
  ]);
}

/** Where what is typed and not sent is kept, over a reload and while other conversations are looked at. */
const draftName = () => `draft-${conversations.has(current.id) ? current.id : "new"}`;

function setDraft(text) {
  if (input.value !== text) input.value = text;
  setting(draftName(), text, "sessionStorage");
  fit(input);
  showSend();
}

// ---------------------------------------- keys and buttons

function searchConversations() {
  showSidebar(true);
  byId("search").focus();
  byId("search").select();
}

function onKey(event) {
  if (composing(event) || document.querySelector("dialog[open], :popover-open")) return;
  const typing = event.target.closest?.("input, textarea, select");
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  const does = {
    search: (control && !event.shiftKey && key === "k") || (key === "/" && !typing && !control),
    fresh: control && event.shiftKey && key === "o",
    help: key === "?" && !typing,
    escape: key === "escape",
  };
  const action = Object.keys(does).find((name) => does[name]);
  if (!action) return;
  event.preventDefault();
  if (action === "search") searchConversations();
  else if (action === "fresh") startNew();
  else if (action === "help") byId("help").showModal();
  else if (!byId("backdrop").hidden) showSidebar(false);
  else if (event.target === byId("search")) leaveSearch();
  else stop();
}

function leaveSearch() {
  byId("search").value = "";
  showConversations();
  input.focus();
}

function onInputKey(event) {
  if (composing(event)) return;
  if (event.key === "Enter" && !event.shiftKey && !byTouch()) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !input.value && !running.has(current.id) && thread.editLast()) {
    event.preventDefault();
  }
}

function onSearchKey(event) {
  const first = byId("conversations").querySelector("a");
  if (!first || composing(event) || !["Enter", "ArrowDown"].includes(event.key)) return;
  event.preventDefault();
  if (event.key === "Enter") first.click();
  else first.focus();
}

function onListKey(event) {
  const links = [...byId("conversations").querySelectorAll("a")];
  const at = links.indexOf(document.activeElement) + { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (Number.isNaN(at)) return;
  event.preventDefault();
  (links[at] ?? byId("search")).focus();
}

function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  if (theme === system) delete root.dataset.theme; // back to following the system
  else root.dataset.theme = theme;
  setting("theme", root.dataset.theme ?? "");
}

function setValue(name, value) {
  if (value === null || value === "") delete current.settings[name];
  else current.settings[name] = value;
  setting("settings", JSON.stringify(current.settings));
  showState();
}

function resetValues() {
  current.settings = {};
  setting("settings", "");
  showFields(current.settings);
  showState();
}

function listen() {
  const clicks = {
    send: () => send(),
    stop,
    "new-chat": startNew,
    "new-chat-top": startNew,
    "toggle-sidebar": () => showSidebar(byId("sidebar").hidden),
    backdrop: () => showSidebar(false),
    more: () => menu(current, byId("more")),
    "open-settings": () => byId("settings").showModal(),
    "open-help": () => byId("help").showModal(),
    "set-key": () => askForKey(connect),
    "reset-settings": resetValues,
    "switch-theme": switchTheme,
    "export-all": () => saveJson([...conversations.values()], "conversations"),
    import: () => byId("file").click(),
    reconnect: connect,
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest(".close")) dialog.close();
    });
  }
  byId("prompts").append(...PROMPTS.map((text) => h("button", { type: "button", onclick: () => send(text) }, text)));
  byId("file").addEventListener("change", async (event) => {
    if (event.target.files[0]) await importFile(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("search").addEventListener("input", showConversations);
  byId("search").addEventListener("keydown", onSearchKey);
  byId("conversations").addEventListener("keydown", onListKey);
  byId("system").addEventListener("input", () => setValue("system", byId("system").value));
  byId("settings").addEventListener("close", () => keep(current));
  byId("model").addEventListener("change", () => {
    setValue("model", byId("model").value);
    keep(current);
  });
  byId("conversations").addEventListener("click", (event) => {
    if (event.target.closest("a") && !wide()) showSidebar(false);
  });
  input.addEventListener("input", () => setDraft(input.value));
  input.addEventListener("keydown", onInputKey);
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", open);
  addEventListener("pagehide", () => running.forEach((_, id) => keep(conversations.get(id))));
  matchMedia("(min-width: 800px)").addEventListener("change", () => showSidebar(wide()));
}

async function begin() {
  buildFields(setValue);
  listen();
  showSidebar(wide());
  const kept = await store.open();
  for (const conversation of kept ?? []) conversations.set(conversation.id, conversation);
  if (!kept) toast("This browser keeps nothing for this page: export what you want to keep.");
  store.onChange(fromOtherTab);
  open();
  await connect();
}

begin();
