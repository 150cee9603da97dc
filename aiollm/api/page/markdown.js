// Markdown as it streams in. Text becomes blocks, blocks become elements; only blocks that may still change are built
// again. Model output is never parsed as HTML: every piece ends in a text node.

import { copyButton, el } from "./dom.js";

const DEPTH = 12; // of quotes, lists and emphasis within each other; what lies deeper stays plain text
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|$)/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** Renders into `container`; `push` more text as it comes. */
export class Markdown {
  constructor(container) {
    this.container = container;
    this.open = ""; // the source of the blocks that may still change
    this.live = []; // what they look like: { block, node }
  }

  push(text) {
    this.open += text;
    const lines = this.open.split("\n");
    const blocks = parse(lines);
    // The last line is not whole: "2" may become "2. the next item". A block is settled once another one has begun on
    // a line that is whole.
    let settled = 0;
    while (settled + 1 < blocks.length && blocks[settled + 1].first < lines.length - 1) settled++;
    blocks.forEach((block, index) => this.#show(block, index));
    for (const { node } of this.live.splice(blocks.length)) node.remove();
    if (settled > 0) {
      this.live.splice(0, settled);
      this.open = lines.slice(blocks[settled].first).join("\n");
    }
  }

  #show(block, index) {
    const shown = this.live[index];
    if (shown && shown.block.kind === "code" && block.kind === "code" && shown.block.language === block.language) {
      const code = shown.node.querySelector("code"); // the element stays, and with it the focus and the scroll position
      if (code.textContent !== block.text) code.textContent = block.text;
      shown.block = block;
      return;
    }
    const node = render(block, 0);
    if (shown) shown.node.replaceWith(node);
    else this.container.append(node);
    this.live[index] = { block, node };
  }
}

