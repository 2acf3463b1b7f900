// The turns of the open conversation. A turn's element is made once and kept; showing another branch replaces only
// what follows the point where they part. While an answer is written only its text is touched, once per frame.

import { byTouch, composing, copy, fit, h, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { path, siblings } from "./tree.js";

const NEAR = 40; // pixels from the end that still count as the end

export class Thread {
  /** `actions`: choose(id), edit(turn, text), regenerate(turn), retry(turn). */
  constructor(scroller, list, jump, actions) {
    Object.assign(this, { scroller, list, jump, actions, views: new Map(), conversation: null, pinned: true, top: 0 });
    scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(scroller);
    jump.addEventListener("click", () => this.toEnd());
  }

  /** Shows a conversation's chosen branch. */
  show(conversation) {
    if (conversation !== this.conversation) {
      this.views.clear();
      this.list.replaceChildren();
      this.conversation = conversation;
      this.pinned = true;
    }
    const views = path(conversation).map((turn) => this.viewOf(turn));
    const shown = [...this.list.children];
    let same = 0;
    while (same < shown.length && shown[same] === views[same]?.element) same += 1;
    for (const element of shown.slice(same)) element.remove();
    for (const view of views.slice(same)) this.list.append(view.element);
    for (const view of views) view.refresh();
    this.follow();
  }

  viewOf(turn) {
    const Kind = turn.role === "user" ? Question : Answer;
    if (!this.views.has(turn.id)) this.views.set(turn.id, new Kind(turn, this.conversation, this.actions));
    return this.views.get(turn.id);
  }

  /** Shows what came of an answer, before the next frame. */
  paintSoon(turn) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.views.get(turn.id)?.paint();
      this.follow();
    });
  }

  /** Lets a person edit the last turn they wrote. */
  editLast() {
    const last = path(this.conversation).findLast((turn) => turn.role === "user");
    if (last) this.viewOf(last).edit();
    return Boolean(last);
  }

  toEnd() {
    this.pinned = true;
    this.follow();
  }

  /** Keeps the end in view, unless the reader scrolled up. */
  follow() {
    if (this.pinned) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.scrolled();
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const atEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    if (atEnd) this.pinned = true;
    else if (scrollTop < this.top) this.pinned = false; // only readers scroll up
    this.top = scrollTop;
    this.jump.hidden = atEnd || this.pinned;
  }
}

class Question {
  constructor(turn, conversation, actions) {
    Object.assign(this, { turn, conversation, actions });
    this.body = h("div", { class: "bubble" }, turn.text);
    this.tools = h("div", { class: "tools" });
    const attributes = { id: `turn-${turn.id}`, class: "turn question", "aria-label": "You" };
    this.element = h("article", attributes, this.body, this.tools);
  }

  refresh() {
    const copyButton = iconButton("copy", "Copy", () => copy(this.turn.text, copyButton));
    const edit = iconButton("edit", "Edit", () => this.edit());
    const tools = [branches(this.turn, this.conversation, this.actions), copyButton, edit];
    this.tools.replaceChildren(...tools.filter(Boolean));
  }

