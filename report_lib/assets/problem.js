// One problem: its text and truth, the vote with its weights, its searches.
"use strict";

VGS.MOST_ANSWERS = 8;
VGS.view = { pooled: true, whole: false };

/** The vote of all repetitions or of one, as it was counted; what wins a vote is bold. */
VGS.voteTable = function (data, at) {
  const pooled = VGS.view.pooled || data.searches.length < 2;
  const vote = pooled ? data.vote : data.searches[at].vote;
  const word = (share) => (share === 1 ? "right" : share === 0 ? "wrong" : `right to ${VGS.percent(share)} (tie, or a mixed answer)`);
  const bar = (wins, share, ...text) => VGS.el("td", { class: wins ? "number top" : "number" }, VGS.el("span", { class: "bar", style: { width: `${70 * share}px` } }), text);
  const part = (wins, shown, share) => bar(wins, share, shown, ` (${VGS.percent(share)})`);
  const rest = vote ? vote.rows.length - VGS.MOST_ANSWERS : 0;
  const body = (vote ? vote.rows : []).slice(0, VGS.MOST_ANSWERS).map((row) => VGS.el("tr", { class: row.right > 0 ? "is-right" : "" },
    VGS.el("td", { class: "words" }, VGS.verdict(row.right), " ", row.answers.map((answer, i) => [i ? " = " : "", VGS.answer(answer, 60)])),
    part(row.wins.maj, row.count, row.count / (vote.beams - vote.empty)),
    part(row.wins.wmaj, row.weight.toFixed(2), vote.weight ? row.weight / vote.weight : 0),
    bar(row.wins.bon, row.best, row.best.toFixed(3))));
  const over = data.searches.filter((search) => search.over).length;
  return VGS.el("section", { class: "vote" },
    VGS.el("h3", {}, "Vote ",
      ["all", "one"].map((kind) => VGS.el("button", { type: "button", class: "chip", "aria-pressed": String((kind === "all") === pooled), onclick: () => { VGS.view.pooled = kind === "all"; VGS.show(); } },
        kind === "all" ? `all ${over} repetitions` : `repetition ${data.searches[at].repeat}`))),
    VGS.el("div", { class: "scroll" }, VGS.el("table", {},
      VGS.el("thead", {}, VGS.el("tr", {}, ["Answer", "Beams", "Sum of values", "Best value"].map((name, i) => VGS.el("th", { class: i ? "number" : "words" }, name)))),
      VGS.el("tbody", {}, body))),
    VGS.el("p", { class: "note" }, vote
      ? [rest > 0 ? `${rest} more answers. ` : "", vote.empty ? `${vote.empty} beams without an answer. ` : "",
        `Majority: ${word(vote.maj)}. Value-weighted: ${word(vote.wmaj)}. Best of N: ${word(vote.bon)}.`]
      : "This search is not over; it has no vote yet."));
};

VGS.searchStrip = function (data, at) {
  return VGS.el("div", { class: "strip", role: "group", "aria-label": "Repetitions" }, data.searches.map((search, i) =>
    VGS.el("button", { type: "button", class: "chip", "aria-pressed": String(i === at), "data-search": i, title: `repetition ${search.repeat}${search.over ? "" : ", in progress"}`, onclick: () => VGS.go({ search: i, node: "" }) },
      `${search.repeat} `, search.over
        ? search.beams.slice(0, 16).map((node) => {
          const outcome = VGS.outcome(search, node);
          return VGS.el("span", { class: `mark ${outcome.css}` }, outcome.mark);
        })
        : "in progress", search.beams.length > 16 ? "…" : "")));
};

VGS.textShown = Promise.resolve(); // when the text of the chosen block is there

