// Light syntax colouring: comments, strings, numbers, keywords and calls, line by line.
//
// Languages fall into a few families that share how comments and strings are written. A line is coloured by
// itself given `inside`: what must come to end a comment or string that began on an earlier line. So a block
// of code that is still arriving never has to be coloured again from its beginning. Very long lines stay as they are:
// they are data rather than code, and would be elements by the ten thousand.

const LONGEST = 5000; // characters of a line that is coloured

const words = (text) => new Set(text.split(" "));

const C = {
  comment: String.raw`\/\/.*|\/\*`,
  string: "[\"'`]",
  keywords: words(
    "abstract as async await bool boolean break case catch char class const continue default delete do double " +
      "else enum export extends extern false final finally float fn for from func function go if impl implements " +
      "import in instanceof int interface let long loop match mod move mut namespace new nil null of override " +
      "package private protected pub public range return select self short signed sizeof static string struct " +
      "super switch this throw throws trait true try type typedef typeof undefined union unsigned use using var " +
      "virtual void where while yield",
  ),
};
const HASH = {
  comment: String.raw`(?<!\S)#.*`,
  string: `"""|'''|["']`,
  keywords: words(
    "and as assert async await begin break case class continue def del do done elif else end esac except exit " +
      "export False false fi finally for from function global if import in is lambda local match module None nil " +
      "nonlocal not null or pass raise rescue return self then True true try unless until while with yield",
  ),
};
const DASH = {
  comment: String.raw`--.*|\/\*`,
  string: `["']`,
  unescaped: "'",
  keywords: words(
    "all alter and as asc between by case create delete desc distinct do drop else elseif end exists false for " +
      "from function group having if in index inner insert into is join key left like limit local nil not null " +
      "on or order outer primary repeat return right select set table then true union unique until update values " +
      "view when where while with",
  ),
};
const MARKUP = {
  comment: "<!--",
  string: '"',
  unescaped: '"',
  word: String.raw`<\/?[\w:-]+|\/?>`,
  keywords: { has: () => true },
};

const FAMILIES = [
  [C, "c cpp c++ cs csharp css cuda dart go java javascript js json jsonc jsx kotlin"],
  [C, "php rs rust scala scss swift ts tsx typescript"],
  [HASH, "bash conf dockerfile elixir ini julia make makefile perl py python r rb ruby sh shell toml yaml yml zsh"],
  [DASH, "haskell lua sql"],
  [MARKUP, "html svg xml"],
];
const BY_LANGUAGE = new Map(FAMILIES.flatMap(([family, names]) => names.split(" ").map((name) => [name, family])));
const ENDS = { "/*": "*/", "<!--": "-->", '"""': '"""', "'''": "'''", "`": "`" };

for (const family of [C, HASH, DASH, MARKUP]) {
  const { comment, string, word = String.raw`[\p{L}_$][\p{L}\p{N}_$]*` } = family;
  const groups = [`(?<comment>${comment})`, `(?<string>${string})`, String.raw`(?<number>\b\d[\w.]*)`, `(?:${word})`];
  family.pattern = new RegExp(groups.join("|"), "gu");
}

/** Where the string that `quote` began before `at` ends, or -1. */
function closing(line, at, quote, escapes) {
  for (let end = at; end < line.length; end += 1) {
    if (escapes && line[end] === "\\") end += 1;
    else if (line[end] === quote) return end + 1;
  }
  return -1;
}

/** The pieces [kind or null, text] of one line, and what the next one begins inside of ("" for nothing). */
export function highlight(line, language, inside = "") {
  const family = BY_LANGUAGE.get(language.toLowerCase());
  if (!family || line.length > LONGEST) return [[[null, line]], inside];
  const pieces = [];
  const unclosed = new Set(); // quotes that nothing closes from here on
  let at = 0;
  const through = (end, kind) => { // to the end of a comment or string, or of the line
    const found = line.indexOf(end, at);
    const stop = found < 0 ? line.length : found + end.length;
    pieces.push([kind, line.slice(at, stop)]);
    at = stop;
    return found < 0 ? end : "";
  };
  const kindOf = (end) => (end === "*/" || end === "-->" ? "comment" : "string");
  if (inside) inside = through(inside, kindOf(inside));
  while (at < line.length && !inside) {
    family.pattern.lastIndex = at;
    const match = family.pattern.exec(line);
    if (!match) break;
    const [found] = match;
    if (match.index > at) pieces.push([null, line.slice(at, match.index)]);
    at = match.index + found.length;
    const { comment, string, number } = match.groups;
    if (ENDS[found]) {
      pieces.push([kindOf(ENDS[found]), found]);
      inside = through(ENDS[found], kindOf(ENDS[found]));
    } else if (comment) pieces.push(["comment", found]);
    else if (string) {
      const end = unclosed.has(found) ? -1 : closing(line, at, found, found !== family.unescaped);
      if (end < 0) unclosed.add(found);
      pieces.push([end < 0 ? null : "string", line.slice(match.index, Math.max(at, end))]);
      at = Math.max(at, end);
    } else if (number) pieces.push(["number", found]);
    else if (family.keywords.has(family === DASH ? found.toLowerCase() : found)) pieces.push(["keyword", found]);
    else pieces.push([line[at] === "(" ? "call" : null, found]);
  }
  if (at < line.length) pieces.push([null, line.slice(at)]);
  return [pieces, inside];
}
