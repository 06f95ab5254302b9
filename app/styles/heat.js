/* The layer x expert map. Rows are MoE layers, columns are experts. Two hues say where an expert
   is (teal: in a slot on the card; amber: offloaded), brightness says how hot it is. */
PreScope.heat = (canvas, tip) => {
  "use strict";
  const { rgb, colour, on } = PreScope;
  const MIN_HEIGHT = 104;
  const MAX_HEIGHT = 196;
  const RESIDENT = 0x80;
  let shape = null;
  let cells = null;
  let geometry = null;
  let cursor = null;
  let ramps = null;

  const readRamps = () => {
    const mix = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
    const ramp = (low, high) => {
      const [a, b] = [rgb(low), rgb(high)];
      return Array.from({ length: 128 }, (_, i) => mix(a, b, Math.sqrt(i / 127)));
    };
    ramps = [ramp("--ps-heat-off", "--ps-heat-off-hot"), ramp("--ps-heat-on", "--ps-heat-on-hot")];
  };
  on("theme", () => { ramps = null; });

  const decode = (base64) => {
    const raw = atob(base64);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const paint = (i) => ramps[cells[i] & RESIDENT ? 1 : 0][cells[i] & 0x7f];

  const redraw = () => {
    if (!cells || !canvas.parentElement) return;
    if (!ramps) readRamps();
    const { layers, experts } = shape;
    const width = canvas.clientWidth;
    if (!width) return;
    const dpr = devicePixelRatio || 1;
    const cw = width / experts;
    const ch = Math.min(Math.max(cw, MIN_HEIGHT / layers, 3), 18, MAX_HEIGHT / layers);
    const height = Math.max(Math.round(ch * layers), 24);
    if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
    const W = Math.round(width * dpr), H = Math.round(height * dpr);
    if (canvas.width !== W || canvas.height !== H) { canvas.width = W; canvas.height = H; }
    geometry = { cw: width / experts, ch: height / layers };
    const g = canvas.getContext("2d");
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, W, H);
    if (geometry.cw >= 4 && geometry.ch >= 4) drawCells(g, W, H);
    else drawPixels(g, W, H);
    drawCursor(g, dpr);
  };

  const drawCells = (g, W, H) => {
    const { layers, experts } = shape;
    const edge = colour("--ps-heat-edge");
    for (let l = 0; l < layers; l++) {
      const y0 = Math.round((l * H) / layers), y1 = Math.round(((l + 1) * H) / layers);
      for (let e = 0; e < experts; e++) {
        const x0 = Math.round((e * W) / experts), x1 = Math.round(((e + 1) * W) / experts);
        const i = l * experts + e;
        const [r, gr, b] = paint(i);
        g.fillStyle = `rgb(${r},${gr},${b})`;
        g.fillRect(x0, y0, x1 - x0 - 1, y1 - y0 - 1);
        if (cells[i] & RESIDENT && x1 - x0 >= 7) {
          g.strokeStyle = edge;
          g.strokeRect(x0 + 0.5, y0 + 0.5, x1 - x0 - 2, y1 - y0 - 2);
        }
      }
    }
  };
  const drawPixels = (g, W, H) => {
    const { layers, experts } = shape;
    const image = new ImageData(experts, layers);
    for (let i = 0; i < cells.length; i++) {
      const [r, gr, b] = paint(i);
      image.data.set([r, gr, b, 255], i * 4);
    }
    const small = new OffscreenCanvas(experts, layers);
    small.getContext("2d").putImageData(image, 0, 0);
    g.imageSmoothingEnabled = W < experts;
    g.drawImage(small, 0, 0, W, H);
  };
  const drawCursor = (g, dpr) => {
    if (!cursor) return;
    const { cw, ch } = geometry;
    g.setTransform(dpr, 0, 0, dpr, 0, 0);
    g.strokeStyle = colour("--ps-text");
    g.lineWidth = 1.5;
    const w = Math.max(cw, 5), h = Math.max(ch, 5);
    g.strokeRect(cursor.e * cw + cw / 2 - w / 2, cursor.l * ch + ch / 2 - h / 2, w, h);
  };

  const point = (l, e) => {
    if (!cells || !geometry) return;
    cursor = { l: Math.max(0, Math.min(shape.layers - 1, l)), e: Math.max(0, Math.min(shape.experts - 1, e)) };
    const cell = cells[cursor.l * shape.experts + cursor.e];
    const heat = Math.round(((cell & 0x7f) / 127) * 100);
    const where = cell & RESIDENT ? "on the card" : "offloaded";
    const said = `Layer ${cursor.l}, expert ${cursor.e}: ${where}, heat ${heat} %`;
    if (tip.textContent !== said) tip.textContent = said;
    tip.hidden = false;
    const half = tip.offsetWidth / 2;
    const x = Math.max(half, Math.min(canvas.clientWidth - half, (cursor.e + 0.5) * geometry.cw));
    tip.style.left = `${x}px`;
    tip.style.top = `${cursor.l * geometry.ch - 6}px`;
    redraw();
  };
  const leave = () => { cursor = null; tip.hidden = true; redraw(); };

  canvas.addEventListener("pointermove", (e) => {
    if (!geometry) return;
    point(Math.floor(e.offsetY / geometry.ch), Math.floor(e.offsetX / geometry.cw));
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (!step) return;
    e.preventDefault();
    const from = cursor || { l: 0, e: 0 };
    point(from.l + (cursor ? step[0] : 0), from.e + (cursor ? step[1] : 0));
  });

  const draw = (s) => {
    const bytes = s.heat ? decode(s.heat) : null;
    if (!bytes || bytes.length !== s.layers * s.experts) return;
    shape = { layers: s.layers, experts: s.experts };
    cells = bytes;
    let resident = 0;
    for (const c of bytes) if (c & RESIDENT) resident++;
    const said = `${s.layers} layers by ${s.experts} experts, ${resident} of ${bytes.length} on the card. Use the arrow keys to read single experts.`;
    if (canvas.getAttribute("aria-label") !== said) canvas.setAttribute("aria-label", said);
    if (cursor) point(cursor.l, cursor.e);
    else redraw();
  };
  return { draw, redraw };
};
