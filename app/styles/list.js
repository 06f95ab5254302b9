/* The conversation list. Rows are drawn here with textContent, so a title is never markup, and
   what the keyboard is on stays where it is when the list is redrawn. */
PreScope.list = (element, props, trigger, watch) => {
  "use strict";
  const ARM_MS = 3000;
  const nav = element.querySelector("nav");
  const ICON = {
    rename: "M11.2 2.6l2.2 2.2-7.8 7.8-2.9.7.7-2.9z",
    delete: "M3 4.5h10M6.2 4.5V3h3.6v1.5M4.6 4.5l.5 8.5h5.8l.5-8.5M6.8 7v4M9.2 7v4",
  };
  const make = (tag, cls, text) => {
    const el = document.createElement(tag);
    if (cls) el.className = cls;
    if (text !== undefined) el.textContent = text;
    return el;
  };
  const iconButton = (cls, path, label) => {
    const b = make("button", `ps-icon ${cls}`);
    b.type = "button";
    b.setAttribute("aria-label", label);
    b.title = label.split(" ")[0];
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    const p = document.createElementNS("http://www.w3.org/2000/svg", "path");
    p.setAttribute("d", path);
    svg.append(p);
    b.append(svg);
    return b;
  };
  const row = ({ id, title }) => {
    const li = make("li");
    li.dataset.id = id;
    const go = make("button", "go", title);
    go.type = "button";
    go.title = title;
    li.append(go, iconButton("ren", ICON.rename, `Rename ${title}`), iconButton("del", ICON.delete, `Delete ${title}`));
    return li;
  };

  const mark = () => {
    const id = PreScope.conversation();
    let title = "PreScope";
    for (const li of nav.querySelectorAll("li")) {
      const active = li.dataset.id === id;
      li.classList.toggle("on", active);
      const go = li.querySelector(".go");
      if (active) {
        go?.setAttribute("aria-current", "true");
        title = `${go?.textContent || ""} · PreScope`;
      }
      else go?.removeAttribute("aria-current");
    }
    document.title = title;
  };
  /* An answer to an older search may come in last: ask again until list and search agree. */
  const agree = () => {
    const search = document.querySelector("#search textarea, #search input");
    if (search && (props.value?.query ?? "") !== search.value.trim()) trigger("refresh_list", {});
  };
  let agreeing = 0;
  let armed = null, disarming = 0;       /* the chat whose deletion waits for a second press */
  const deleteButton = (id) =>
    [...nav.querySelectorAll("li")].find((l) => l.dataset.id === id)?.querySelector(".del");
  const render = () => {
    clearTimeout(agreeing);
    agreeing = setTimeout(agree, 250);
    const rows = props.value?.rows || [];
    if (nav.querySelector("input.edit")) return;       /* not under somebody's hands */
    const focus = nav.contains(document.activeElement)
      ? [document.activeElement.closest("li")?.dataset.id, document.activeElement.className] : null;
    const parts = [];
    let group = null, ul = null;
    for (const r of rows) {
      if (r.group !== group || !ul) {
        group = r.group;
        ul = make("ul");
        const id = `ps-g${parts.length}`;
        const h = make("h3", "", group);
        h.id = id;
        ul.setAttribute("aria-labelledby", id);
        parts.push(h, ul);
      }
      ul.append(row(r));
    }
    if (!rows.length) {
      parts.push(make("p", "none", props.value?.query ? "No chat matches." : "Your chats will be kept here, on this computer."));
    }
    nav.replaceChildren(...parts);
    const waiting = armed && deleteButton(armed);
    if (waiting) showArmed(waiting);
    mark();
    if (focus?.[0]) {
      const li = [...nav.querySelectorAll("li")].find((l) => l.dataset.id === focus[0]);
      [...(li?.querySelectorAll("button") || [])].find((b) => b.className === focus[1])?.focus();
    }
  };

  const rename = (li) => {
    const go = li.querySelector(".go");
    const input = make("input", "edit");
    input.value = go.textContent;
    input.maxLength = 200;
    input.setAttribute("aria-label", "New title");
    go.replaceWith(input);
    li.classList.add("editing");
    input.focus();
    input.select();
    let done = false;
    const end = (keep, back) => {
      if (done) return;
      done = true;
      const title = input.value.trim();
      if (keep && title && title !== go.textContent) {
        go.textContent = title;
        trigger("rename_conv", { id: li.dataset.id, title });
      }
      input.replaceWith(go);
      li.classList.remove("editing");
      if (back) go.focus();
    };
    input.addEventListener("keydown", (e) => {
      if (e.key === "Enter") { e.preventDefault(); end(true, true); }
      if (e.key === "Escape") { e.preventDefault(); e.stopPropagation(); end(false, true); }
    });
    input.addEventListener("blur", () => end(true, false));
  };
  const showArmed = (b) => {
    b.plain = b.getAttribute("aria-label");
    b.classList.add("arm");
    b.setAttribute("aria-label", "Press again to delete");
    b.title = "Press again to delete";
  };
  const disarm = () => {
    clearTimeout(disarming);
    const b = armed && deleteButton(armed);
    armed = null;
    if (!b?.classList.contains("arm")) return;
    b.classList.remove("arm");
    b.setAttribute("aria-label", b.plain);
    b.title = "Delete";
  };
  const remove = (li, b) => {
    const id = li.dataset.id;
    const again = armed === id;
    disarm();
    if (again) {
      const next = li.nextElementSibling || li.previousElementSibling;
      next?.querySelector(".go")?.focus();
      trigger("delete_conv", { id });
      return;
    }
    armed = id;
    showArmed(b);
    disarming = setTimeout(disarm, ARM_MS);
  };

  nav.addEventListener("click", (e) => {
    const b = e.target.closest("button");
    const li = b?.closest("li");
    if (!li) return;
    if (b.classList.contains("go")) PreScope.open(li.dataset.id);
    else if (b.classList.contains("ren")) rename(li);
    else if (b.classList.contains("del")) remove(li, b);
  });
  nav.addEventListener("dblclick", (e) => { const li = e.target.closest(".go")?.closest("li"); if (li) rename(li); });
  nav.addEventListener("keydown", (e) => {
    const li = e.target.closest("li");
    if (!li || e.target.tagName === "INPUT") return;
    if (e.key === "F2") { e.preventDefault(); rename(li); return; }
    if (e.key === "Delete") { e.preventDefault(); remove(li, li.querySelector(".del")); return; }
    if (e.key !== "ArrowDown" && e.key !== "ArrowUp") return;
    const all = [...nav.querySelectorAll(".go")];
    const to = all[all.indexOf(li.querySelector(".go")) + (e.key === "ArrowDown" ? 1 : -1)];
    if (to) { e.preventDefault(); to.focus(); }
  });

  PreScope.open = (id) => {
    PreScope.setConversation(id);
    document.body.classList.remove("ps-side");
    trigger("open_conv", { id });
  };
  /* Another tab changed something: the list, and the open chat if it is the one. */
  PreScope.onChanged = (id) => {
    if (id && id === PreScope.conversation()) trigger("open_conv", { id });
    else trigger("refresh_list", {});
  };
  addEventListener("popstate", () => {
    PreScope.emit("conv", PreScope.conversation());
    trigger("open_conv", { id: PreScope.conversation() });
  });
  PreScope.on("conv", mark);
  watch("value", render);
  render();
};