/** Blocks of lines, in order: { kind, first, ... }, `first` being the index of a block's first line. */
export function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const first = at;
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const close = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}[ \\t]*$`);
      while (++at < lines.length && !close.test(lines[at]));
      blocks.push({ kind: "code", first, language: match[2].trim().split(/\s/)[0], text: lines.slice(first + 1, at).join("\n") });
      at++;
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ kind: "heading", first, level: match[1].length, text: match[2] ?? "" });
      at++;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", first });
      at++;
    } else if (depth < DEPTH && QUOTE.test(line)) {
      while (at < lines.length && (QUOTE.test(lines[at]) || (lines[at].trim() && !starts(lines, at)))) at++;
      const inner = lines.slice(first, at).map((quoted) => quoted.replace(QUOTE, ""));
      blocks.push({ kind: "quote", first, blocks: parse(inner, depth + 1) });
    } else if (depth < DEPTH && ITEM.test(line)) {
      const [list, end] = parseList(lines, at, depth);
      blocks.push(list);
      at = end;
    } else if (isTable(lines, at)) {
      at += 2;
      while (at < lines.length && lines[at].trim() && !starts(lines, at)) at++;
      const [head, delimiters, ...rows] = lines.slice(first, at).map(cells);
      const sides = delimiters.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
      blocks.push({ kind: "table", first, head, sides, rows });
    } else {
      at++;
      while (at < lines.length && lines[at].trim() && !starts(lines, at)) at++;
      blocks.push({ kind: "paragraph", first, text: lines.slice(first, at).join("\n") });
    }
  }
  return blocks;
}

/** Whether a line ends the paragraph before it. */
function starts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, at) ||
    (item !== null && item[4] !== undefined && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1));
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITER.test(lines[at + 1]) &&
    cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** The list that begins at a line, and the index of the line after it. */
function parseList(lines, at, depth) {
  const first = at;
  const marker = ITEM.exec(lines[at])[2];
  const kind = marker.at(-1);
  const items = [];
  let loose = false;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[2].at(-1) !== kind || RULE.test(lines[at])) break;
    const space = match[3] ?? " ";
    const width = match[1].length + match[2].length + (space.length > 4 ? 1 : space.length);
    const inner = [match[4] ?? ""];
    let blank = false;
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const indent = line.search(/\S/);
      if (indent < 0) {
        blank = true;
        inner.push("");
      } else if (indent >= Math.min(width, match[1].length + 2) && indent > 0) {
        loose ||= blank && indent < width + 2 && !ITEM.test(line.slice(Math.min(indent, width)));
        blank = false;
        inner.push(line.slice(Math.min(indent, width)));
      } else if (!blank && !starts(lines, at) && !ITEM.test(line)) {
        inner.push(line);
      } else {
        break;
      }
    }
    while (inner.length > 1 && !inner.at(-1)) inner.pop();
    items.push(parse(inner, depth + 1));
  }
  const start = /\d/.test(marker) ? parseInt(marker, 10) : null;
  return [{ kind: "list", first, start, loose, items }, at];
}

function render(block, depth) {
  switch (block.kind) {
    case "code": return renderCode(block);
    case "heading": return inline(el(`h${Math.min(6, block.level + 1)}`, { className: `h${block.level}` }), block.text);
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...block.blocks.map((inner) => render(inner, depth + 1)));
    case "list": return renderList(block, depth);
    case "table": return renderTable(block);
    default: return inline(el("p"), block.text);
  }
}

function renderCode({ language, text }) {
  const code = el("code", { textContent: text });
  const label = language.slice(0, 30) || "text";
  const head = el("figcaption", {}, el("span", { textContent: label }), copyButton(() => code.textContent, "Copy code"));
  return el("figure", { className: "code" }, head, el("pre", { tabIndex: 0, "aria-label": `Code, ${label}`, role: "group" }, code));
}

function renderList({ start, loose, items }, depth) {
  const list = start === null ? el("ul") : el("ol", { start });
  for (const blocks of items) {
    const item = el("li");
    for (const block of blocks) {
      if (block.kind === "paragraph" && !loose) inline(item, block.text);
      else item.append(render(block, depth + 1));
    }
    list.append(item);
  }
  return list;
}

function renderTable({ head, sides, rows }) {
  const row = (tag, texts) => el("tr", {}, ...head.map((_, column) => {
    const scope = tag === "th" ? { scope: "col" } : {};
    return inline(el(tag, { className: sides[column] ?? "left", ...scope }), texts[column] ?? "");
  }));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts))));
  return el("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
}

const TOKEN = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<ticks>`+)(?<code>[^`]|[^`][\s\S]*?[^`])\k<ticks>(?!`)/,
  /!?\[(?<label>(?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\([ \t]*<?(?<target>[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:[ \t]+(?:"[^"]*"|'[^']*'))?[ \t]*\)/,
  /<(?<angled>(?:https?:\/\/|mailto:)[^\s<>]+)>/,
  /(?<bare>https?:\/\/[^\s<>"'`*]+)/,
  /\*\*\*(?=\S)(?<both>(?:(?!\*)[\s\S]){0,4000}?[^\s\\*])\*\*\*(?!\*)/,
  /(?<strong>\*\*|__)(?=\S)(?<bold>(?:(?!\k<strong>)[\s\S]){0,4000}?[^\s\\])\k<strong>(?!\k<strong>)/,
  /(?<mark>[*_])(?=\S)(?<slanted>(?:(?!\k<mark>)[\s\S]|\k<mark>\k<mark>(?:(?!\k<mark>)[\s\S])*?\k<mark>\k<mark>){0,4000}?[^\s\\])\k<mark>(?!\k<mark>)/,
  /~~(?=\S)(?<struck>(?:(?!~~)[\s\S]){0,4000}?\S)~~/,
  /(?<broken> *\n|\\\n)/,
].map((part) => part.source).join("|"), "g");

/** Append text with emphasis, code and links to an element; returns the element. */
function inline(parent, text, depth = 0) {
  if (depth >= DEPTH) {
    parent.append(text);
    return parent;
  }
  let end = 0;
  for (const match of text.matchAll(TOKEN)) {
    if (match.index < end) continue;
    const node = inlineNode(match, text, depth);
    if (node === null) continue;
    parent.append(text.slice(end, match.index), node);
    end = match.index + (match.groups.bare ? trimmed(match.groups.bare).length : match[0].length);
  }
  parent.append(text.slice(end));
  return parent;
}

/** What a match stands for; null where it is only text. */
function inlineNode(match, text, depth) {
  const { escaped, code, label, target, angled, bare, both, strong, bold, mark, slanted, struck, broken } = match.groups;
  if (escaped !== undefined) return document.createTextNode(escaped);
  if (code !== undefined) return el("code", { textContent: code.replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " ") });
  if (label !== undefined) return link(target, (parent) => inline(parent, label || target, depth + 1));
  if (angled !== undefined) return link(angled, (parent) => parent.append(angled));
  if (bare !== undefined) return link(trimmed(bare), (parent) => parent.append(trimmed(bare)));
  if (broken !== undefined) return el("br");
  if (both !== undefined) return el("em", {}, inline(el("strong"), both, depth + 1));
  const around = [text[match.index - 1], text[match.index + match[0].length]];
  const inWord = around.some((letter) => letter !== undefined && /[\p{L}\p{N}]/u.test(letter));
  if (bold !== undefined) return strong === "__" && inWord ? null : inline(el("strong"), bold, depth + 1);
  if (slanted !== undefined) return mark === "_" && inWord ? null : inline(el("em"), slanted, depth + 1);
  return inline(el("del"), struck, depth + 1);
}

/** A bare address without the punctuation of the sentence around it. */
function trimmed(address) {
  const bare = address.replace(/[.,;:!?\]}]+$/, "");
  return bare.endsWith(")") && !bare.includes("(") ? bare.slice(0, -1) : bare;
}

/** A link to a whole address with a harmless scheme; null for any other, which then stays text. Images become links. */
function link(target, fill) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!SAFE.has(url.protocol)) return null;
  const anchor = el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
  fill(anchor);
  return anchor;
}
