/* Under the top bar: the progress of a load with Cancel, and what a person should know: a failed
   load, an engine that died, a lost connection. Everything is text from the live stream. */
PreScope.status = (element, props, trigger, watch) => {
  "use strict";
  const { bytes, on } = PreScope;
  const root = element.querySelector(".ps-status");
  const load = root.querySelector(".ps-load");
  const notes = root.querySelector(".ps-notes");
  /* A notice that was dismissed stays away, in every tab, until the engine has none for a while. */
  const KEPT = "ps-dismissed";
  const dismissed = new Set([localStorage.getItem(KEPT)]);
  let status = null;
  let link = "connecting";
  let local = null;

  /* "default" and folders as a person would call them. */
  const name = (model) => {
    if (!model || model === "default") return "PreScope Tiny";
    const cached = model.match(/models--([^/\\]+)[/\\]snapshots/);
    return cached ? cached[1].replaceAll("--", "/") : model.split(/[/\\]/).filter(Boolean).pop();
  };
  const text = (el, value) => { if (el.textContent !== value) el.textContent = value; };

  const drawLoad = () => {
    const loading = status?.loading && status.state !== "dead";
    load.hidden = !loading;
    document.body.classList.toggle("ps-loading", Boolean(loading));
    if (!loading) return;
    const { text: said, done_bytes: done, total_bytes: total } = status.progress || {};
    const pct = total > 0 ? Math.min(100, (done / total) * 100) : 0;
    text(load.querySelector("b"), `Loading ${name(status.loading)}`);
    text(load.querySelector(".say"), said || "");
    text(load.querySelector(".num"), total > 0 ? `${bytes(done)} of ${bytes(total)} · ${Math.floor(pct)} %` : "");
    const bar = load.querySelector(".ps-bar");
    bar.classList.toggle("unknown", !(total > 0));
    bar.setAttribute("aria-valuenow", String(Math.floor(pct)));
    bar.firstElementChild.style.width = total > 0 ? `${pct}%` : "";
  };

  const wanted = () => {
    const out = [];
    if (link === "lost") {
      out.push({ kind: "bad", text: "The connection to PreScope was lost. This page goes on by itself when it is back; if the launcher window was closed, start PreScope again.", key: "" });
    } else if (status?.state === "restarting") {
      const why = (status.notice || "").trim();
      const whole = /^the engine (stopped|ended|died)\b.*(start|again)/i.test(why);
      const cause = why.replace(/^the engine (stopped|ended|died)[:,.]?\s*/i, "").replace(/\.?$/, ".");
      const said = whole ? why : `The engine stopped${cause.length > 1 ? `: ${cause}` : "."} It is being restarted.`;
      out.push({ kind: "warn", text: `${said} Your text is kept.`, next: status.next_step, key: "" });
    } else if (status?.state === "dead") {
      out.push({ kind: "bad", text: `The engine stopped${status.notice ? `: ${status.notice}` : "."}`, next: status.next_step || "Your chats are safe. Choose a model and press Load to start it again.", key: "" });
    } else if (status?.notice && !status.loading) {
      const failed = /cannot|could not|fail|cancel|refus/i.test(status.notice);
      const stays = failed && status.state === "ready" && status.model && !/stays|keeps|still/i.test(status.notice)
        ? ` ${name(status.model)} stays loaded.` : "";
      const kind = failed || status.next_step ? "warn" : "info";
      out.push({ kind, text: status.notice + stays, next: status.next_step, key: `${status.notice}#${status.restarts}` });
    }
    if (status?.state === "ready" && status.remarks?.length) {
      const said = status.remarks.join(" ");
      out.push({ kind: "info", text: said, key: `remarks:${status.model}:${said}` });
    }
    if (local) out.push({ kind: "bad", text: local.text, next: local.next, key: `local${local.n}` });
    return out.filter((n) => !dismissed.has(n.key));
  };
  const drawNotes = () => {
    const now = wanted();
    const mark = JSON.stringify(now);
    if (notes.dataset.mark === mark) return;
    notes.dataset.mark = mark;
    notes.replaceChildren(...now.map((n) => {
      const div = document.createElement("div");
      div.className = `ps-note ${n.kind}`;
      div.setAttribute("role", "alert");
      const p = document.createElement("p");
      p.textContent = n.text;
      if (n.next) {
        const next = document.createElement("span");
        next.textContent = ` ${n.next}`;
        p.append(next);
      }
      div.append(p);
      if (n.key) {
        const b = document.createElement("button");
        b.type = "button";
        b.className = "ps-icon";
        b.setAttribute("aria-label", "Dismiss");
        b.innerHTML = '<svg viewBox="0 0 20 20" aria-hidden="true"><path d="M6 6l8 8M14 6l-8 8"/></svg>';
        b.addEventListener("click", () => { 
          dismissed.add(n.key);
          if (!n.key.startsWith("local")) localStorage.setItem(KEPT, n.key);
          drawNotes();
        });
        div.append(b);
      }
      return div;
    }));
  };

  /* The Load button says what pressing it would do. */
  const drawButton = () => {
    const state = status?.state || "starting";
    document.body.dataset.engine = link === "lost" ? "lost" : state;
    document.body.dataset.model = status?.model || "";
  };

  load.querySelector("button").addEventListener("click", () => trigger("cancel_load", {}));
  on("live", (tick) => {
    status = tick.status;
    if (!status.notice && !status.remarks?.length) { dismissed.clear(); localStorage.removeItem(KEPT); }
    drawLoad(); drawNotes(); drawButton();
  });
  on("link", (state) => { link = state; drawNotes(); drawButton(); });
  watch("value", () => {
    /* A field that was stored clears its own note only. */
    const v = props.value;
    if (v?.text) local = v;
    else if (!v?.field || local?.field === v.field) local = null;
    drawNotes();
  });
};
