/* The chat column: pulls the running answer, keeps the scroll at the end unless the person
   scrolled up, keyboard, and a clipboard without the joiners that make model text inert. */
PreScope.pulse = (element, props, trigger, watch) => {
  "use strict";
  /* The running answer is pulled in short requests, up to nine a second, fewer while nothing new
     comes: a stream per tab would use up the six sockets a browser opens per origin. A hidden tab
     looks once a second. */
  const GAP_MS = 110;
  const IDLE_GAP_MS = 330;
  const HIDDEN_MS = 1000;
  const LOST_MS = 6000;
  let timer = 0;
  let asked = 0;
  let pace = GAP_MS;
  let state = { conv: "", live: false, version: 0, n: 0 };

  const ask = () => {
    clearTimeout(timer);
    asked = performance.now();
    trigger("pull", { version: state.version });
    timer = setTimeout(() => { if (state.live) ask(); }, LOST_MS);
  };
  const next = () => {
    clearTimeout(timer);
    if (!state.live || PreScope.latest.link === "lost") return;
    const gap = document.hidden ? HIDDEN_MS : pace;
    timer = setTimeout(ask, Math.max(0, gap - (performance.now() - asked)));
  };
  watch("value", () => {
    const now = props.value;
    if (!now) return;
    const was = state;
    state = now;
    pace = was.conv === now.conv && was.version === now.version ? Math.min(pace * 1.4, IDLE_GAP_MS) : GAP_MS;
    const here = PreScope.conversation();
    if (now.created) PreScope.setConversation(now.conv, true);
    else if ((now.asked ?? (now.pulled ? now.conv : here)) !== here) { PreScope.open(here); return; }
    else if (now.gone) PreScope.setConversation("", true);
    if (now.changed) PreScope.announce(now.about || now.conv);
    document.body.classList.toggle("ps-live", now.live);
    if (!now.pulled && now.live) PreScope.follow();
    if (was.live && !now.live) document.querySelector("#box textarea")?.focus({ preventScroll: true });
    next();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && state.live) ask(); });
  PreScope.on("link", (link) => { if (link === "open" && state.live) next(); });
};

