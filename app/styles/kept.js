/* Quantised experts on this disk, in the settings. Asked for when the drawer opens and when a load
   ends while it is open; a line is deleted with two presses. */
PreScope.kept = (element, props, trigger, watch) => {
  "use strict";
  const { bytes, on } = PreScope;
  const ARM_MS = 4000;
  const list = element.querySelector("ul");
  const sum = element.querySelector(".ps-kept-sum");
  const none = element.querySelector(".ps-kept-none");
  const said = element.querySelector(".ps-said");
  const make = (tag, name, text) => {
    const el = document.createElement(tag);
    if (name) el.className = name;
    if (text) el.textContent = text;
    return el;
  };

  const button = (file) => {
    const b = make("button", "ps-forget", "Delete");
    b.type = "button";
    const what = `${file.label} ${file.kind}`.trim();
    b.setAttribute("aria-label", `Delete the kept experts of ${what}`);
    let disarming = 0;
    const disarm = () => {
      clearTimeout(disarming);
      b.classList.remove("arm");
      b.textContent = "Delete";
    };
    b.addEventListener("click", () => {
      const again = b.classList.contains("arm");
      disarm();
      said.textContent = "";
      if (again) { trigger("delete_kept", { name: file.name }); return; }
      b.classList.add("arm");
      b.textContent = "Sure?";
      disarming = setTimeout(disarm, ARM_MS);
    });
    b.addEventListener("blur", disarm);
    return b;
  };
  const row = (file) => {
    const li = make("li");
    const text = make("div");
    const title = make("b", "", file.label);
    title.title = file.name;
    const parts = [file.kind, bytes(file.size_bytes), file.finished ? "" : "unfinished"];
    text.append(title, make("span", "", parts.filter(Boolean).join(" · ")));
    li.append(text, button(file));
    return li;
  };
  watch("value", () => {
    const files = props.value?.files || [];
    const focused = element.contains(document.activeElement);
    list.replaceChildren(...files.map(row));
    none.hidden = files.length > 0;
    sum.textContent = files.length > 1 ? bytes(files.reduce((all, f) => all + f.size_bytes, 0)) : "";
    said.textContent = props.value?.text || "";
    said.classList.toggle("bad", Boolean(props.value?.bad));
    if (focused) element.querySelector("button")?.focus();
  });

  const opened = () => document.body.classList.contains("ps-settings");
  let was = false, model = null;
  new MutationObserver(() => {
    if (opened() && !was) trigger("list_kept", {});
    was = opened();
  }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  on("live", ({ status }) => {
    const now = `${status.state} ${status.model} ${(status.remarks || []).length}`;
    if (now !== model && opened()) trigger("list_kept", {});
    model = now;
  });
};
