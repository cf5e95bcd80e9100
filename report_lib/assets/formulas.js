// Finds the formulas of a text by their delimiters: $ $, $$ $$, \( \), \[ \], AMS environments, and \boxed{} outside of them.
"use strict";

VGS.MOST_SCANNED = 300000; // characters of a text are looked through
VGS.LONGEST_FORMULA = 4000; // characters
VGS.FORMULA_TOKEN = /\\(?:(begin|end)\{((?:align|alignat|equation|gather|multline)\*?)\}|boxed\s*(?=\{)|[^])|\$/g;
VGS.CLOSED_BY = { "\\(": "\\)", "\\[": "\\]", $: "$", $$: "$$" };
VGS.NOT_SYMBOLS = /\\(?:text[a-z]*|mbox|mathrm|operatorname|emph)\*?\s*\{[^{}]*\}|\\[a-zA-Z]+/g;
// Between two amounts of money: two words of small letters, or an amount and a word; or an amount and an open end.
VGS.PROSE = /[a-z]{2,}[,.;:]?\s+[a-z]{2,}|^\d[\d.,]*\s+[a-z]{2,}\s/;
VGS.OPEN_AMOUNT = /^\d[^]*[\s=]$/;

/** What can begin or end a formula: [place, kind, length]. */
VGS.formulaTokens = function (text) {
  const tokens = [];
  for (const match of text.matchAll(VGS.FORMULA_TOKEN)) {
    const [word, edge, environment] = match;
    if (edge) tokens.push([match.index, `${edge} ${environment}`, word.length]);
    else if (word === "$") tokens.push(text[match.index + 1] === "$" ? [match.index, "$$", 2] : [match.index, "$", 1]);
    else if (word.startsWith("\\boxed")) tokens.push([match.index, "\\boxed", word.length]);
    else if ("()[]".includes(word[1])) tokens.push([match.index, word, 2]);
  }
  return tokens;
};

/** Where groups in braces end, by where they begin: those that begin at some places and do end. */
VGS.groupEnds = function (text, places) {
  const ends = new Map();
  const wanted = new Set(places);
  const open = [];
  for (const match of wanted.size ? text.matchAll(/\\[^]|[{}]/g) : [])
    if (match[0] === "{") open.push(match.index);
    else if (match[0] === "}") {
      const place = open.pop();
      if (wanted.has(place)) ends.set(place, match.index + 1);
    }
  return ends;
};

/** A function of kind and place: where the next token of that kind is, or -1. The places of one kind that are asked for must grow. */
VGS.tokenFinder = function (tokens) {
  const ahead = new Map(); // last first
  for (const [at, kind] of [...tokens].reverse())
    for (const name of kind === "$$" ? ["$$", "$"] : [kind]) ahead.has(name) ? ahead.get(name).push(at) : ahead.set(name, [at]);
  return function (kind, from) {
    const places = ahead.get(kind) || [];
    while (places.length && places[places.length - 1] < from) places.pop();
    return places.length ? places[places.length - 1] : -1;
  };
};

/** The formulas of a text, in order: {start, end, tex, display}. The time it takes grows with the text, not with its square. */
VGS.formulas = function (text) {
  const scanned = text.slice(0, VGS.MOST_SCANNED);
  const tokens = VGS.formulaTokens(scanned);
  const groups = VGS.groupEnds(scanned, tokens.filter(([, kind]) => kind === "\\boxed").map(([at, , length]) => at + length));
  const next = VGS.tokenFinder(tokens);
  const found = [];
  for (const [at, kind, length] of tokens) {
    if (found.length && at < found[found.length - 1].end) continue;
    let [inside, close, end] = [at, -1, -1];
    if (kind === "\\boxed") close = end = groups.get(at + length) ?? -1;
    else if (kind.startsWith("begin ")) {
      const last = next(kind.replace("begin", "end"), at);
      if (last >= 0) close = end = last + length - 2; // "\end{...}" is as long as "\begin{...}", less two
    } else if (VGS.CLOSED_BY[kind]) {
      [inside, close] = [at + length, next(VGS.CLOSED_BY[kind], at + length)];
      end = close + length;
    }
    const tex = scanned.slice(inside, Math.min(close, at + VGS.LONGEST_FORMULA));
    if (close < 0 || end - at > VGS.LONGEST_FORMULA || !tex.trim()) continue;
    if (kind === "$" && !VGS.betweenDollars(tex, scanned[end])) continue;
    found.push({ start: at, end, tex, display: kind === "$$" || kind === "\\[" || kind.startsWith("begin ") });
  }
  return found;
};

/** Is what stands between two dollars a formula, and not prose between two amounts of money? */
VGS.betweenDollars = (tex, after) =>
  !/\d/.test(after) && !/\n\s*\n/.test(tex) && !VGS.OPEN_AMOUNT.test(tex) && !VGS.PROSE.test(tex.replace(VGS.NOT_SYMBOLS, " "));
