/* One EventSource per browser, however many tabs: the tab that holds the Web Lock listens and
   hands each tick to the others. A browser opens six sockets per origin, so one stream per tab
   would lock the later tabs out. A visible tab that hears nothing takes the lock over. */
(() => {
  "use strict";
  const NAME = "ps-live";
  const QUIET_MS = 12000;
  const RETRY_MS = 2000;
  const channel = new BroadcastChannel(NAME);
  let source = null;
  let leader = false;
  let heard = performance.now();
  let pending = null;

  const show = (tick) => {
    heard = performance.now();
    if (document.hidden) pending = tick;
    else PreScope.emit("live", tick);
  };
  const link = (state) => {
    if (PreScope.latest.link !== state) PreScope.emit("link", state);
  };
  const tell = (message) => channel.postMessage(message);

  channel.onmessage = ({ data }) => {
    if (data.tick) { link("open"); show(data.tick); }
    else if (data.link) { heard = performance.now(); link(data.link); }
    else if (data.changed) PreScope.onChanged?.(data.changed);
    else if (data.ask && leader) {
      if (PreScope.latest.live || pending) tell({ tick: pending || PreScope.latest.live });
      tell({ link: PreScope.latest.link || "connecting" });
    }
  };
  PreScope.announce = (changed) => tell({ changed });
  PreScope.leading = () => leader;

  const open = () => {
    source = new EventSource("/live");
    source.onopen = () => { link("open"); tell({ link: "open" }); };
    source.onmessage = (e) => {
      const tick = JSON.parse(e.data);
      link("open");
      tell({ tick });
      show(tick);
    };
    source.onerror = () => {
      link("lost");
      tell({ link: "lost" });
      if (source && source.readyState === EventSource.CLOSED) {
        source = null;
        setTimeout(() => { if (leader && !source) open(); }, RETRY_MS);
      }
    };
  };
  const close = () => { leader = false; source?.close(); source = null; };

  const lead = (options) =>
    navigator.locks.request(NAME, options, () => {
      leader = true;
      open();
      return new Promise(() => {});
    }).catch(() => { close(); lead({}); });   /* another tab took the lock: queue up again */

  const start = () => {
    if (!navigator.locks) { leader = true; open(); return; }
    lead({});
    tell({ ask: true });
  };
  const check = () => {
    if (document.hidden || leader || !navigator.locks) return;
    if (performance.now() - heard > QUIET_MS) {
      heard = performance.now();
      lead({ steal: true });
    } else if (performance.now() - heard > QUIET_MS / 3) tell({ ask: true });
  };
  setInterval(check, 2000);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    if (pending) { const tick = pending; pending = null; PreScope.emit("live", tick); }
    check();
  });
  addEventListener("pagehide", () => source?.close());
  addEventListener("pageshow", (e) => { if (e.persisted && leader) open(); });
  start();
})();
