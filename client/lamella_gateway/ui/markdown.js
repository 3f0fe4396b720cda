// The little Markdown that answers hold, as elements: code, lists, headings, emphasis. Links and images stay text, and
// so does everything else: what is not understood is shown as it was written.

import { element } from "./dom.js";

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.+?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const MOST_LEVELS = 6; // of lists within lists
const MOST_INLINE = 20000; // characters of one paragraph that are looked at for emphasis and code
const INLINE = /(`+)([^`](?:.*?[^`])?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*/g;

/** Return the elements of a text. */
export function markdown(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const take = fence(lines, at) ?? heading(lines, at) ?? list(lines, at) ?? paragraph(lines, at);
    if (take.block) blocks.push(take.block);
    at = take.next;
  }
  return blocks;
}

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (open === null) return null;
  const body = [];
  let next = at + 1;
  while (next < lines.length && !isClose(lines[next], open[1])) body.push(lines[next++]);
  const code = element("code", { text: body.join("\n") });
  return { block: element("pre", { tabindex: "0", "aria-label": `Code ${open[2]}`.trim() }, code), next: next + 1 };
}

function isClose(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text.split("").every((character) => character === mark[0]);
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (found === null) return null;
  return { block: element(`h${Math.min(6, found[1].length + 2)}`, {}, ...inline(found[2])), next: at + 1 };
}

function list(lines, at, level = 1) {
  const first = ITEM.exec(lines[at]);
  if (first === null) return null;
  const isOrdered = /\d/.test(first[2]);
  const made = element(isOrdered ? "ol" : "ul", isOrdered ? { start: Number.parseInt(first[2], 10) } : {});
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (item !== null) {
      const isDeeper = level < MOST_LEVELS && made.hasChildNodes() && item[1].length > first[1].length + 1;
      if (isDeeper) {
        const below = list(lines, next, level + 1);
        made.lastElementChild.append(below.block);
        next = below.next;
        continue;
      }
      if (item[1].length + 1 < first[1].length || /\d/.test(item[2]) !== isOrdered) break;
      made.append(element("li", {}, ...inline(item[3])));
    } else if (lines[next].trim() === "" || !/^\s+\S/.test(lines[next]) || FENCE.test(lines[next])) {
      break;
    } else {
      made.lastElementChild.append(" ", ...inline(lines[next].trim()));
    }
    next += 1;
  }
  return { block: made, next };
}

function paragraph(lines, at) {
  const body = [];
  let next = at;
  while (next < lines.length && lines[next].trim() !== "") {
    if (next > at && (FENCE.test(lines[next]) || HEADING.test(lines[next]) || ITEM.test(lines[next]))) break;
    body.push(lines[next++]);
  }
  if (body.length === 0) return { block: null, next: at + 1 };
  return { block: element("p", {}, ...inline(body.join("\n"))), next };
}

function inline(text) {
  if (text.length > MOST_INLINE) return [text];
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(at, found.index));
    if (found[2] !== undefined) parts.push(element("code", { text: found[2] }));
    else if (found[3] !== undefined) parts.push(element("strong", { text: found[3] }));
    else parts.push(element("em", { text: found[4] }));
    at = found.index + found[0].length;
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}
