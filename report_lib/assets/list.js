// The list of problems: sort by any column, filter by what went wrong, search the text.
"use strict";

VGS.CLOSE_MARGIN = 0.2; // of the weighted vote: its first answer's share minus its second's
// name, words, does it keep a problem, is that known of it (always, where not given)
VGS.FILTERS = [
  ["all", "All", () => true],
  ["wrong", "Wrong vote", (p) => p.wmaj < 1],
  ["lost", "Wrong vote, right answer there", (p) => p.wmaj < 1 && p.pass1 > 0],
  ["close", "Close vote", (p) => p.margin < VGS.CLOSE_MARGIN],
  ["truncated", "Length-limited or empty", (p) => p.truncated > 0 || p.empty > 0, (p) => p.truncated !== null],
  ["pruned", "Only a pruned candidate was right", (p) => p.rescued > 0, (p) => p.rescued !== null],
];
VGS.WORDS = new Set(["problem", "truth", "wmaj"]); // columns that are set left
// name, title, key, how it is shown, does it sort descending first
VGS.COLUMNS = [
  ["#", "problem number (data_idx)", "id", (p) => p.id, false],
  ["Problem", "its first words", "problem", (p) => VGS.mathLine(p.problem), false],
  ["Truth", "the reference answer", "truth", (p) => VGS.answer(p.truth, 18), false],
  ["Vote", "answer of the value-weighted majority over all repetitions, and whether it is right", "wmaj", (p) => [VGS.verdict(p.wmaj), " ", VGS.answer(p.vote || "(no answer)", 18)], false],
  ["Margin", "share of the first answer minus the second's, in the weighted vote", "margin", (p) => VGS.bar(p.margin), false],
  ["Right", "share of final beams that are right (pass@1)", "pass1", (p) => VGS.bar(p.pass1), false],
  ["Disagree", "chance that two final beams, drawn at random, answer differently", "disagreement", (p) => VGS.percent(p.disagreement), true],
  ["Length-limited", "share of final beams that reached max_length", "truncated", (p) => VGS.percent(p.truncated), true],
  ["Value", "mean value of the final beams", "value", (p) => p.value.toFixed(3), true],
  ["Pruned right", "searches in which a pruned, finished candidate was right and no kept one was", "rescued", (p) => (p.rescued === null ? "–" : p.rescued), true],
  ["Clones", "final beams of a search that descend from one first block: its largest family, mean over repetitions", "clones", (p) => (p.clones === null ? "–" : p.clones.toFixed(1)), true],
  ["Tokens", "tokens generated, all repetitions", "tokens", (p) => VGS.short(p.tokens), true],
];

VGS.bar = (share) => VGS.el("span", { class: "bar-cell" }, VGS.el("span", { class: "bar", style: { width: `${48 * share}px` } }), VGS.percent(share));

VGS.listState = { sort: "id", down: false, filter: "all", words: "", at: 0 };

/** How many problems a filter keeps, as far as it is known. */
VGS.tally = function (keep, known = () => true) {
  const problems = VGS.run().problems;
  const count = problems.filter(keep).length;
  return problems.every(known) ? count : count ? `≥ ${count}` : "–";
};

VGS.listed = function () {
  const { sort, down, filter, words } = VGS.listState;
  const keep = VGS.FILTERS.find(([name]) => name === filter)[2];
  const wanted = words.toLowerCase();
  const rows = VGS.run().problems.filter((p) => keep(p) && (p.problem.toLowerCase().includes(wanted) || String(p.id) === wanted));
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : (a ?? -1) - (b ?? -1));
  rows.sort((a, b) => (down ? -1 : 1) * compare(a[sort], b[sort]) || a.id - b.id);
  VGS.order = rows.map((p) => p.id);
  return rows;
};

VGS.views.problems = function () {
  const state = VGS.listState;
  const head = VGS.el("tr", {});
  const body = VGS.el("tbody", {});
  const tally = VGS.el("span", { class: "tally" });
  const filters = VGS.el("div", { class: "filters", role: "group", "aria-label": "Filter" });
  const search = VGS.el("input", { type: "search", placeholder: "Search (/)", "aria-label": "Search problems", value: state.words, oninput: () => change({ words: search.value }) });
  const open = (id) => VGS.go({ view: "problem", problem: id, search: 0, node: "" });

  const move = (step) => {
    state.at = Math.min(Math.max(state.at + step, 0), VGS.order.length - 1);
    body.querySelector(".at")?.classList.remove("at");
    const row = body.children[state.at];
    row?.classList.add("at");
    row?.scrollIntoView({ block: "nearest" });
  };
  const change = (parts) => {
    Object.assign(state, parts, { at: 0 });
    draw();
  };
  const draw = () => {
    const rows = VGS.listed();
    tally.textContent = `${rows.length} of ${VGS.run().problems.length} problems`;
    filters.replaceChildren(...VGS.FILTERS.map(([name, words, keep, known]) =>
      VGS.el("button", { type: "button", class: "chip", "data-filter": name, "aria-pressed": String(state.filter === name), onclick: () => change({ filter: name }) },
        `${words} `, VGS.el("small", {}, VGS.tally(keep, known)))));
    head.replaceChildren(...VGS.COLUMNS.map(([name, title, key, , down]) =>
      VGS.el("th", { title, class: VGS.WORDS.has(key) ? "words" : "number", "aria-sort": state.sort === key ? (state.down ? "descending" : "ascending") : "none" },
        VGS.el("button", { type: "button", "data-sort": key, onclick: () => change({ sort: key, down: state.sort === key ? !state.down : down }) }, name, state.sort === key ? (state.down ? " ▼" : " ▲") : ""))));
    body.replaceChildren(...rows.map((p, i) =>
      VGS.el("tr", { class: i === state.at ? "at" : null, "data-problem": p.id, onclick: () => { state.at = i; open(p.id); } },
        VGS.COLUMNS.map(([, , key, show]) => VGS.el("td", { class: VGS.WORDS.has(key) ? `words ${key}` : "number" }, show(p))))));
  };

  draw();
  VGS.fill(
    VGS.el("div", { class: "bar-top" }, filters, search, tally),
    VGS.el("div", { class: "list-holder" }, VGS.el("table", { class: "list" }, VGS.el("thead", {}, head), body)));
  move(0);
  VGS.keys = {
    ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
    Enter: () => VGS.order.length && open(VGS.order[state.at]), "/": () => search.focus(),
  };
};
