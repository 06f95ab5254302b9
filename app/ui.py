"""The page: parts, handlers and settings wired together, and mounted on the app's server.

Every handler is a short request (`queue=False`): no stream, timer or heartbeat is held open by a
tab, because a browser opens only six sockets per origin.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from fastapi import FastAPI

from app.kept import KeptShelf
from app.models import ModelShelf
from app.session import ChatSessions
from app.settings import SettingsStore
from app.ui_events import ChatEvents
from app.ui_kept import KeptEvents
from app.ui_layout import Parts, lay_out
from app.ui_models import ModelEvents
from app.ui_settings import Drawer, SettingsEvents, drawer
from app.ui_theme import FAVICON, head, theme
from runtime.client import EngineClient

TITLE = "PreScope"
_QUICK: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}


def build_ui(
    sessions: ChatSessions, settings_store: SettingsStore, engine: EngineClient, models: ModelShelf
) -> gr.Blocks:
    """Return the page; nothing in it outlives a request except what the arguments own."""
    blocks: gr.Blocks = gr.Blocks(
        title=TITLE, fill_height=True, fill_width=True, analytics_enabled=False
    )
    with blocks:
        parts = lay_out()
        made = drawer()
        chat = ChatEvents(parts, sessions)
        model = ModelEvents(parts, settings_store, engine, models)
        settings = SettingsEvents(made.fields, settings_store, engine)
        _wire_chat(blocks, parts, chat)
        _wire_models(blocks, parts, model, made.reload)
        _wire_settings(blocks, parts, settings, made)
        _wire_kept(made, KeptEvents(KeptShelf(settings_store.path.parent)))
    return blocks


def mount(app: FastAPI, blocks: gr.Blocks) -> FastAPI:
    """Mount the page at `/`, behind the routes that `app` already has."""
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        favicon_path=str(FAVICON),
        show_error=True,
        max_file_size="1mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=head(),
    )
    return app


def _wire_chat(blocks: gr.Blocks, parts: Parts, on: ChatEvents) -> None:
    p = parts
    shown = [p.conv, p.chat, p.live, p.box, p.earlier, p.pulse, p.clist, p.status]
    listed = [p.clist, p.status, p.pulse]

    blocks.load(
        on.restored,
        [p.conv, p.search],
        shown,
        js="(conv, query) => [PreScope.conversation(), query]",
        **_QUICK,
    )
    p.clist.open_conv(on.opened, p.search, shown, trigger_mode="always_last", **_QUICK)
    p.clist.rename_conv(on.renamed, [p.conv, p.search], listed, **_QUICK)
    p.clist.delete_conv(on.deleted, [p.conv, p.search], shown, **_QUICK)
    p.clist.refresh_list(on.listed, p.search, p.clist, **_QUICK)
    p.search.change(on.listed, p.search, p.clist, trigger_mode="always_last", **_QUICK)
    p.new.click(
        on.blank, p.search, shown, js="(query) => { PreScope.fresh(); return [query]; }", **_QUICK
    )
    p.box.submit(on.sent, [p.box, p.conv, p.search], shown, **_QUICK)
    p.box.stop(on.stopped, p.conv, None, **_QUICK)
    p.hello.ask(on.asked, [p.conv, p.search], shown, **_QUICK)
    turns = [p.conv, p.search, p.earlier]
    p.chat.retry(on.retried, turns, shown, **_QUICK)
    p.chat.edit(on.edited, turns, shown, **_QUICK)
    p.pulse.pull(on.pulled, turns, shown, trigger_mode="multiple", **_QUICK)
    p.earlier.show_earlier(on.grown, [p.conv, p.earlier], shown, **_QUICK)


def _wire_models(blocks: gr.Blocks, parts: Parts, on: ModelEvents, reload: gr.Button) -> None:
    blocks.load(on.listed, None, parts.model, **_QUICK)
    parts.model.focus(on.listed, None, parts.model, **_QUICK)
    parts.load.click(on.loaded, parts.model, parts.status, **_QUICK)
    reload.click(on.reloaded, None, parts.status, **_QUICK)
    parts.status.cancel_load(on.cancelled, None, None, **_QUICK)


def _wire_settings(blocks: gr.Blocks, parts: Parts, on: SettingsEvents, made: Drawer) -> None:
    fields = made.fields
    blocks.load(on.read, None, [field.component for field in fields.values()], **_QUICK)
    for name, field in fields.items():
        # A text box's `input` misses pasting and deleting; `change` also follows our own reading,
        # which stores nothing.
        part = field.component
        edited = part.change if isinstance(part, gr.Textbox) else part.input
        edited(
            on.saver(name), part, parts.status, js=field.js, trigger_mode="always_last", **_QUICK
        )
    fields["theme"].component.change(
        None, fields["theme"].component, None, js="(name) => PreScope.setTheme(name)"
    )
    for switch in (parts.panel, made.learning):
        switch.switch_prediction(
            on.switched, None, parts.status, trigger_mode="always_last", **_QUICK
        )
    made.learning.forget_learned(on.forgot, None, made.learning, **_QUICK)


def _wire_kept(made: Drawer, on: KeptEvents) -> None:
    made.kept.list_kept(on.listed, None, made.kept, trigger_mode="always_last", **_QUICK)
    made.kept.delete_kept(on.deleted, None, made.kept, **_QUICK)
