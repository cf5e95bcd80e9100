// Shared by all views: building elements, loading data files, the address and the place in a view, the keyboard.
// Data files call VGS.receive(name, value). Strings from a run are only ever set as text, never as markup.
"use strict";

const VGS = {
  index: null, // what index.js holds: runs, tables, plots
  order: [], // data_idx of the problems in the order the list shows them
  keys: {}, // key -> action of the view that is shown
  files: new Map(), // data files asked for, least recently used first
  MAX_HELD: 12,
};

/** A new element. Attributes by name; `on...` are listeners; children are nodes or text. */
VGS.el = function (tag, attributes, ...children) {
  const svg = VGS.SVG_TAGS.has(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, part] of Object.entries(value)) node.style.setProperty(name, part);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
};
VGS.SVG_TAGS = new Set(["svg", "g", "rect", "path", "line", "circle", "polyline", "text", "tspan", "defs", "pattern"]);

/** Data of report_data/<name>.js, by a script tag: this works from a file, where fetch does not. */
VGS.load = function (name) {
  const file = VGS.files.get(name) || VGS.request(name);
  VGS.files.delete(name);
  VGS.files.set(name, file);
  if (VGS.files.size > VGS.MAX_HELD) VGS.files.delete(VGS.files.keys().next().value);
  return file.promise;
};

/** Read a data file that was not kept: of a run that goes on, the version that the page shows. */
VGS.script = (name, version = VGS.index?.live) => VGS.el("script", { src: `report_data/${name}.js${version ? `?${version}` : ""}` });

VGS.request = function (name) {
  const file = { waiting: true };
  file.promise = new Promise((resolve, reject) => Object.assign(file, { resolve, reject }));
  const script = VGS.script(name);
  script.addEventListener("load", () => {
    script.remove();
    file.waiting = false;
  });
  script.addEventListener("error", () => {
    script.remove();
    VGS.files.delete(name);
    file.reject(new Error(`report_data/${name}.js cannot be read; is the folder beside the page whole?`));
  });
  document.head.append(script);
  return file;
};

VGS.receive = function (name, value) {
  if (name === "live") return VGS.heard(value);
  if (name !== "index") return VGS.files.get(name)?.resolve(value);
  const first = !VGS.index;
  VGS.index = value;
  if (first) VGS.start();
  else VGS.renew();
};

// ---------------------------------------------------------------------------------------------- numbers and colours

VGS.count = (value) => Math.round(value).toLocaleString("en-US");
VGS.short = function (value) {
  if (value === null) return "–";
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)}${unit}`;
  return `${Math.round(value)}`;
};
VGS.percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)}%`);

// Cividis (Nunez, Anderton, Renslow 2018), ten anchors: its lightness grows evenly, so it reads in grey and for the colour-blind.
VGS.CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
VGS.colour = function (value) {
  const at = Math.min(Math.max(value, 0), 1) * (VGS.CIVIDIS.length - 1);
  const below = Math.min(Math.floor(at), VGS.CIVIDIS.length - 2);
  const parts = [1, 3, 5].map((i) => {
    const [a, b] = [below, below + 1].map((k) => parseInt(VGS.CIVIDIS[k].slice(i, i + 2), 16));
    return Math.round(a + (b - a) * (at - below));
  });
  return `rgb(${parts.join(",")})`;
};
VGS.ink = (value) => (value > 0.55 ? "#111" : "#fff");

/** How far something is right, from 0 to 1; never by colour alone. */
VGS.verdict = function (share) {
  const [css, mark] = share === 1 ? ["right", "✓"] : share > 0 ? ["limited", "½"] : ["wrong", "✗"];
  return VGS.el("b", { class: `mark ${css}` }, mark);
};

/** How a finished block is shown: right, wrong, or length-limited; never by colour alone. Others: null. */
VGS.outcome = function (search, node) {
  if (!search.finish[node]) return null;
  if (search.graded[node]?.[1]) return { mark: "✓", word: "right", css: "right" };
  if (search.finish[node] === "length") return { mark: "…", word: "length-limited", css: "limited" };
  return { mark: "✗", word: "wrong", css: "wrong" };
};

