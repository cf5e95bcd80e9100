// The overview: what was asked, answered; notes, the runs' accuracy, plots, the other tables, the runs' settings.
"use strict";

VGS.overviewState = { folded: true }; // are the tables folded that few look for?

VGS.table = function (table) {
  const cell = (tag, value, i) => VGS.el(tag, { class: table.words.includes(table.columns[i]) ? "words" : "number" }, VGS.textNodes(value));
  return VGS.el("section", { class: table.folded ? "table foldable" : "table", hidden: table.folded && VGS.overviewState.folded },
    VGS.el("h3", {}, VGS.textNodes(table.title)),
    VGS.el("div", { class: "scroll" },
      VGS.el("table", {},
        VGS.el("thead", {}, VGS.el("tr", {}, table.columns.map((name, i) => cell("th", name, i)))),
        VGS.el("tbody", {}, table.rows.map((row) => VGS.el("tr", {}, row.map((value, i) => cell("td", value, i))))))),
    table.notes.map((note) => VGS.el("p", { class: "note" }, VGS.textNodes(note))));
};

/** Shows and hides the folded tables. */
VGS.foldSwitch = function () {
  const turn = () => {
    const folded = (VGS.overviewState.folded = !VGS.overviewState.folded);
    document.querySelectorAll(".foldable").forEach((table) => (table.hidden = folded));
    button.setAttribute("aria-pressed", String(!folded));
  };
  const button = VGS.el("button", { type: "button", id: "fold", class: "chip", "aria-pressed": String(!VGS.overviewState.folded), onclick: turn }, "Repeat noise, as released");
  return VGS.el("p", { class: "note" }, button, " half-widths of the released code, without the variance between problems");
};

VGS.PHONE = "(max-width: 760px)"; // as in report.css

VGS.figure = (plot) => VGS.el("figure", { style: { "--wide": String(plot.inches), "--narrow": String(plot.narrow_inches ?? plot.inches) } },
  VGS.el("a", { href: plot.svg }, VGS.el("picture", {},
    plot.narrow ? VGS.el("source", { media: VGS.PHONE, srcset: plot.narrow }) : null,
    VGS.el("img", { src: plot.png, alt: plot.title, loading: "lazy" }))),
  VGS.el("figcaption", {}, VGS.textNodes(plot.caption)));

/** One question: sentences, what to mind, what was chosen beforehand. */
VGS.comparison = function (answer) {
  const part = (css, text) => VGS.el("p", { class: css }, VGS.textNodes(text));
  return VGS.el("section", { class: "answer" }, VGS.el("h2", {}, VGS.textNodes(answer.title)),
    answer.sentences.map((text) => part("sentence", text)), answer.mind.map((text) => part("note mind", text)), answer.chosen ? part("note", answer.chosen) : "");
};

VGS.views.overview = function () {
  const { runs, tables, plots, answers } = VGS.index;
  const settings = (run) => VGS.el("dl", { class: "settings" },
    run.settings.map(([name, value]) => [VGS.el("dt", {}, name), VGS.el("dd", {}, VGS.textNodes(value))]));
  const notes = [...new Set(runs.flatMap((run) => run.notes))];
  const first = (plot) => answers.some((answer) => answer.plot === plot.stem); // stands beside the answers
  VGS.fill(
    VGS.el("div", { class: "answers" }, VGS.el("div", {}, answers.map(VGS.comparison)), VGS.el("div", {}, plots.filter(first).map(VGS.figure))),
    VGS.el("ul", { class: "notes", hidden: !notes.length }, notes.map((note) => VGS.el("li", {}, VGS.textNodes(note)))),
    ...tables.slice(0, runs.length).map(VGS.table),
    VGS.el("div", { class: "plots" }, plots.filter((plot) => !first(plot)).map(VGS.figure)),
    tables.some((table) => table.folded) ? VGS.foldSwitch() : "",
    ...tables.slice(runs.length).map(VGS.table),
    VGS.el("div", { class: "cards" }, runs.map((run) => VGS.el("section", { class: "card" }, VGS.el("h2", {}, VGS.textNodes(run.name)), settings(run)))),
    VGS.el("p", { class: "note" }, "All rows and unrounded numbers: table.csv and table.json beside this page."));
  VGS.keys = {};
};
