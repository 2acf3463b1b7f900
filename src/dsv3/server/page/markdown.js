// Markdown to DOM nodes while it arrives.
//
// The text is cut into top-level blocks. All but the last are finished: they are put in the page once and not
// looked at again. The last one is read anew whenever text comes, and compared with what the page shows of it, so
// that only what differs is touched: words are appended to a paragraph, a row to a table. Nothing flickers, and a
// selection stays. While more may come, marks that are opened and not yet closed (**bold, `code) count as
// closed at the end, and a last line of marks alone (---, ``, |--) waits for what it will become.
//
// Text never becomes HTML: nodes are built from a fixed set of tags, and links go to http, https and mailto only.
// Beyond CommonMark: tables, ~~strikethrough~~, bare links; line breaks are kept (poems, dialogues), formulas
// are shown as they are written, a list nests from two spaces on, and --- is always a rule.
//
// A text may be anything, so all of this takes time in proportion to its length: patterns have neither neighbours that
// match the same characters nor loops without a bound where many places may begin a match, and what was looked for
// in vain is not looked for again.

import { copy, h, iconButton } from "./dom.js";
import { highlight } from "./highlight.js";

const LINE_ENDS = /\r\n?|[\u2028\u2029]/g; // the others: after it, `.` is any character of a line
const FENCE = /^( *)(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const FENCE_END = /^ *(`+|~+)\s*$/;
const HEADING = /^ {0,3}(#{1,6})(?![^ \t])(.*)$/;
const RULE = /^ {0,3}(?:-[ \t]*-[ \t]*-[- \t]*|\*[ \t]*\*[ \t]*\*[* \t]*|_[ \t]*_[ \t]*_[_ \t]*)$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|\s*)$/;
const INTERRUPTING_ITEM = /^ {0,3}(?:[-*+]|1[.)]) +\S/;
const DELIMITER = /^:?-+:?$/;
const FORMULA = /^ *(?:\\\[|\$\$)/;
const ONLY_MARKS = /^[ \t]*(?:[-*_#`~>+|:=][-*_#`~>+|:= \t]*|\d{1,9}[.)]?[ \t]*)$/;

const MAX_DEPTH = 12; // of nesting; deeper marks stay as they are written
const MAX_FORMULA = 200; // lines
const MAX_BACKTICKS = 32; // around code
const MAX_LANGUAGE = 40; // characters
const SPECIAL = /[\\`*_~[!<$]|https?:\/\//g;
const WORD = /[\p{L}\p{N}]/u;
const RUN = /`+|\*+|_+|~+|[^]/y; // of marks
const RUNS = /\\[^]|`+[^`]*`+|\*+|_+|~+/g; // of marks, past escapes and code

const node = (tag, kids = [], attributes = {}) => ({ tag, kids, attributes });
const leaf = (text) => ({ text });

/** Shows a text that grows as Markdown in an element. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.done = 0; // how many characters belong to finished blocks
    this.shown = []; // nodes of the block that may still change
  }

  /** Shows `text`, which begins with what was shown before. `open`: more of it may come. */
  update(text, open) {
    text = text.replace(LINE_ENDS, "\n");
    if (open) {
      const line = text.lastIndexOf("\n") + 1;
      if (ONLY_MARKS.test(text.slice(line))) text = text.slice(0, line);
    }
    const lines = text.slice(this.done).split("\n");
    const nodes = parseBlocks(lines, open);
    patch(this.root, this.shown, nodes);
    this.shown = nodes;
    const last = nodes.at(-1);
    if (nodes.length > 1 && last.line < lines.length - 1) { // its first line is whole, so it stays a new block
      this.done += lines.slice(0, last.line).reduce((sum, line) => sum + line.length + 1, 0);
      this.shown = [last];
    }
  }
}

// ---------------------------------------- blocks: each rule takes lines from `at` on and gives [node, next line]

const RULES = [fence, heading, rule, quote, list, table, formula, paragraph];

function parseBlocks(lines, open, depth = 0) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    let found = null;
    for (const take of depth < MAX_DEPTH ? RULES : [paragraph]) {
      found = take(lines, at, open, depth);
      if (found) break;
    }
    nodes.push({ ...found[0], line: at });
    at = found[1];
  }
  return nodes;
}

const interrupts = (line) =>
  [FENCE, HEADING, RULE, QUOTE, INTERRUPTING_ITEM, FORMULA].some((pattern) => pattern.test(line));

function fence(lines, at) {
  const match = FENCE.exec(lines[at]);
  if (!match) return null;
  const [, indent, mark, info] = match;
  const closes = (line) => FENCE_END.exec(line)?.[1].startsWith(mark);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => unindent(line, indent.length));
  const language = info.trim().split(/[\s{]/, 1)[0].slice(0, MAX_LANGUAGE);
  return [{ code: code.join("\n"), language }, end + 1];
}

function heading(lines, at) {
  const match = HEADING.exec(lines[at]);
  if (!match) return null;
  const text = match[2].trim();
  let end = text.length; // before the marks that close it, if it has some
  while (text[end - 1] === "#") end -= 1;
  const closed = end === 0 || " \t".includes(text[end - 1]);
  return [node(`h${match[1].length}`, inline(closed ? text.slice(0, end).trimEnd() : text, false)), at + 1];
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [node("hr"), at + 1] : null;
}

function quote(lines, at, open, depth) {
  if (!QUOTE.test(lines[at])) return null;
  const inner = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    if (!QUOTE.test(line) && (!line.trim() || interrupts(line) || !inner.at(-1).trim())) break;
    inner.push(line.replace(QUOTE, ""));
    end += 1;
  }
  return [node("blockquote", parseBlocks(inner, open && end >= lines.length - 1, depth + 1)), end];
}

function list(lines, at, open, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const kind = first[2].at(-1); // -, *, +, . or ): another one begins another list
  const base = first[1].length;
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== kind || match[1].length >= base + 2 || RULE.test(lines[end])) break;
    const width = match[1].length + match[2].length + (match[3]?.length < 5 ? match[3].length : 1);
    const inner = [match[4] ?? ""];
    let strip = null; // how far the item's other lines are indented
    let blanks = 0;
    for (end += 1; end < lines.length; end += 1) {
      const line = lines[end].replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
      const indent = line.length - line.trimStart().length;
      if (!line.trim()) {
        blanks += 1;
        continue;
      }
      const deeper = indent >= Math.min(width, base + 2);
      if (!deeper && (blanks || interrupts(line) || ITEM.test(line))) break;
      loose ||= blanks > 0;
      if (deeper) strip ??= Math.min(indent, width);
      for (; blanks; blanks -= 1) inner.push("");
      inner.push(unindent(line, strip ?? 0));
    }
    const more = end < lines.length;
    if (blanks && more && ITEM.exec(lines[end])?.[2].at(-1) === kind) loose = true;
    items.push(node("li", parseBlocks(inner, open && !more, depth + 1)));
  }
  const start = Number.parseInt(first[2], 10);
  const attributes = { class: loose ? "loose" : null, start: start >= 0 && start !== 1 ? start : null };
  return [node(start >= 0 ? "ol" : "ul", items.map(task), attributes), end];
}

/** Draws the box of a list item that begins with [ ] or [x]. */
function task(item) {
  const text = item.kids[0]?.kids?.[0];
  const box = text?.text && /^\[([ xX])\]\s/.exec(text.text);
  if (box) text.text = (box[1] === " " ? "☐ " : "☑ ") + text.text.slice(box[0].length);
  return item;
}

function table(lines, at, open) {
  const header = lines[at];
  const next = lines[at + 1];
  const whole = beginsTable(lines, at);
  const arriving = open && header.trim().startsWith("|") && !next?.trim() && at + 2 >= lines.length;
  if (!whole && !arriving) return null;
  const align = whole ? cells(next).map(alignment) : [];
  const row = (tag, line) =>
    node("tr", cells(line).map((cell, i) => node(tag, inline(cell, false), { class: align[i] })));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end])) {
    rows.push(row("td", lines[end]));
    end += 1;
  }
  const parts = [node("thead", [row("th", header)])];
  if (rows.length) parts.push(node("tbody", rows));
  return [node("div", [node("table", parts)], { class: "table" }), end];
}

function beginsTable(lines, at) {
  const next = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !next.includes("|") || !/^[-:| ]+$/.test(next)) return false;
  return cells(next).every((cell) => DELIMITER.test(cell));
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const found = [];
  let start = 0;
  for (const { 0: mark, index } of inner.matchAll(/\\\||`[^`]*`|\|/g)) { // past escapes and code
    if (mark !== "|") continue;
    found.push(inner.slice(start, index));
    start = index + 1;
  }
  found.push(inner.slice(start));
  return found.map((cell) => cell.replaceAll("\\|", "|").trim());
}

