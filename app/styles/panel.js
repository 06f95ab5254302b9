/* The live panel: one tick in, text and small canvases out. Text nodes are touched only when
   they change, so nothing flickers and nothing reflows. */
PreScope.panel = (element, trigger) => {
  "use strict";
  const { fixed, rate, bytes, seconds, colour, on } = PreScope;
  const REDUCED = matchMedia("(prefers-reduced-motion: reduce)");
  const STALE_MS = 4000;
  const WINDOW = 160;                       /* samples kept: forty seconds at 4 Hz */
  const root = element.querySelector(".ps-panel");
  const at = {};
  for (const el of root.querySelectorAll("[data-k]")) at[el.dataset.k] = el;
  const shares = [...at.stack.children];
  const legend = [...at.legend.children].map((li) => li.querySelector("b"));
  const lines = { tps: [], link: [] };
  const heat = PreScope.heat(at.heat, at.tip);
  const stalls = PreScope.stalls(at.stalls, at.tip, at.stallmax);
  const ahead = PreScope.prediction(at, trigger);
  let last = null;
  let lastTick = performance.now();
  let linkState = "connecting";
  let device = "";

  const count = (n) => n.toLocaleString("en-US");
  const text = (el, value) => { if (el.textContent !== value) el.textContent = value; };
  const bar = (el, share) => {
    const pct = Math.max(0, Math.min(100, Math.round(share * 100) || 0));
    el.firstElementChild.style.width = `${pct}%`;
    el.setAttribute("aria-valuenow", String(pct));
  };

  /* ---- sparklines ---- */
  const spark = (canvas, samples, stroke, ceiling) => {
    const w = canvas.clientWidth, h = canvas.clientHeight, dpr = devicePixelRatio || 1;
    if (!w) return;
    if (canvas.width !== Math.round(w * dpr) || canvas.height !== Math.round(h * dpr)) {
      canvas.width = Math.round(w * dpr);
      canvas.height = Math.round(h * dpr);
    }
    const g = canvas.getContext("2d");
    g.setTransform(dpr, 0, 0, dpr, 0, 0);
    g.clearRect(0, 0, w, h);
    const top = Math.max(ceiling || 0, ...samples, 1e-9) * (ceiling ? 1.0 : 1.15);
    const pad = 3, floor = h - 1.5;
    const y = (v) => floor - (v / top) * (floor - pad);
    g.strokeStyle = colour("--ps-line");
    g.lineWidth = 1;
    g.beginPath(); g.moveTo(0, h - 0.5); g.lineTo(w, h - 0.5); g.stroke();
    if (ceiling) {
      g.setLineDash([2, 4]);
      g.strokeStyle = colour("--ps-faint");
      g.beginPath(); g.moveTo(0, Math.round(y(ceiling)) + 0.5); g.lineTo(w, Math.round(y(ceiling)) + 0.5); g.stroke();
      g.setLineDash([]);
    }
    if (samples.length < 2) return;
    const step = w / (WINDOW - 1), x0 = w - (samples.length - 1) * step;
    g.beginPath();
    samples.forEach((v, i) => (i ? g.lineTo(x0 + i * step, y(v)) : g.moveTo(x0, y(v))));
    g.strokeStyle = stroke;
    g.lineWidth = 1.5;
    g.lineJoin = "round";
    g.stroke();
    g.lineTo(w, floor); g.lineTo(x0, floor); g.closePath();
    g.globalAlpha = 0.13; g.fillStyle = stroke; g.fill(); g.globalAlpha = 1;
    const end = samples[samples.length - 1];
    g.beginPath(); g.arc(w - 2.5, y(end), 2.5, 0, 7); g.fillStyle = stroke; g.fill();
  };
  const drawLines = () => {
    spark(at.tpsline, lines.tps, colour("--ps-accent-data"), 0);
    spark(at.linkline, lines.link, colour("--ps-s1"), last?.link_max_bytes_per_s || 0);
  };

  /* ---- the head: state, badge, sentence ---- */
  const STATES = {
    starting: ["Engine starting", "busy"],
    empty: ["No model loaded", "idle"],
    loading: ["Loading a model", "busy"],
    ready: ["Ready", "ready"],
    restarting: ["Engine restarting", "warn"],
    dead: ["Engine stopped", "bad"],
  };
  const head = (status, snapshot) => {
    let [label, kind] = STATES[status?.state] || ["Connecting", "busy"];
    if (status?.state === "ready" && snapshot?.generating) [label, kind] = ["Answering", "live"];
    if (linkState === "lost") [label, kind] = ["Connection lost", "bad"];
    text(at.state.lastElementChild, label);
    at.state.dataset.kind = kind;
    at.state.title = device;
  };

  const draw = ({ status, snapshot: s, limit, prediction }) => {
    lastTick = performance.now();
    root.classList.remove("stale");
    head(status, s);
    if (!REDUCED.matches) at.state.classList.toggle("off", (PreScope.ticks || 0) % 4 > 1);
    if (limit?.text) {
      text(at.limit, limit.text);
      text(at.advice, limit.advice || "");
    } else {
      text(at.limit, status?.state === "empty" ? "Load a model to begin." : s ? "Idle. Ask something and watch the experts move." : "Waiting for the engine.");
      text(at.advice, "");
    }
    const emulated = Boolean(s?.emulated);
    at.emulated.hidden = at.linktag.hidden = at.vramtag.hidden = at.aheadtag.hidden = !emulated;
    ahead.draw(prediction, s);
    if (!s) { root.classList.add("empty"); return; }
    root.classList.remove("empty");
    device = s.device;

    /* Between answers the figures of the last one stay, dimmed. */
    const uses = s.served.reduce((a, b) => a + b, 0);
    root.classList.toggle("idle", !s.generating);
    at.was.hidden = s.generating || at.tps.textContent === "–";
    if (s.tokens_per_s > 0) text(at.tps, fixed(s.tokens_per_s, s.tokens_per_s < 100 ? 1 : 0));
    if (s.ttft_s > 0) {
      const [ttft, unit] = seconds(s.ttft_s);
      text(at.ttft, ttft); text(at.ttftu, unit);
    }
    if (s.token_s > 0) {
      const [stall, unit] = s.stall_s_per_token > 0 ? seconds(s.stall_s_per_token) : ["0", "ms"];
      text(at.stall, stall); text(at.stallu, unit);
    }
    if (s.token_s > 0) {
      const wait = Math.min(s.stall_s_per_token, s.token_s);
      const cpu = Math.min(s.cpu_s_per_token, s.token_s - wait);
      const parts = [wait, cpu, s.token_s - wait - cpu];
      const [scale, unit] = s.token_s < 1 ? [1000, "ms"] : [1, "s"];
      const said = parts.map((v) => (v > 0 ? fixed(v * scale, v * scale < 10 ? 1 : 0) : "0"));
      parts.forEach((v, i) => {
        at.tokenbar.children[i].style.flexGrow = String(v / s.token_s);
        at.tokenbar.children[i].classList.toggle("none", !(v > 0));
      });
      at.tokenbar.classList.add("on");
      text(at.tokens, seconds(s.token_s).join(" "));
      text(at.tokenw, said[0]); text(at.tokenc, said[1]); text(at.tokenr, said[2]);
      at.tokenbar.setAttribute("aria-label", `Of one token: waiting ${said[0]}, CPU ${said[1]}, the rest ${said[2]} ${unit}`);
    }
    if (uses) text(at.hit, fixed(s.hit_rate * 100, s.hit_rate > 0.9995 ? 0 : 1));

    if (uses) {
      const said = [];
      s.served.forEach((n, i) => {
        const pct = (n / uses) * 100;
        shares[i].style.flexGrow = String(n);
        shares[i].classList.toggle("none", n === 0);
        text(legend[i], n === 0 ? "0 %" : pct < 0.1 ? "<0.1 %" : `${fixed(pct, 1)} %`);
        legend[i].title = `${n} uses in the last second`;
        said.push(`${legend[i].previousElementSibling.textContent} ${fixed(pct, 0)} %`);
      });
      at.stack.setAttribute("aria-label", said.join(", "));
      at.stack.classList.add("on");
    }

    const now = s.link_bytes_per_s > 0 ? rate(s.link_bytes_per_s, s.link_max_bytes_per_s)[0] : "0";
    const [max, unit] = rate(s.link_max_bytes_per_s);
    text(at.link, now);
    text(at.linkof, s.link_max_bytes_per_s > 0 ? `of ${max} ${unit}` : unit);
    at.linkof.title = `${bytes(s.link_bytes_total)} copied since the model was loaded`;

    bar(at.vram, s.vram_used_bytes / s.vram_budget_bytes);
    text(at.vramtext, `${bytes(s.vram_used_bytes)} of ${bytes(s.vram_budget_bytes)}`);
    bar(at.ram, s.ram_used_bytes / s.ram_total_bytes);
    at.ram.classList.toggle("full", s.ram_used_bytes > 0.95 * s.ram_total_bytes);
    text(at.ramtext, `${bytes(s.ram_used_bytes)} of ${bytes(s.ram_total_bytes)}`);
    const total = s.layers * s.experts;
    text(at.slots, s.cache_slots
      ? `${count(s.cache_slots_used)} of ${count(s.cache_slots)} slots, ${count(total)} experts`
      : `${count(total)} experts`);

    if (!last || s.sequence !== last.sequence) {
      for (const [key, v] of [["tps", s.generating ? s.tokens_per_s : 0], ["link", s.link_bytes_per_s]]) {
        lines[key].push(v);
        if (lines[key].length > WINDOW) lines[key].shift();
      }
    }
    last = s;
    PreScope.ticks = (PreScope.ticks || 0) + 1;
    drawLines();
    heat.draw(s);
    stalls.draw(s);
  };

  on("live", draw);
  on("link", (state) => {
    linkState = state;
    head(PreScope.latest.live?.status, last);
    root.classList.toggle("stale", state === "lost");
  });
  const redraw = () => { drawLines(); heat.redraw(); stalls.redraw(); };
  on("theme", redraw);
  new ResizeObserver(redraw).observe(root);
  setInterval(() => {
    const quiet = performance.now() - lastTick > STALE_MS;
    if (!document.hidden && (linkState === "lost" || (quiet && last?.generating))) root.classList.add("stale");
  }, 1000);
};
