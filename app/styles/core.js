/* The page's own small core: a bus for live ticks, number formats, colours, theme.
   Everything hangs on window.PreScope; nothing here talks to any other machine. */
window.PreScope = (() => {
  "use strict";
  const listeners = { live: new Set(), link: new Set(), theme: new Set(), conv: new Set() };
  const latest = {};

  const ready = (fn) => {
    if (document.body && document.readyState !== "loading") fn();
    else document.addEventListener("DOMContentLoaded", fn);
  };
  const on = (topic, fn) => {
    listeners[topic].add(fn);
    if (topic in latest) fn(latest[topic]);
    return () => listeners[topic].delete(fn);
  };
  const emit = (topic, value) => {
    latest[topic] = value;
    for (const fn of listeners[topic]) fn(value);
  };

  /* ---- numbers ---- */
  const fixed = (n, digits) => (Number.isFinite(n) ? n.toFixed(digits) : "–");
  const digitsFor = (n) => (n >= 100 ? 0 : n >= 10 ? 1 : 2);
  const rate = (n, of = n) => {
    const giga = of >= 1e9 || n >= 1e9;
    const v = n / (giga ? 1e9 : 1e6);
    return [fixed(v, digitsFor(v)), giga ? "GB/s" : "MB/s"];
  };
  const bytes = (n) => {
    const [v, u] = n >= 1e9 ? [n / 1e9, "GB"] : n >= 1e6 ? [n / 1e6, "MB"] : [n / 1e3, "kB"];
    return `${fixed(v, v >= 100 ? 0 : 1)} ${u}`;
  };
  const seconds = (s) => {
    if (!(s > 0)) return ["–", "s"];
    return s < 1 ? [fixed(s * 1000, s < 0.01 ? 1 : 0), "ms"] : [fixed(s, s < 10 ? 2 : 1), "s"];
  };

  /* ---- colours: canvases read them from CSS, again after every theme change ---- */
  const colour = (name) =>
    getComputedStyle(document.body || document.documentElement).getPropertyValue(name).trim();
  const rgb = (name) => {
    const hex = colour(name).replace("#", "");
    return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) || 0);
  };

  /* ---- theme: auto, light or dark; kept here so that the first paint is right ---- */
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const themeName = () => {
    const kept = localStorage.getItem("ps-theme");
    return kept === "light" || kept === "dark" ? kept : "auto";
  };
  const applyTheme = () => {
    const name = themeName();
    const dark = name === "dark" || (name === "auto" && prefersDark.matches);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    if (!document.body) return;
    if (document.body.classList.contains("dark") !== dark) {
      document.body.classList.toggle("dark", dark);
    }
    emit("theme", dark);
  };
  const setTheme = (name) => {
    if (name !== themeName()) localStorage.setItem("ps-theme", name);
    applyTheme();
  };
  prefersDark.addEventListener("change", applyTheme);
  addEventListener("storage", (e) => { if (e.key === "ps-theme") applyTheme(); });
  ready(() => {
    applyTheme();
    /* Gradio sets the class from the system when it mounts: put the person's choice back. */
    new MutationObserver(() => {
      const name = themeName();
      const dark = name === "dark" || (name === "auto" && prefersDark.matches);
      if (document.body.classList.contains("dark") !== dark) applyTheme();
    }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });

  /* ---- the conversation in the address, so that a reload comes back to it ---- */
  const conversation = () => decodeURIComponent((location.hash.match(/^#c=(.+)$/) || [, ""])[1]);
  const setConversation = (id, replace = false) => {
    const hash = id ? `#c=${encodeURIComponent(id)}` : "";
    if (location.hash !== hash) {
      const address = location.pathname + location.search + hash;
      if (replace) history.replaceState(null, "", address);
      else history.pushState(null, "", address);
    }
    emit("conv", id);
  };

  /* ---- drawers ---- */
  const NARROW = matchMedia("(max-width: 1099.5px)");
  const body = () => document.body.classList;
  const focusSoon = (selector, tries = 10) => {     /* what is still sliding in cannot take it yet */
    const el = document.querySelector(selector);
    el?.focus();
    if (el && document.activeElement !== el && tries) setTimeout(focusSoon, 50, selector, tries - 1);
  };
  const toggle = (what, state) => {
    const name = { side: "ps-side", right: "ps-right", settings: "ps-settings" }[what];
    if (what === "right" && !NARROW.matches) {
      const closed = body().toggle("ps-right-closed", state === undefined ? undefined : !state);
      localStorage.setItem("ps-right", closed ? "closed" : "open");
    } else {
      const open = body().toggle(name, state);
      if (open && what !== "settings") {
        const other = what === "side" ? "ps-right" : "ps-side";
        body().remove(other);
      }
    }
    if (what === "settings" && body().contains(name)) {
      focusSoon("#drawer .ps-close");
    }
    syncToggles();
    if (what === "settings" && !body().contains(name)) {
      document.querySelector("#top [data-toggle=settings]")?.focus();
    }
  };
  const isOpen = (what) =>
    what === "right" && !NARROW.matches
      ? !body().contains("ps-right-closed")
      : body().contains({ side: "ps-side", right: "ps-right", settings: "ps-settings" }[what]);
  const syncToggles = () => {
    const shell = document.querySelector("#shell");
    if (shell) shell.inert = body().contains("ps-settings");
    for (const b of document.querySelectorAll("[data-toggle]")) {
      b.setAttribute("aria-expanded", String(isOpen(b.dataset.toggle)));
    }
  };
  const closeDrawers = () => {
    const any = ["ps-side", "ps-right", "ps-settings"].filter((c) => body().contains(c));
    body().remove(...any);
    syncToggles();
    if (any.includes("ps-settings")) document.querySelector("#top [data-toggle=settings]")?.focus();
    return any.length > 0;
  };
  ready(() => {
    if (localStorage.getItem("ps-right") === "closed") body().add("ps-right-closed");
    NARROW.addEventListener("change", syncToggles);
    document.addEventListener("click", (e) => {
      const b = e.target.closest?.("[data-toggle]");
      if (b) toggle(b.dataset.toggle);
      else if (e.target.closest?.("#scrim")) closeDrawers();
    }, true);                          /* Gradio's HTML parts keep clicks to themselves */
  });

  return {
    ready, on, emit, latest,
    fixed, rate, bytes, seconds,
    colour, rgb,
    themeName, setTheme,
    conversation, setConversation,
    toggle, closeDrawers, syncToggles,
  };
})();