function alignment(delimiter) {
  if (!delimiter.endsWith(":")) return null;
  return delimiter.startsWith(":") ? "center" : "right";
}

function formula(lines, at, open) {
  if (!FORMULA.test(lines[at])) return null;
  const close = lines[at].trim().startsWith("$$") ? "$$" : "\\]";
  let end = at;
  while (end < lines.length && !lines[end].slice(end === at ? lines[at].search(/\S/) + 2 : 0).includes(close)) {
    const arriving = open && end === lines.length - 1;
    if ((!lines[end].trim() && !arriving) || end - at > MAX_FORMULA) return null;
    end += 1;
  }
  return [node("p", [leaf(lines.slice(at, end + 1).join("\n"))], { class: "math" }), end + 1];
}

function paragraph(lines, at, open, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end])) {
    if (beginsTable(lines, end)) break;
    end += 1;
  }
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [node("p", inline(text, open && end >= lines.length - 1, depth)), end];
}

function unindent(line, width) {
  const indent = line.length - line.trimStart().length;
  return line.slice(Math.min(indent, width));
}

// ---------------------------------------- inline: each rule stands at a special character

const formulaSpan = ([all]) => node("span", [leaf(all)], { class: "math" });
const SPANS = [ // [pattern, (match, depth) => node]
  [/\\\([^]{1,2000}?\\\)|\\\[[^]{1,2000}?\\\]|\$\$[^$]{1,2000}\$\$/y, formulaSpan],
  [/\\([!-/:-@[-`{-~])/y, ([, character]) => leaf(character)],
  [/<br ?\/?>/iy, () => node("br")],
  [/<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y, ([, url]) => link(url, [leaf(url)])],
  [/https?:\/\/[^\s<>"`]{0,2000}[^\s<>"`'.,;:!?*_~)\]]/y, ([url]) => link(url, [leaf(url)])],
  [
    /!?\[((?:[^[\]\\]|\\.|\[[^[\]]{0,200}\]){0,500})\]\(\s{0,9}(?!\s)<?((?:[^\s()<>]|\([^\s()]{0,500}\)){0,2000})>?(?:\s{1,9}["'(][^\n]{0,500}?["')])?\s{0,9}\)/y,
    ([, label, url], depth) => link(url, inline(label || url, false, depth + 1)),
  ],
];
const LINK_ARRIVING = /!?\[([^[\]\n]{0,500})\]\([^()\s]*$/y;

/** Nodes of a text's marks. `open`: more text may come, so what is open at its end is taken as closed there. */
function inline(text, open, depth = 0) {
  if (depth > MAX_DEPTH) return [leaf(text)];
  const nodes = [];
  const unclosed = new Set(); // marks that nothing closes from here on
  const lastLine = open ? text.lastIndexOf("\n") + 1 : text.length; // marks may still be closed in it
  let plain = "";
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const found = span(text, at, open, depth, unclosed, lastLine);
    if (found) {
      if (plain) nodes.push(leaf(plain));
      plain = "";
      if (found.node) nodes.push(found.node);
      at = found.end;
    } else {
      const run = runAt(text, at);
      plain += run;
      at += run.length;
    }
  }
  if (plain) nodes.push(leaf(plain));
  return nodes;
}

function runAt(text, at) {
  RUN.lastIndex = at;
  return RUN.exec(text)[0];
}

function span(text, at, open, depth, unclosed, lastLine) {
  for (const [pattern, make] of SPANS) {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) return { node: make(match, depth), end: at + match[0].length };
  }
  LINK_ARRIVING.lastIndex = at;
  const arriving = open && LINK_ARRIVING.exec(text);
  if (arriving) return { node: leaf(arriving[1]), end: text.length };
  if (text[at] === "`") return codeSpan(text, at, open, unclosed);
  return "*_~".includes(text[at]) ? emphasis(text, at, open, depth, unclosed, lastLine) : null;
}

function codeSpan(text, at, open, unclosed) {
  const run = runAt(text, at);
  if (run.length > MAX_BACKTICKS) return null;
  const start = at + run.length;
  let end = unclosed.has(run) ? -1 : start;
  while (end >= 0) { // a run of just as many
    end = text.indexOf(run, end);
    if (end < 0) break;
    const { length } = runAt(text, end);
    if (length === run.length) break;
    end += length;
  }
  if (end < 0) {
    unclosed.add(run);
    if (!open) return null;
  }
  let inner = text.slice(start, end < 0 ? text.length : end).replaceAll("\n", " ");
  if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim()) inner = inner.slice(1, -1);
  return { node: inner ? node("code", [leaf(inner)]) : null, end: end < 0 ? text.length : end + run.length };
}

const EMPHASIS = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], "~~": ["del"] };

function emphasis(text, at, open, depth, unclosed, lastLine) {
  const run = runAt(text, at);
  const start = at + run.length;
  if (open && start === text.length) return { node: null, end: start }; // what it marks has yet to come
  const tags = EMPHASIS[run];
  if (!tags || /\s/.test(text[start] ?? " ") || (run[0] === "_" && WORD.test(text[at - 1] ?? ""))) return null;
  let end = unclosed.has(run) ? -1 : closing(text, start, run);
  if (end < 0) {
    unclosed.add(run);
    if (!open || start < lastLine) return null;
    end = text.length;
  }
  const kids = inline(text.slice(start, end), open && end === text.length, depth + 1);
  return { node: tags.reduceRight((inner, tag) => [node(tag, inner)], kids)[0], end: end + run.length };
}

function closing(text, start, run) {
  RUNS.lastIndex = start;
  for (let match = RUNS.exec(text); match; match = RUNS.exec(text)) {
    const [found] = match;
    const end = match.index + found.length;
    const closes = found.length === run.length || found.length >= 3;
    if (found[0] !== run[0] || !closes || /\s/.test(text[match.index - 1])) continue;
    if (run[0] === "_" && WORD.test(text[end] ?? "")) continue;
    return end - run.length;
  }
  return -1;
}

/** A link where it is one that may be followed, else its words alone. */
function link(url, kids) {
  let protocol = "";
  try {
    ({ protocol } = new URL(url));
  } catch {
    // Not an absolute address.
  }
  if (!["http:", "https:", "mailto:"].includes(protocol)) return node("span", kids);
  return node("a", kids, { href: url, target: "_blank", rel: "noopener noreferrer" });
}

// ---------------------------------------- to the page

/** Makes `parent` show `after` where it shows `before`, touching only what differs. */
function patch(parent, before, after) {
  after.forEach((next, i) => {
    const old = before[i];
    if (old && alike(old, next)) {
      next.dom = old.dom;
      for (const name of ["class", "href", "start"]) setAttribute(next, old, name);
      if (next.text !== undefined) setText(next.dom, old.text, next.text);
      else if (next.code !== undefined) (next.block = old.block).update(next.code);
      else patch(next.dom, old.kids, next.kids);
      return;
    }
    if (next.text !== undefined) next.dom = document.createTextNode(next.text);
    else if (next.code !== undefined) {
      next.block = new CodeBlock(next.language);
      next.block.update(next.code);
      next.dom = next.block.dom;
    } else {
      next.dom = h(next.tag, next.attributes);
      patch(next.dom, [], next.kids);
    }
    if (old) old.dom.replaceWith(next.dom);
    else parent.append(next.dom);
  });
  for (const old of before.slice(after.length)) old.dom.remove();
}

const alike = (a, b) =>
  a.tag === b.tag && a.language === b.language && (a.text === undefined) === (b.text === undefined);

function setAttribute(next, old, name) {
  const value = next.attributes?.[name] ?? null;
  if (value === (old.attributes?.[name] ?? null)) return;
  if (value === null) next.dom.removeAttribute(name);
  else next.dom.setAttribute(name, value);
}

function setText(dom, old, text) {
  if (text === old) return;
  if (text.startsWith(old)) dom.appendData(text.slice(old.length));
  else dom.data = text;
}

/** Code with its language, a copy button and colours. Whole lines are coloured once; the last one while it grows. */
class CodeBlock {
  constructor(language) {
    this.language = language;
    this.last = h("span"); // the line that may still grow
    this.lines = h("code");
    const button = iconButton("copy", "Copy code", () => copy(this.code, button));
    const caption = h("figcaption", {}, h("span", {}, language || "text"), button);
    this.dom = h("figure", { class: "code" }, caption, h("pre", { tabindex: "0" }, this.lines));
    this.begin();
  }

  begin() {
    this.code = "";
    this.whole = 0; // how many characters are in whole lines
    this.inside = ""; // what the last line begins inside of
    this.lines.replaceChildren(this.last);
  }

  update(code) {
    if (code === this.code) return;
    if (!code.startsWith(this.code)) this.begin();
    this.code = code;
    const lines = code.slice(this.whole).split("\n");
    const last = lines.pop();
    for (const line of lines) {
      const [pieces, inside] = highlight(line, this.language, this.inside);
      this.last.before(...pieces.map(coloured), "\n");
      this.inside = inside;
      this.whole += line.length + 1;
    }
    this.last.replaceChildren(...highlight(last, this.language, this.inside)[0].map(coloured));
  }
}

const coloured = ([kind, text]) => (kind ? h("span", { class: kind }, text) : text);