(() => {
  "use strict";
  const $ = (s) => document.querySelector(s);

  /* ---- scroll ---- */
  let pinned = true;
  PreScope.follow = () => { pinned = true; const b = $("#scroll"); if (b) b.scrollTop = b.scrollHeight; };
  const watchScroll = () => {
    const box = $("#scroll");
    if (!box || !$("#chat") || !$("#live")) return setTimeout(watchScroll, 60);
    const jump = $("#ps-jump");
    const sync = () => {
      pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 64;
      jump?.classList.toggle("on", !pinned);
    };
    box.addEventListener("scroll", sync, { passive: true });
    const keep = new ResizeObserver(() => { if (pinned) box.scrollTop = box.scrollHeight; else sync(); });
    for (const child of box.children) keep.observe(child);
    keep.observe(box);
    PreScope.on("conv", () => { pinned = true; });
  };
  PreScope.ready(watchScroll);
  document.addEventListener("click", (e) => {
    if (e.target.closest?.("#ps-jump")) PreScope.follow();
    const ask = e.target.closest?.("[data-ask]");
    if (ask) PreScope.ask?.(ask.dataset.ask);
  }, true);

  /* ---- a draft outlives a reload of its tab ---- */
  const DRAFT = "ps-draft";
  addEventListener("pagehide", () => {
    const text = $("#box textarea")?.value || "";
    if (text) sessionStorage.setItem(DRAFT, text);
    else sessionStorage.removeItem(DRAFT);
  });
  const restore = () => {
    const box = $("#box textarea");
    if (!box) { setTimeout(restore, 60); return; }
    const text = sessionStorage.getItem(DRAFT);
    sessionStorage.removeItem(DRAFT);
    if (!text || box.value) return;
    box.value = text;
    box.dispatchEvent(new InputEvent("input", { bubbles: true }));
  };
  PreScope.ready(restore);

  /* ---- keyboard ---- */
  const stop = () => {
    const b = document.body.classList.contains("ps-live") ? $("#box .stop-button, #box button") : null;
    b?.click();
    return Boolean(b);
  };
  document.addEventListener("keydown", (e) => {
    const mod = e.ctrlKey || e.metaKey;
    if (mod && !e.shiftKey && e.key.toLowerCase() === "k") {
      e.preventDefault();
      if (matchMedia("(max-width: 759.5px)").matches) PreScope.toggle("side", true);
      const s = $("#search textarea, #search input");
      s?.focus();
      s?.select();
    } else if (mod && e.shiftKey && e.key.toLowerCase() === "o") {
      e.preventDefault();
      $("#new")?.click();
    } else if (mod && e.key === ",") {
      e.preventDefault();
      PreScope.toggle("settings");
    } else if (e.key === "Escape" && !e.defaultPrevented) {
      if (PreScope.closeDrawers()) return;
      const search = $("#search textarea, #search input");
      if (document.activeElement === search) { $("#box textarea")?.focus(); return; }
      stop();
    }
  });

  /* ---- clipboard: an answer without its thinking and figures, and without the word joiners
     that keep a model's text from being markup ---- */
  const clean = (s) => s.replace(/\u2060/g, "");
  let instead = null;
  document.addEventListener("click", (e) => {
    const b = e.target.closest?.("#chat [aria-label='Copy message']");
    if (!b) return;
    const row = b.closest(".message-buttons")?.previousElementSibling;
    const said = [...(row?.querySelectorAll("[data-testid]") || [])]
      .filter((m) => !m.querySelector(".thought-group, .ps-foot"))
      .map((m) => (m.dataset.said || m.getAttribute("aria-label") || "").replace(/^(bot|user)'s message: /, ""));
    instead = said.length ? said.join("\n") : null;
  }, true);
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (s) => {
      const text = clean(instead ?? String(s));
      instead = null;
      return write(text);
    };
  }
  document.addEventListener("copy", (e) => {
    const s = String(getSelection());
    if (!s.includes("\u2060") || !e.clipboardData) return;
    e.clipboardData.setData("text/plain", clean(s));
    e.preventDefault();
  });

  /* ---- names for what Gradio leaves unnamed ---- */
  const label = (el, text) => { if (el.getAttribute("aria-label") !== text) el.setAttribute("aria-label", text); };
  const nameParts = () => {
    for (const foot of document.querySelectorAll("#chat .ps-foot")) {
      const said = foot.closest("[data-testid]");
      if (said) label(said, [...foot.children].map((c) => c.textContent).join(", "));
    }
    for (const arrow of document.querySelectorAll("#scroll .thought-group .arrow button")) {
      label(arrow, "Show or hide the thinking");
      if (arrow.tabIndex !== -1) arrow.tabIndex = -1;
    }
    const send = $("#box .submit-button"), halt = $("#box .stop-button");
    if (send) { label(send, "Send"); send.title = "Send (Enter)"; }
    if (halt) { label(halt, "Stop"); halt.title = "Stop (Esc)"; }
    for (const b of document.querySelectorAll("#scroll .copy_code_button")) label(b, "Copy code");
    const log = $("#live [role=log]");          /* read out once it is whole, not ten times a second */
    if (log && log.getAttribute("aria-live") !== "off") log.setAttribute("aria-live", "off");
    const drawer = $("#drawer");
    if (drawer && !drawer.hasAttribute("role")) { drawer.setAttribute("role", "dialog"); label(drawer, "Settings"); }
  };
  let due = 0;
  PreScope.ready(() => {
    new MutationObserver(() => { due = due || requestAnimationFrame(() => { due = 0; nameParts(); }); })
      .observe(document.body, { childList: true, subtree: true });
  });
})();

/* "Show earlier messages" stands above a long chat. */
PreScope.earlier = (element, props, trigger, watch) => {
  "use strict";
  const show = () => {
    const hidden = props.value?.hidden || 0;
    element.classList.toggle("some", hidden > 0);
    const b = element.querySelector("button");
    if (b) b.textContent = `Show earlier messages (${hidden})`;
  };
  element.addEventListener("click", (e) => {
    if (e.target.closest("button")) trigger("show_earlier", {});
  });
  watch("value", show);
  show();
};

/* A new chat: the address forgets the old one and the cursor goes to the composer. */
PreScope.fresh = () => {
  PreScope.setConversation("");
  document.body.classList.remove("ps-side");
  document.querySelector("#box textarea")?.focus();
};
