// The overview: notes, the runs' accuracy (the first tables, one a run), plots, the other tables, the runs' settings.
"use strict";

VGS.table = function (table) {
  const cell = (tag, value, i) => VGS.el(tag, { class: table.words.includes(table.columns[i]) ? "words" : "number" }, VGS.textNodes(value));
  return VGS.el("section", { class: "table" },
    VGS.el("h3", {}, VGS.textNodes(table.title)),
    VGS.el("div", { class: "scroll" },
      VGS.el("table", {},
        VGS.el("thead", {}, VGS.el("tr", {}, table.columns.map((name, i) => cell("th", name, i)))),
        VGS.el("tbody", {}, table.rows.map((row) => VGS.el("tr", {}, row.map((value, i) => cell("td", value, i))))))),
    table.notes.map((note) => VGS.el("p", { class: "note" }, VGS.textNodes(note))));
};

VGS.views.overview = function () {
  const { runs, tables, plots } = VGS.index;
  const settings = (run) => VGS.el("dl", { class: "settings" },
    run.settings.map(([name, value]) => [VGS.el("dt", {}, name), VGS.el("dd", {}, VGS.textNodes(value))]));
  const notes = [...new Set(runs.flatMap((run) => run.notes))];
  const figures = plots.map((plot) => VGS.el("figure", { class: plot.wide ? "wide" : null },
    VGS.el("a", { href: plot.svg }, VGS.el("img", { src: plot.png, alt: plot.title, loading: "lazy" })),
    VGS.el("figcaption", {}, VGS.textNodes(plot.caption))));
  VGS.fill(
    VGS.el("ul", { class: "notes", hidden: !notes.length }, notes.map((note) => VGS.el("li", {}, VGS.textNodes(note)))),
    ...tables.slice(0, runs.length).map(VGS.table),
    VGS.el("div", { class: "plots" }, figures),
    ...tables.slice(runs.length).map(VGS.table),
    VGS.el("div", { class: "cards" }, runs.map((run) => VGS.el("section", { class: "card" }, VGS.el("h2", {}, VGS.textNodes(run.name)), settings(run)))),
    VGS.el("p", { class: "note" }, "All rows and unrounded numbers: table.csv and table.json beside this page."));
  VGS.keys = {};
};
