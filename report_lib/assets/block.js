// What is known of one block: its numbers, its path, its siblings, its text.
"use strict";

VGS.MOST_SIBLINGS = 12;

VGS.valueChip = function (search, node, choose, current = false) {
  const value = search.value[node];
  const outcome = VGS.outcome(search, node);
  return VGS.el("button", {
    type: "button", class: `value-chip ${search.kept[node] ? "kept" : "rejected"}`, "aria-current": current ? "true" : null, "data-go": node,
    title: VGS.nodeLabel(search, node), style: { "--fill": VGS.colour(value), "--ink": VGS.ink(value) }, onclick: () => choose(node),
  }, `#${node} ${value.toFixed(2)}${outcome ? " " + outcome.mark : ""}`);
};

/** Values at the block ends along the path, as a line from 0 to 1. */
VGS.sparkline = function (search, node) {
  const path = VGS.path(search, node);
  const end = search.start[node] + search.length[node];
  const point = (at) => [(180 * (search.start[at] + search.length[at])) / Math.max(end, 1), 34 - 32 * search.value[at]];
  return VGS.el("svg", { class: "sparkline", width: 192, height: 41, viewBox: "-4 -3 192 41", role: "img", "aria-label": `values along the trace: ${path.map((at) => search.value[at].toFixed(2)).join(", ")}` },
    VGS.el("line", { x1: 0, y1: 18, x2: 180, y2: 18, class: "half" }),
    VGS.el("polyline", { points: path.map((at) => point(at).join(",")).join(" ") }),
    path.map((at) => VGS.el("circle", { cx: point(at)[0], cy: point(at)[1], r: 3 })));
};

VGS.blockFacts = function (search, node) {
  const rank = search.value.filter((value, i) => i && search.round[i] === search.round[node] && (value > search.value[node] || (value === search.value[node] && i < node))).length + 1;
  const among = search.round.filter((round) => round === search.round[node]).length;
  const finish = search.finish[node];
  const outcome = VGS.outcome(search, node);
  const facts = [
    ["value", `${search.value[node].toFixed(4)} (rank ${rank} of ${among} in round ${search.round[node] + 1})`],
    ["fate", search.kept[node] ? "kept" : "rejected"],
    ["tokens", `${VGS.count(search.length[node])}, from ${VGS.count(search.start[node])} to ${VGS.count(search.start[node] + search.length[node])}`],
  ];
  if (finish) facts.push(
    ["end", finish === "length" ? "reached max_length" : finish === "stop" ? "stop token" : "end (how is not known)"],
    ["answer", [VGS.answer(search.graded[node]?.[0] || "(none)", 60), " ", VGS.el("b", { class: `mark ${outcome.css}` }, `${outcome.mark} ${outcome.word}`)]]);
  return VGS.el("dl", { class: "facts" }, facts.map(([name, value]) => [VGS.el("dt", {}, name), VGS.el("dd", {}, value)]));
};

/** A function that shows the text of a block of a trace. Formulas are looked for in the whole trace: a block may begin in one. */
VGS.traceText = function (blocks) {
  const text = blocks.join("");
  const formulas = VGS.formulas(text);
  const ends = blocks.map(((sum) => (block) => (sum += block.length))(0));
  return (i, attributes = {}) => VGS.longText(text, attributes, { from: ends[i] - blocks[i].length, to: ends[i], formulas });
};

/** The pane of a block. `texts` are the search's texts by node; `whole`: the trace from its beginning instead. */
VGS.blockPane = function (search, node, texts, whole, actions) {
  const siblings = search.parent.map((_, i) => i).filter((i) => i && search.parent[i] === search.parent[node]);
  siblings.sort((a, b) => search.value[b] - search.value[a] || a - b);
  const shown = siblings.filter((at, i) => i < VGS.MOST_SIBLINGS || at === node);
  const path = VGS.path(search, node);
  const blockText = VGS.traceText(path.map((at) => texts[at]));
  const text = whole
    ? path.map((at, i) => VGS.el("section", {}, VGS.el("h4", {}, `round ${search.round[at] + 1}, #${at}, value ${search.value[at].toFixed(3)}`), blockText(i)))
    : [blockText(path.length - 1, { id: "block-text" })];
  return VGS.el("div", { class: "block", "data-block": node },
    VGS.el("h3", { tabindex: -1, id: "block-head" }, `Block #${node}`),
    VGS.el("div", { class: "block-top" }, VGS.blockFacts(search, node), path.length > 1 ? VGS.sparkline(search, node) : ""),
    VGS.el("p", { class: "chips" }, VGS.el("span", {}, "Path "), path.map((at) => VGS.valueChip(search, at, actions.choose, at === node))),
    VGS.el("p", { class: "chips" }, VGS.el("span", {}, "Siblings "), shown.map((at) => VGS.valueChip(search, at, actions.choose, at === node)),
      shown.length < siblings.length ? VGS.el("span", {}, `and ${siblings.length - shown.length} of lower value`) : ""),
    VGS.el("p", { class: "chips" },
      VGS.el("button", { type: "button", class: "chip", "aria-pressed": String(!whole), onclick: () => actions.whole(false) }, "Block"),
      VGS.el("button", { type: "button", class: "chip", "aria-pressed": String(whole), onclick: () => actions.whole(true) }, "Whole trace")),
    search.ids ? VGS.el("p", { class: "note" }, "Token ids: this run has no journal with text, and the report was made without --tokenizer.") : "",
    text);
};
