// Asks the launcher how it is going, twice a second, until the app's address comes back.
"use strict";

const key = new URLSearchParams(location.search).get("k") || "";
const headers = { "X-PreScope-Key": key };
const SILENT_POLLS = 6;
const PERIOD_MS = 500;
let silent = 0;

const byId = (id) => document.getElementById(id);

function setText(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function show(state) {
  const percent = Math.round(state.fraction * 100);
  setText("title", state.title);
  setText("detail", state.detail);
  byId("fill").style.width = percent + "%";
  byId("bar").setAttribute("aria-valuenow", percent);
  document.title = state.fault ? "PreScope needs you" : `PreScope ${percent} %`;

  byId("question").hidden = !state.question;
  if (state.question) {
    setText("question-text", state.question.text);
    setText("agree", state.question.yes);
    setText("decline", state.question.no);
  }
  byId("fault").hidden = !state.fault;
  document.body.classList.toggle("still", Boolean(state.fault || state.question));
  if (state.fault) {
    setText("what", state.fault.what);
    setText("next-step", state.fault.next_step);
    setText("log", state.log);
  }
  const lines = byId("lines");
  const atEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 4;
  setText("lines", state.lines.join("\n"));
  if (atEnd) lines.scrollTop = lines.scrollHeight;
}

async function poll() {
  try {
    const answer = await fetch("/status", { headers, cache: "no-store" });
    const state = await answer.json();
    silent = 0;
    byId("gone").hidden = true;
    show(state);
    if (state.url) {
      location.replace(state.url);
      return;
    }
  } catch {
    silent += 1;
    byId("gone").hidden = silent < SILENT_POLLS;
  }
  setTimeout(poll, PERIOD_MS);
}

for (const action of ["retry", "agree", "decline"]) {
  byId(action).addEventListener("click", () => {
    fetch("/" + action, { method: "POST", headers }).catch(() => {});
  });
}
poll();
