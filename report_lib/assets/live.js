// A page whose run goes on asks now and then, by a small file, whether it was renewed; then it reads its data again and stays where it is.
"use strict";

VGS.LIVE_SECONDS = 2;
VGS.liveState = "live";
VGS.LIVE_WORDS = { live: "live", stopped: "no longer renewed", finished: "the run is finished" };

VGS.listen = function () {
  VGS.sayLive();
  if (VGS.index.live) setTimeout(VGS.ask, 1000 * VGS.LIVE_SECONDS);
};

VGS.sayLive = function (state = VGS.liveState) {
  VGS.liveState = state;
  const line = document.getElementById("live");
  line.hidden = !VGS.index.live;
  line.textContent = `${VGS.LIVE_WORDS[state]} · as of ${VGS.index.as_of}`;
};

VGS.ask = function () {
  if (document.hidden) return setTimeout(VGS.ask, 1000 * VGS.LIVE_SECONDS);
  const script = VGS.script("live", Date.now());
  script.addEventListener("load", () => script.remove());
  script.addEventListener("error", () => { script.remove(); VGS.sayLive("stopped"); });
  document.head.append(script);
};

/** What report_data/live.js says: {version, state}. */
VGS.heard = function ({ version, state }) {
  if (version !== VGS.index.live) {
    const script = VGS.script("index", version);
    script.addEventListener("load", () => script.remove());
    document.head.append(script);
  }
  VGS.sayLive(state);
  if (state === "live") setTimeout(VGS.ask, 1000 * VGS.LIVE_SECONDS);
};

/** Show the data that were just read. A problem that is as it was is not drawn again. */
VGS.renew = async function () {
  const row = VGS.order[VGS.listState.at];
  VGS.listed();
  VGS.listState.at = Math.max(VGS.order.indexOf(row), 0);
  VGS.sayLive();
  for (const [name, file] of VGS.files) if (!file.waiting) VGS.files.delete(name);
  const { view, problem } = VGS.address();
  const held = VGS.shownProblem;
  const shown = view === "problem" && held?.name === `${VGS.run().folder}/p${problem}`;
  if (shown && JSON.stringify(await VGS.load(held.name)) === held.json) return;
  VGS.showAgain();
};
