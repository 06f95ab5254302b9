"""The parts of the page and where they stand. No behaviour: that is wired in `app.ui`."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.ui_theme import part

QUESTIONS = (
    "What can you do?",
    "Why are experts kept in RAM?",
    "What is prefetching?",
    "Tell me a story about a fox.",
)
_LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
_BRAND = """<div class="ps-brand"><svg class="ps-mark" viewBox="0 0 24 24" aria-hidden="true"><g>
<rect x="2" y="2" width="5.4" height="5.4" rx="1.4"/>
<rect class="lit" x="9.3" y="2" width="5.4" height="5.4" rx="1.4"/>
<rect x="16.6" y="2" width="5.4" height="5.4" rx="1.4"/>
<rect class="lit" x="2" y="9.3" width="5.4" height="5.4" rx="1.4"/>
<rect x="9.3" y="9.3" width="5.4" height="5.4" rx="1.4"/>
<rect x="16.6" y="9.3" width="5.4" height="5.4" rx="1.4"/>
<rect x="2" y="16.6" width="5.4" height="5.4" rx="1.4"/>
<rect x="9.3" y="16.6" width="5.4" height="5.4" rx="1.4"/>
<rect class="lit" x="16.6" y="16.6" width="5.4" height="5.4" rx="1.4"/>
</g></svg><h1>PreScope</h1></div>"""
_ICONS = {
    "side": ("Chats", "M3 5.5h14M3 10h14M3 14.5h14"),
    "settings": (
        "Settings",
        "M3 6h7M14 6h3M3 14h3M10 14h7M12 4a2 2 0 1 1 0 4a2 2 0 0 1 0-4z"
        "M8 12a2 2 0 1 1 0 4a2 2 0 0 1 0-4z",
    ),
    "right": ("Live panel", "M3 14.5l4-6 4 4 6-8"),
}
_HINT = (
    '<p class="ps-hint"><kbd>Enter</kbd> sends<span><kbd>Shift</kbd>+<kbd>Enter</kbd> new line'
    "</span><span><kbd>Esc</kbd> stops</span><span><kbd>Ctrl</kbd>+<kbd>K</kbd> finds a chat"
    "</span></p>"
)
_JUMP = (
    '<button type="button" id="ps-jump" aria-label="Jump to the newest text">'
    '<svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 4v11M5 10.5l5 5 5-5"/></svg></button>'
)
_EARLIER = """<button type="button" class="ps-quiet">Show earlier messages</button>"""


@dataclass(frozen=True)
class Parts:
    """The components that events read and write.

    `conv` holds the id of the open conversation, empty for a new one. `pulse` carries what the
    page's script needs to know about the answer under way; `note` an error to show.
    """

    conv: gr.Textbox
    new: gr.Button
    search: gr.Textbox
    clist: gr.HTML
    model: gr.Dropdown
    load: gr.Button
    status: gr.HTML
    earlier: gr.HTML
    hello: gr.HTML
    chat: gr.Chatbot
    live: gr.Chatbot
    box: gr.Textbox
    pulse: gr.HTML
    panel: gr.HTML


def lay_out() -> Parts:
    """Create the three columns inside the current Blocks."""
    conv = gr.Textbox(value="", visible=False)
    with gr.Row(elem_id="shell"):
        with gr.Column(elem_id="side", min_width=0, scale=0):
            _html(_BRAND, elem_id="brand")
            new = gr.Button("New chat", elem_id="new", size="md")
            search = gr.Textbox(
                label="Search chats",
                placeholder="Search chats",
                show_label=False,
                container=False,
                elem_id="search",
                max_lines=1,
            )
            clist = _live_html("<nav aria-label='Chats'></nav>", "list", "clist")
        with gr.Column(elem_id="center", min_width=0):
            with gr.Row(elem_id="top"):
                _html(_toggle("side"), elem_id="tog-side")
                model = gr.Dropdown(
                    [],
                    label="Model",
                    show_label=False,
                    container=False,
                    elem_id="model",
                    filterable=False,
                    min_width=0,
                )
                load = gr.Button("Load", elem_id="load", scale=0, min_width=0, size="md")
                _html(_toggle("settings") + _toggle("right"), elem_id="tog-right")
            status = _live_html(part("status.html"), "status", "status")
            with gr.Column(elem_id="scroll", min_width=0):
                earlier = gr.HTML(
                    {"shown": 0, "hidden": 0},
                    html_template=_EARLIER,
                    js_on_load="PreScope.earlier(element, props, trigger, watch); 'show_earlier'",
                    apply_default_css=False,
                    elem_id="earlier",
                )
                hello = gr.HTML(
                    html_template=part("hello.html").replace("@asks", _asks()),
                    js_on_load="PreScope.ask = (text) => trigger('ask', { text });",
                    apply_default_css=False,
                    elem_id="hello",
                )
                chat = _chatbot("chat", editable="user", buttons=["copy"])
                live = _chatbot("live", editable=None, buttons=[])
            with gr.Column(elem_id="composer", min_width=0):
                _html(_JUMP, elem_id="jump")
                box = gr.Textbox(
                    label="Message",
                    placeholder="Message the model",
                    show_label=False,
                    container=False,
                    submit_btn=True,
                    stop_btn=False,
                    lines=1,
                    max_lines=9,
                    autofocus=True,
                    elem_id="box",
                )
                _html(_HINT, elem_id="hint")
            pulse = _live_html("", "pulse", "pulse")
        with gr.Column(elem_id="right", min_width=0, scale=0):
            panel = gr.HTML(
                html_template=part("panel.html"),
                js_on_load="PreScope.panel(element, trigger); 'switch_prediction'",
                apply_default_css=False,
                elem_id="panel",
            )
    _html("", elem_id="scrim")
    return Parts(
        conv, new, search, clist, model, load, status, earlier, hello, chat, live, box, pulse, panel
    )


_EVENTS = {
    "list": ("open_conv", "rename_conv", "delete_conv", "refresh_list"),
    "status": ("cancel_load",),
    "pulse": ("pull",),
}


def _live_html(template: str, script: str, elem_id: str) -> gr.HTML:
    """Return an HTML part drawn by its own script; Gradio wants its event names in the text."""
    names = ", ".join(f"'{name}'" for name in _EVENTS[script])
    return gr.HTML(
        None,
        html_template=template,
        js_on_load=f"PreScope.{script}(element, props, trigger, watch); [{names}]",
        apply_default_css=False,
        elem_id=elem_id,
    )


def _html(value: str, elem_id: str) -> gr.HTML:
    return gr.HTML(html_template=value, js_on_load=None, apply_default_css=False, elem_id=elem_id)


def _chatbot(elem_id: str, **options: Any) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id=elem_id,
        label="Conversation" if elem_id == "chat" else "Answer under way",
        show_label=False,
        container=False,
        height="auto",
        layout="bubble",
        feedback_options=None,
        placeholder=" ",
        autoscroll=False,
        latex_delimiters=_LATEX,
        allow_file_downloads=False,
        **options,
    )


def _toggle(what: str) -> str:
    label, path = _ICONS[what]
    return (
        f'<button type="button" class="ps-icon" data-toggle="{what}" aria-label="{label}" '
        f'title="{label}" aria-expanded="false"><svg viewBox="0 0 20 20" aria-hidden="true">'
        f'<path d="{path}"/></svg></button>'
    )


def _asks() -> str:
    return "".join(
        f'<button type="button" data-ask="{html.escape(text)}">{html.escape(text)}</button>'
        for text in QUESTIONS
    )
