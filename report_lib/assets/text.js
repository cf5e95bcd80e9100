// Text that a model or a data set wrote, shown as text: what cannot be seen is named, what is long comes in pieces.
"use strict";

VGS.FIRST_PIECE = 20000; // characters shown at once
VGS.NEXT_PIECE = 200000;
// Controls, format characters (bidi marks, zero-width ...) and lone surrogates; newline and tab stay.
VGS.HIDDEN = /((?![\n\t])[\p{Cc}\p{Cf}\p{Cs}])/u;
VGS.LANDMARK = /(<\/?think>|\\+boxed(?=\s*\{))/;

/** A text in pieces, with what the pattern's group finds (every second piece of a split) replaced. */
VGS.pieces = (text, pattern, replace) => text.split(pattern).map((piece, i) => (i % 2 ? replace(piece) : piece));

/** Nodes of a text: hidden characters as labels; with `landmarks`, the end of thinking and boxes are set off. */
VGS.textNodes = function (text, landmarks = false) {
  const label = (character) => {
    const name = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return VGS.el("span", { class: "hidden-character", title: `character ${name}` }, name);
  };
  const shown = VGS.pieces(text, VGS.HIDDEN, label);
  if (!landmarks) return shown;
  const mark = (word) => VGS.el("span", { class: "landmark" }, word);
  return shown.flatMap((part) => (typeof part === "string" ? VGS.pieces(part, VGS.LANDMARK, mark) : [part]));
};

/** One line for lists and bars: cut at `most` characters, without line breaks. */
VGS.oneLine = function (text, most = 90) {
  const cut = [...text.slice(0, 2 * most)].slice(0, most).join("");
  return VGS.el("bdi", {}, VGS.textNodes(cut.replace(/\s+/g, " ") + (text.length > cut.length ? "…" : "")));
};

/** A text of any length: the first piece, and a button for the next. */
VGS.longText = function (text, attributes = {}) {
  const box = VGS.el("pre", { dir: "ltr", ...attributes });
  let shown = 0;
  const more = VGS.el("button", { type: "button", class: "more", onclick: () => extend(VGS.NEXT_PIECE) });
  const extend = (size) => {
    more.remove();
    box.append(...VGS.textNodes(text.slice(shown, shown + size), true));
    shown += size;
    if (shown >= text.length) return;
    more.textContent = `show more (${VGS.count(text.length - shown)} characters left)`;
    box.append(more);
  };
  extend(VGS.FIRST_PIECE);
  return box;
};