/** The tree and the pane of the chosen block. Choosing another block changes marks and pane, and draws nothing else. */
VGS.drawSearch = function (data, at, room) {
  const search = data.searches[at];
  const width = Math.max(380, Math.floor((room - 40) * 0.55)) - 30;
  const place = VGS.layout(search, width);
  const best = [...search.beams].filter((node) => node > 0).sort((a, b) => search.value[b] - search.value[a])[0] || 1;
  const wanted = Number(VGS.address().node);
  let node = search.parent[wanted] >= 0 ? wanted : best;
  let texts = null;

  const pane = VGS.el("div", { class: "pane" }, VGS.el("p", {}, "Loading the text…"));
  const choose = (next) => {
    node = next;
    VGS.note({ node });
    const group = VGS.markNode(svg, search, node);
    group.focus({ preventScroll: true });
    group.scrollIntoView({ block: "nearest", inline: "nearest" });
    fill();
  };
  const whole = (on) => {
    VGS.view.whole = on;
    fill();
  };
  const fill = () => {
    if (texts) pane.replaceChildren(VGS.blockPane(search, node, texts, VGS.view.whole, { choose, whole }));
    pane.scrollTop = 0;
  };
  const svg = VGS.drawTree(search, place, choose);
  VGS.markNode(svg, search, node);
  VGS.textShown = VGS.load(search.texts).then(
    (parts) => { texts = parts[search.at]; fill(); },
    (error) => pane.replaceChildren(VGS.el("p", { class: "error" }, error.message)));
  const arrow = (event) => choose(VGS.step(search, place, node, event.key));
  Object.assign(VGS.keys, {
    ArrowUp: arrow, ArrowDown: arrow, ArrowLeft: arrow, ArrowRight: arrow,
    Enter: () => document.getElementById("block-head")?.focus(),
    t: () => whole(!VGS.view.whole),
  });
  return VGS.el("div", { class: "search" }, VGS.el("div", { class: "tree-holder" }, svg, VGS.legend()), pane);
};

/** Scroll the tree, and nothing else, so far that the chosen block is seen. */
VGS.showChosen = function () {
  const holder = document.querySelector(".tree-holder");
  const [room, node] = [holder, holder.querySelector(".chosen")].map((part) => part.getBoundingClientRect());
  holder.scrollLeft += Math.max(0, node.right + VGS.BRANCH_GAP - room.right);
  holder.scrollTop += Math.max(0, node.bottom - room.bottom);
};

VGS.legend = function () {
  return VGS.el("p", { class: "legend" },
    "value ", [0, 0.25, 0.5, 0.75, 1].map((value) => VGS.el("span", { class: "swatch", style: { "--fill": VGS.colour(value), "--ink": VGS.ink(value) } }, String(value))),
    VGS.el("span", { class: "swatch sample kept" }, "kept"), VGS.el("span", { class: "swatch sample rejected" }, "rejected"),
    " ✓ right  ✗ wrong  … length-limited");
};

VGS.drawProblem = function (data) {
  const at = Math.min(Number(VGS.address().search) || 0, data.searches.length - 1);
  const hop = (step) => {
    const order = VGS.order.includes(data.id) ? VGS.order : VGS.run().problems.map((p) => p.id);
    const next = order[order.indexOf(data.id) + step];
    if (next !== undefined) VGS.go({ problem: next, search: 0, node: "" });
  };
  const turn = (step) => VGS.go({ search: Math.min(Math.max(at + step, 0), data.searches.length - 1), node: "" });
  const back = () => VGS.go({ view: "problems", node: "" });
  VGS.keys = { Escape: back, "[": () => turn(-1), "]": () => turn(1), p: () => hop(-1), n: () => hop(1) };
  const scrolled = window.scrollY;
  VGS.fill(
    VGS.el("p", { class: "crumbs" },
      VGS.el("button", { type: "button", class: "chip", onclick: back }, "← Problems (Esc)"),
      VGS.el("button", { type: "button", class: "chip", onclick: () => hop(-1) }, "‹ p"), ` Problem ${data.id} `, VGS.el("button", { type: "button", class: "chip", onclick: () => hop(1) }, "n ›")),
    VGS.el("div", { class: "problem-head" },
      VGS.el("section", { class: "statement" }, VGS.el("h3", {}, "Problem"), VGS.longText(data.problem, { class: "problem-text" }),
        VGS.el("p", { class: "truth" }, "Truth: ", VGS.el("b", {}, VGS.answer(data.truth, 160)))),
      VGS.voteTable(data, at)),
    VGS.searchStrip(data, at),
    VGS.drawSearch(data, at, document.getElementById("main").clientWidth));
  VGS.showChosen();
  window.scrollTo(0, scrolled);
};

VGS.views.problem = function () {
  const known = VGS.run().problems;
  const id = known.some((p) => p.id === Number(VGS.address().problem)) ? Number(VGS.address().problem) : known[0].id;
  const name = `${VGS.run().folder}/p${id}`;
  if (!VGS.order.length) VGS.listed();
  return VGS.load(name).then((data) => {
    const { view, problem } = VGS.address();
    if (view !== "problem" || (Number(problem) || known[0].id) !== id) return null;
    VGS.shownProblem = { name, json: JSON.stringify(data) };
    VGS.drawProblem(data);
    return VGS.textShown;
  }, (error) => VGS.fill(VGS.el("p", { class: "error" }, error.message)));
};
