// One search as a tree: a column a round, a block's width its length, its colour its value.
// Kept blocks are full and solid, rejected ones low and dashed; ✓ ✗ … mark how a finished one ended.
"use strict";

VGS.BRANCH_GAP = 44; // px between columns, where the links run
VGS.LEFT = 52; // px for the prompt

/** Geometry: row height by the fullest round, column width by the room there is. Returns {x, y, width, height, row, ...}. */
VGS.layout = function (search, room) {
  const rounds = Math.max(...search.round) + 1;
  const columns = Array.from({ length: rounds }, () => []);
  search.round.forEach((round, node) => node && columns[round].push(node));
  const fullest = Math.max(...columns.map((nodes) => nodes.length));
  const row = fullest <= 16 ? 30 : fullest <= 40 ? 20 : 12;
  const column = Math.min(Math.max((room - VGS.LEFT) / rounds, 96), 320);
  const height = fullest * row;
  const longest = columns.map((nodes) => Math.max(1, ...nodes.map((node) => search.length[node])));
  const y = [height / 2 - row / 2];
  for (const nodes of columns) {
    const children = new Map();
    nodes.forEach((node) => children.set(search.parent[node], [...(children.get(search.parent[node]) || []), node]));
    const parents = [...children.keys()].sort((a, b) => y[a] - y[b]);
    const placed = parents.flatMap((parent) => children.get(parent).map((node, i, all) => [node, y[parent] + (i - (all.length - 1) / 2) * row]));
    placed.forEach(([node, wanted], i) => (y[node] = i ? Math.max(wanted, y[placed[i - 1][0]] + row) : Math.max(wanted, 0)));
    let limit = height - row; // and up again where the last ones fell out at the bottom
    for (const [node] of placed.reverse()) {
      y[node] = Math.min(y[node], limit);
      limit = y[node] - row;
    }
  }
  const x = search.round.map((round) => (round < 0 ? 0 : VGS.LEFT + round * column));
  const width = search.round.map((round, node) => (round < 0 ? 26 : Math.max(10, ((column - VGS.BRANCH_GAP) * search.length[node]) / longest[round])));
  return { x, y, width, row, column, columns, height, total: VGS.LEFT + rounds * column };
};

VGS.nodeLabel = function (search, node) {
  const outcome = VGS.outcome(search, node);
  const end = outcome ? `, finished, ${outcome.word}` : "";
  return `candidate ${node}, value ${search.value[node].toFixed(3)}, ${search.kept[node] ? "kept" : "rejected"}${end}, ${VGS.count(search.length[node])} tokens`;
};

VGS.drawNode = function (search, place, node, choose) {
  const { x, y, width, row } = place;
  const kept = search.kept[node];
  const high = kept ? row - 6 : Math.max(row - 14, 5);
  const top = y[node] + (row - high) / 2;
  const value = search.value[node];
  const group = VGS.el("g", { class: `node ${kept ? "kept" : "rejected"}`, "data-node": node, tabindex: -1, role: "button", "aria-label": VGS.nodeLabel(search, node), onclick: () => choose(node) },
    VGS.el("rect", { x: x[node], y: top, width: width[node], height: high, rx: 3, fill: VGS.colour(value) }));
  if (row >= 20 && width[node] >= 34 && (kept || row >= 30))
    group.append(VGS.el("text", { x: x[node] + 6, y: y[node] + row / 2 + 4, fill: VGS.ink(value), class: "value" }, value.toFixed(2)));
  const outcome = VGS.outcome(search, node);
  if (outcome) group.append(VGS.el("text", { x: x[node] + width[node] + 5, y: y[node] + row / 2 + 5, class: `outcome ${outcome.css}` }, outcome.mark));
  return group;
};

/** The tree as SVG, with the geometry of `layout`. `choose(node)` is called on a click. */
VGS.drawTree = function (search, place, choose) {
  const { x, y, width, row } = place;
  const top = 26;
  const links = VGS.el("g", { class: "links" });
  const nodes = VGS.el("g", {});
  nodes.append(VGS.el("g", { class: "prompt" }, VGS.el("rect", { x: 0, y: y[0], width: 26, height: row - 6, rx: 3 }), VGS.el("text", { x: 4, y: y[0] + row / 2 + 1 }, "P")));
  for (let node = 1; node < search.parent.length; node++) {
    const parent = search.parent[node];
    const [x0, y0, x1, y1] = [x[parent] + width[parent], y[parent] + row / 2, x[node], y[node] + row / 2];
    const bend = (x1 - x0) / 2;
    links.append(VGS.el("path", { d: `M${x0},${y0} C${x0 + bend},${y0} ${x1 - bend},${y1} ${x1},${y1}`, class: search.kept[node] ? "kept" : "rejected", "data-link": node }));
    nodes.append(VGS.drawNode(search, place, node, choose));
  }
  const title = (nodes, round) => `round ${round + 1}${place.column < 170 ? "" : ` · from token ${VGS.count(search.start[nodes[0]])}`}`;
  const heads = place.columns.map((nodes, round) =>
    VGS.el("text", { x: VGS.LEFT + round * place.column, y: -10, class: "column-head" }, search.flat ? "final beams (no journal: their blocks are not known)" : title(nodes, round)));
  return VGS.el("svg", { class: "tree", width: place.total + 24, height: place.height + top + 4, viewBox: `-2 ${-top} ${place.total + 26} ${place.height + top + 4}`, role: "group", "aria-label": "Search tree" },
    ...heads, links, nodes);
};

/** Path from the first block to a node. */
VGS.path = function (search, node) {
  const path = [];
  for (let at = node; at > 0; at = search.parent[at]) path.unshift(at);
  return path;
};

VGS.markNode = function (svg, search, node) {
  svg.querySelectorAll(".chosen, .on-path").forEach((item) => item.classList.remove("chosen", "on-path"));
  for (const above of VGS.path(search, node))
    svg.querySelectorAll(`[data-link="${above}"], [data-node="${above}"]`).forEach((item) => item.classList.add("on-path"));
  const group = svg.querySelector(`[data-node="${node}"]`);
  group?.classList.add("chosen");
  return group;
};

/** The node an arrow key leads to: up and down stay in the round, left is the parent, right the best child (kept first). */
VGS.step = function (search, place, node, key) {
  const inRound = search.parent.map((_, i) => i).filter((i) => i && search.round[i] === search.round[node]).sort((a, b) => place.y[a] - place.y[b]);
  const at = inRound.indexOf(node);
  if (key === "ArrowUp") return inRound[at - 1] ?? node;
  if (key === "ArrowDown") return inRound[at + 1] ?? node;
  if (key === "ArrowLeft") return search.parent[node] > 0 ? search.parent[node] : node;
  const children = search.parent.map((_, i) => i).filter((i) => i && search.parent[i] === node);
  children.sort((a, b) => search.kept[b] - search.kept[a] || search.value[b] - search.value[a]);
  return children[0] ?? node;
};
