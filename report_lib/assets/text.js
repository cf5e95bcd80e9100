// Text that a model or a data set wrote, shown as text: what cannot be seen is named, what is long comes in pieces.
"use strict";

VGS.FIRST_PIECE = 20000; // characters shown at once
VGS.NEXT_PIECE = 200000;
VGS.MOST_FORMULAS = 1000; // in a piece
// Controls, format characters (bidi marks, zero-width ...) and lone surrogates; newline and tab stay.
VGS.HIDDEN = /((?![\n\t])[\p{Cc}\p{Cf}\p{Cs}])/u;
VGS.LONG_WORD = /(\S{200})/u; // breaking a word into lines takes a browser time with the square of its length
VGS.LANDMARK = /(<\/?think>|\\+boxed(?=\s*\{))/;

/** A text in pieces, with what the pattern's group finds (every second piece of a split) replaced. */
VGS.pieces = (text, pattern, replace) => text.split(pattern).map((piece, i) => (i % 2 ? replace(piece) : piece));

/** Nodes of a text: hidden characters as labels; with `landmarks`, the end of thinking and boxes are set off. */
VGS.textNodes = function (text, landmarks = false) {
  const label = (character) => {
    const name = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return VGS.el("span", { class: "hidden-character", title: `character ${name}` }, name);
  };
  const mark = (word) => VGS.el("span", { class: "landmark" }, word);
  let nodes = VGS.pieces(text, VGS.HIDDEN, label);
  const each = (pattern, replace) =>
    (nodes = nodes.flatMap((part) => (typeof part === "string" ? VGS.pieces(part, pattern, replace).flat() : [part])));
  if (landmarks) each(VGS.LANDMARK, mark);
  each(VGS.LONG_WORD, (word) => [word, VGS.el("wbr", {})]);
  return nodes;
};

/** One line for lists and bars: cut at `most` characters, without line breaks. */
VGS.oneLine = function (text, most = 90) {
  const cut = [...text.slice(0, 2 * most)].slice(0, most).join("");
  return VGS.el("bdi", {}, VGS.textNodes(cut.replace(/\s+/g, " ") + (text.length > cut.length ? "…" : "")));
};

/** One line with its formulas drawn; a formula counts half its source, and is shown whole or as its source. */
VGS.mathLine = function (text, most = 90) {
  const flat = text.slice(0, 8 * most).replace(/\s+/g, " ");
  if (VGS.sourceShown()) return VGS.oneLine(text, most);
  const nodes = [];
  let [at, room] = [0, most];
  const words = function (end) {
    const characters = [...flat.slice(at, end)];
    nodes.push(...VGS.textNodes(characters.slice(0, Math.max(room, 0)).join("")));
    room -= characters.length;
    at = end;
  };
  for (const { start, end, tex } of VGS.formulas(flat)) {
    words(start);
    if (room <= 0 || end - start > 2 * most) break;
    nodes.push(VGS.formula({ tex, display: false }, flat.slice(start, end)));
    room -= (end - start) / 2;
    at = end;
  }
  if (room > 0) words(flat.length);
  return VGS.el("bdi", {}, nodes, room < 0 || text.length > 8 * most ? "…" : "");
};

/** Where a piece ends: not in a formula, and after at most so many. */
VGS.pieceEnd = function (formulas, from, end, to) {
  const inside = formulas.filter((formula) => formula.start >= from && formula.start < end && formula.end <= to);
  if (inside.length > VGS.MOST_FORMULAS) return inside[VGS.MOST_FORMULAS].start;
  return inside.length ? Math.max(end, inside[inside.length - 1].end) : end;
};

/** A text of any length, or a part of one, with its formulas drawn: the first piece, and a button for the next. */
VGS.longText = function (text, attributes = {}, { from = 0, to = text.length, formulas = VGS.formulas(text) } = {}) {
  const box = VGS.el("pre", { dir: "ltr", ...attributes, class: `${attributes.class || ""} ${VGS.sourceShown() ? "source" : "drawn"}` });
  let shown = from;
  const more = VGS.el("button", { type: "button", class: "more", onclick: () => extend(VGS.NEXT_PIECE) });
  const extend = (size) => {
    more.remove();
    const end = VGS.pieceEnd(formulas, shown, Math.min(shown + size, to), to);
    box.append(...VGS.mathNodes(text, formulas, shown, end, true));
    box.dataset.shown = shown = end;
    if (shown >= to) return;
    more.textContent = `show more (${VGS.count(to - shown)} characters left)`;
    box.append(more);
  };
  box.addEventListener("extend", ({ detail }) => { while (shown < Math.min(detail, to)) extend(VGS.NEXT_PIECE); });
  extend(VGS.FIRST_PIECE);
  return box;
};
