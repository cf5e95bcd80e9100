// Draws formulas as MathML, by Temml (vendor/temml), which is read when the first formula is met.
// A formula that is broken, too large or hostile is shown as its source; so is every one where the switch says so.
"use strict";

VGS.DEEPEST_FORMULA = 150; // elements or groups in one another: a browser's layout recurses, and so does the renderer
VGS.LARGEST_FORMULA = 5000; // elements
VGS.MOST_HELD_FORMULAS = 2000;
VGS.TEMML = "report_data/assets/vendor/temml/";
// No links, pictures, ids or classes (trust), few expansions, no length above 2 em. `\mbox` is missing in Temml.
VGS.temmlOptions = (display) =>
  ({ displayMode: display, throwOnError: true, trust: false, maxExpand: 300, maxSize: [2, 20], wrap: display ? "none" : "tex", macros: { "\\mbox": "\\text" } });
// Definitions can multiply what there is to draw, and no trace needs them.
VGS.DEFINITION = /\\(?:[gex]?def|let|futurelet|global|long|(?:re|provide)?newcommand|definecolor)(?![a-zA-Z])/;

// Nor is there a need to lift text over the lines around it.
VGS.RAISED = /\\(?:raise|lower|raisebox)(?![a-zA-Z])/;

VGS.drawn = new Map(); // formula -> its MathML, or null where it cannot be drawn
VGS.undrawn = []; // [box, formula]: shown as source until the renderer is there

VGS.sourceShown = () => VGS.address().source === "1";

/** A formula as an element: its MathML, or its source while the renderer is read. Where it cannot be drawn, its source stays. */
VGS.formula = function (formula, source) {
  const box = VGS.el("span", { class: formula.display ? "formula display" : "formula", title: source }, VGS.textNodes(source));
  if (window.temml) VGS.drawFormula(box, formula);
  else {
    VGS.undrawn.push([box, formula]);
    VGS.readTemml();
  }
  return box;
};

VGS.drawFormula = function (box, formula) {
  const key = `${formula.display} ${formula.tex}`;
  if (!VGS.drawn.has(key)) {
    if (VGS.drawn.size >= VGS.MOST_HELD_FORMULAS) VGS.drawn.clear();
    VGS.drawn.set(key, VGS.mathml(formula));
  }
  const drawn = VGS.drawn.get(key);
  if (drawn) box.replaceChildren(drawn.cloneNode(true));
  else {
    box.className = "undrawn";
    box.title = "this formula cannot be drawn";
  }
};

/** MathML of a formula, or null. */
VGS.mathml = function ({ tex, display }) {
  if (tex.length > VGS.LONGEST_FORMULA || VGS.DEFINITION.test(tex) || VGS.RAISED.test(tex) || VGS.HIDDEN.test(tex) || VGS.tooDeep(tex)) return null;
  const holder = document.createElement("span");
  try {
    window.temml.render(tex, holder, VGS.temmlOptions(display));
  } catch {
    return null;
  }
  return VGS.tooLarge(holder) || holder.querySelector("a, img, script, [href], [src]") ? null : VGS.withoutIds(holder.firstChild);
};

/** A formula's labels must not be found in place of what the page calls so. */
VGS.withoutIds = function (node) {
  for (const named of node.querySelectorAll("[id]")) named.removeAttribute("id");
  return node;
};

/** Groups leave no elements, and where the renderer's stack ends depends on what ran before. */
VGS.tooDeep = function (tex) {
  let depth = 0;
  for (const [brace] of tex.matchAll(/[{}]/g)) {
    depth += brace === "{" ? 1 : -1;
    if (depth > VGS.DEEPEST_FORMULA) return true;
  }
  return false;
};

VGS.tooLarge = function (holder) {
  let level = [holder];
  for (let depth = 0, seen = 0; level.length; depth++) {
    seen += level.length;
    if (depth > VGS.DEEPEST_FORMULA || seen > VGS.LARGEST_FORMULA) return true;
    level = level.flatMap((node) => [...node.children]);
  }
  return false;
};

VGS.readTemml = function () {
  if (VGS.temmlAsked) return;
  VGS.temmlAsked = true;
  const script = VGS.el("script", { src: `${VGS.TEMML}temml.min.js` });
  script.addEventListener("load", () => {
    for (const [box, formula] of VGS.undrawn.splice(0)) VGS.drawFormula(box, formula);
  });
  script.addEventListener("error", () => {
    VGS.undrawn = [];
    document.getElementById("source-button").textContent = "formulas cannot be drawn: report_data/assets/vendor/temml is missing";
  });
  document.head.append(VGS.el("link", { rel: "stylesheet", href: `${VGS.TEMML}Temml-Local.css` }), script);
};

/** Nodes of a part of a text, with its formulas drawn; one that does not lie in it whole is text. */
VGS.mathNodes = function (text, formulas, from, to, landmarks = false) {
  const nodes = [];
  let at = from;
  const words = (end, afterDisplay, beforeDisplay) => {
    let piece = text.slice(at, end);
    if (afterDisplay) piece = piece.replace(/^[ \t]*\n/, ""); // a displayed formula has lines of its own
    if (beforeDisplay) piece = piece.replace(/\n[ \t]*$/, "");
    nodes.push(...VGS.textNodes(piece, landmarks));
  };
  let display = false;
  for (const formula of VGS.sourceShown() ? [] : formulas) {
    if (formula.start < at || formula.end > to) continue;
    words(formula.start, display, formula.display);
    const drawn = VGS.formula(formula, text.slice(formula.start, formula.end));
    const [stop] = formula.display ? [""] : text.slice(formula.end, Math.min(formula.end + 3, to)).match(/^[.,;:!?)\]]*/);
    nodes.push(stop ? VGS.el("span", { class: "joined" }, drawn, stop) : drawn); // no line begins with a full stop
    at = formula.end + stop.length;
    display = formula.display;
  }
  words(to, display, false);
  return nodes;
};

/** An answer is what stood in a box: one formula without delimiters, or a word, or text. On one line. */
VGS.answer = function (text, most = 90) {
  const formula = /[\\^_]/.test(text) && text.length <= 4 * most && !VGS.PROSE.test(text.replace(VGS.NOT_SYMBOLS, " ")) && !/\$|\\[(\[]/.test(text);
  if (!formula || VGS.sourceShown()) return VGS.oneLine(text, most);
  return VGS.el("bdi", {}, VGS.formula({ tex: text, display: false }, text));
};

VGS.switchSource = function () {
  VGS.note({ source: VGS.sourceShown() ? "" : "1" });
  VGS.showAgain();
};