// ------------------------------------------------------------------------------------------------ address, keyboard

VGS.address = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
VGS.changed = (change) => "#" + new URLSearchParams({ ...VGS.address(), ...change });
VGS.go = (change) => location.assign(VGS.changed(change));
/** Note something in the address without a step in the history, and without drawing anything. */
VGS.note = (change) => history.replaceState(null, "", VGS.changed(change));

VGS.run = () => VGS.index.runs[Number(VGS.address().run) || 0] || VGS.index.runs[0];

VGS.show = function () {
  const { view } = VGS.address();
  const name = view === "problems" || view === "problem" ? view : "overview";
  document.getElementById("tab-overview").classList.toggle("here", name === "overview");
  document.getElementById("tab-problems").classList.toggle("here", name !== "overview");
  document.getElementById("source-button").setAttribute("aria-pressed", String(VGS.sourceShown()));
  document.getElementById("run").value = VGS.index.runs.indexOf(VGS.run());
  return VGS.views[name]();
};
VGS.views = {}; // each draws itself; a promise where it has to read something first

/** Draw the view anew and stay where it is: what is scrolled, folded out, chosen and written. */
VGS.showAgain = async function () {
  const stay = VGS.place();
  await VGS.show();
  stay();
};

VGS.SCROLLED = "main .scroll, main .list-holder, main .filters, main .problem-text, main .tree-holder, main .pane";

/** A function that brings back the place in a view, after it was drawn again. */
VGS.place = function () {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = all("main pre").map((pre) => Number(pre.dataset.shown));
  const open = all("main details").map((details) => details.open);
  const scrolled = all(VGS.SCROLLED).map((box) => [box.scrollTop, box.scrollLeft]);
  const { scrollX, scrollY } = window;
  const active = document.activeElement;
  const focused = active.closest("main") && (active.dataset.node ? `[data-node="${active.dataset.node}"]` : active.type === "search" ? "[type=search]" : active.id && `#${active.id}`);
  const caret = active.type === "search" ? [active.selectionStart, active.selectionEnd] : null;
  return function () {
    all("main pre").forEach((pre, i) => pre.dispatchEvent(new CustomEvent("extend", { detail: shown[i] || 0 })));
    all("main details").forEach((details, i) => (details.open = open[i] ?? details.open));
    all(VGS.SCROLLED).forEach((box, i) => ([box.scrollTop, box.scrollLeft] = scrolled[i] || [0, 0]));
    const again = focused && document.querySelector(`main ${focused}`);
    again?.focus({ preventScroll: true });
    if (caret) again?.setSelectionRange(...caret);
    window.scrollTo(scrollX, scrollY);
  };
};

/** Replace what is shown. */
VGS.fill = (...children) => document.getElementById("main").replaceChildren(...children);

VGS.onKey = function (event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || document.getElementById("help").open) return;
  if (event.key === "m") VGS.switchSource();
  else if (event.key === "?") document.getElementById("help").showModal();
  else if (VGS.keys[event.key]) VGS.keys[event.key](event);
  else return;
  event.preventDefault();
};

VGS.start = function () {
  const select = document.getElementById("run");
  select.replaceChildren(...VGS.index.runs.map((run, i) => VGS.el("option", { value: i }, run.name)));
  select.addEventListener("change", () => VGS.go({ run: select.value, problem: 0, search: 0, node: "", view: VGS.address().view === "overview" ? "overview" : "problems" }));
  document.getElementById("run-label").hidden = VGS.index.runs.length < 2;
  document.getElementById("source-button").addEventListener("click", VGS.switchSource);
  document.title = `Search report: ${VGS.index.runs.map((run) => run.name).join(", ")}`;
  document.getElementById("help-button").addEventListener("click", () => document.getElementById("help").showModal());
  document.addEventListener("keydown", VGS.onKey);
  for (const view of ["overview", "problems"])
    document.getElementById(`tab-${view}`).addEventListener("click", (event) => {
      event.preventDefault();
      VGS.go({ view });
    });
  window.addEventListener("hashchange", VGS.show);
  VGS.show();
  VGS.listen();
};
