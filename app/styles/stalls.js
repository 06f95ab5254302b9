/* Waiting bubbles: one bar per layer, each in the row its layer has in the heat map beside it. */
PreScope.stalls = (canvas, tip, most) => {
  "use strict";
  const { colour, seconds } = PreScope;
  const NONE = "none";
  let waits = [];
  let cursor = null;

  const said = (s) => (s > 0 ? seconds(s).join(" ") : NONE);
  const redraw = () => {
    const heat = canvas.previousElementSibling;
    const w = canvas.clientWidth, h = heat.clientHeight, dpr = devicePixelRatio || 1;
    if (!w || !h) return;
    if (canvas.style.height !== heat.style.height) canvas.style.height = heat.style.height;
    const W = Math.round(w * dpr), H = Math.round(h * dpr);
    if (canvas.width !== W || canvas.height !== H) { canvas.width = W; canvas.height = H; }
    const g = canvas.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, W, H);
    g.fillStyle = colour("--ps-line-strong");
    g.fillRect(0, 0, Math.max(1, Math.round(dpr)), H);
    const top = Math.max(...waits, 0);
    if (!top) return;
    const bar = colour("--ps-s3"), n = waits.length;
    for (let l = 0; l < n; l++) {
      const y0 = Math.round((l * H) / n), y1 = Math.round(((l + 1) * H) / n);
      const gap = y1 - y0 >= 4 ? Math.max(1, Math.round((y1 - y0) * 0.22)) : 0;
      const length = waits[l] > 0 ? Math.max(dpr, (waits[l] / top) * (W - 3 * dpr)) : 0;
      g.globalAlpha = cursor === null || cursor === l ? 1 : 0.5;
      g.fillStyle = bar;
      g.fillRect(2 * dpr, y0 + gap, length, Math.max(1, y1 - y0 - 2 * gap - (gap ? 1 : 0)));
    }
    g.globalAlpha = 1;
  };
  const point = (l) => {
    if (!waits.length) return;
    cursor = Math.max(0, Math.min(waits.length - 1, l));
    const text = waits[cursor] > 0 ? `Layer ${cursor} waits ${said(waits[cursor])} per token` : `Layer ${cursor} does not wait`;
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${canvas.parentElement.clientWidth - tip.offsetWidth / 2}px`;
    tip.style.top = `${(cursor * canvas.clientHeight) / waits.length - 6}px`;
    redraw();
  };
  const leave = () => { cursor = null; tip.hidden = true; redraw(); };

  canvas.addEventListener("pointermove", (e) => point(Math.floor((e.offsetY / canvas.clientHeight) * waits.length)));
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[e.key];
    if (!step) return;
    e.preventDefault();
    point(cursor === null ? 0 : cursor + step);
  });

  const draw = (s) => {
    waits = s.stall_s_by_layer || [];
    const top = Math.max(...waits, 0);
    const text = waits.length ? `${top > 0 ? "≤ " : ""}${said(top)}` : "–";
    if (most.textContent !== text) most.textContent = text;
    const label = top > 0
      ? `Waiting per layer and token: most in layer ${waits.indexOf(top)}, ${said(top)}. Use the arrow keys to read single layers.`
      : "Waiting per layer and token: none";
    if (canvas.getAttribute("aria-label") !== label) canvas.setAttribute("aria-label", label);
    if (cursor === null) redraw(); else point(cursor);
  };
  return { draw, redraw };
};