  edit() {
    if (this.element.querySelector("textarea")) return;
    const area = h("textarea", { "aria-label": "Edit your message", rows: 1, oninput: () => fit(area) });
    const close = () => {
      this.element.classList.remove("editing");
      this.element.replaceChildren(this.body, this.tools);
      document.getElementById("input").focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (!text) return;
      close();
      this.actions.edit(this.turn, text);
    };
    area.value = this.turn.text;
    area.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" && !event.shiftKey && !byTouch()) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    const cancel = h("button", { type: "button", onclick: close }, "Cancel");
    const go = h("button", { type: "button", class: "primary", onclick: send }, "Send");
    this.element.classList.add("editing");
    this.element.replaceChildren(area, h("div", { class: "buttons" }, cancel, go));
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

class Answer {
  constructor(turn, conversation, actions) {
    Object.assign(this, { turn, conversation, actions });
    const thoughts = h("div", { class: "markdown" });
    this.thinking = h("summary");
    this.reasoning = h("details", { class: "reasoning", hidden: true }, this.thinking, thoughts);
    this.body = h("div", { class: "markdown" });
    this.after = h("div", { class: "after" });
    this.text = new MarkdownView(this.body);
    this.thoughts = new MarkdownView(thoughts);
    const attributes = { id: `turn-${turn.id}`, class: "turn answer", "aria-label": "Answer" };
    this.element = h("article", attributes, this.reasoning, this.body, this.after);
  }

  /** Shows the text as far as it has come. */
  paint() {
    const { text, reasoning, status } = this.turn;
    const writing = status === "writing";
    this.element.classList.toggle("waiting", writing && !text && !reasoning);
    this.element.classList.toggle("writing", writing);
    this.reasoning.hidden = !reasoning;
    this.thinking.textContent = writing && !text ? "Thinking…" : "Thoughts";
    if (reasoning) this.thoughts.update(reasoning, writing && !text);
    this.text.update(text, writing);
  }

  /** Shows everything: the text, how it ended, and what can be done. */
  refresh() {
    const { turn, actions } = this;
    const { status } = turn;
    this.element.setAttribute("aria-busy", status === "writing");
    this.paint();
    if (status === "writing") {
      this.after.replaceChildren();
      return;
    }
    const copyButton = iconButton("copy", "Copy answer", () => copy(turn.text, copyButton));
    const again = iconButton("again", "Answer again", () => actions.regenerate(turn));
    const failed = status === "failed";
    const tools = [
      branches(turn, this.conversation, actions),
      turn.text ? copyButton : null,
      failed ? null : again,
      statistics(turn),
    ];
    const ended = failed ? failure(turn, actions) : note(turn);
    this.after.replaceChildren(...[ended, h("div", { class: "tools" }, ...tools)].filter(Boolean));
  }
}

const NOTES = {
  stopped: "Stopped.",
  length: "Cut off: the limit of tokens was reached.",
  ended: "The server ended this answer early.",
};

function note({ status, text }) {
  const words = NOTES[status] ?? (text ? null : "The model answered with nothing.");
  return words && h("p", { class: "note" }, words);
}

function failure(turn, actions) {
  const { title, message, until } = turn.error;
  const retry = h("button", { type: "button", onclick: () => actions.retry(turn) }, "Try again");
  const words = h("p", {}, message);
  const box = h("div", { class: "failure", role: "alert" }, h("strong", {}, title), words, retry);
  const count = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    retry.textContent = seconds > 0 ? `Try again (in ${seconds} s)` : "Try again";
    if (seconds > 0) setTimeout(() => box.isConnected && count(), 500);
  };
  if (until) setTimeout(count);
  return box;
}

/** "< 2/3 >" where a turn has siblings. */
function branches(turn, conversation, actions) {
  const ids = siblings(conversation, turn);
  if (ids.length < 2) return null;
  const at = ids.indexOf(turn.id);
  const step = (name, label, to) => {
    const button = iconButton(name, label, () => {
      actions.choose(ids[to]);
      document.querySelector(`#turn-${ids[to]} .branches button:enabled`)?.focus();
    });
    button.disabled = !ids[to];
    return button;
  };
  const place = h("span", { "aria-label": `Version ${at + 1} of ${ids.length}` }, `${at + 1}/${ids.length}`);
  const [earlier, later] = [step("left", "Earlier version", at - 1), step("right", "Later version", at + 1)];
  return h("span", { class: "branches" }, earlier, place, later);
}

/** How fast an answer came. The first token is waited for, the others follow: so their speed counts from the first. */
function statistics({ usage, first, last }) {
  if (!usage || !(first >= 0)) return null;
  const parts = [`${usage.completion.toLocaleString("en")} tokens`, `first after ${seconds(first)}`];
  if (usage.completion > 1 && last > first) {
    const speed = ((usage.completion - 1) / (last - first)) * 1000;
    parts.unshift(`${speed < 10 ? speed.toFixed(1) : Math.round(speed).toLocaleString("en")} tokens/s`);
  }
  const cached = usage.cached ? `, ${usage.cached.toLocaleString("en")} of them from the cache` : "";
  const title = `${usage.prompt.toLocaleString("en")} tokens read${cached}`;
  return h("span", { class: "statistics", title }, parts.join(" · "));
}

const seconds = (ms) => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
