"""What the page shows of a conversation: pure functions from records to rows.

A stored turn becomes one to three rows (thinking, answer, a line of figures), so that an index
from the page has to be brought back to its turn: `turn_at`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from app.session import ConversationSummary, LiveAnswer, StoredMessage
from app.ui_text import escaped, inert

Row = dict[str, Any]
SHOWN_TURNS = 60


def settled_rows(turns: Sequence[StoredMessage]) -> list[Row]:
    """Return the chatbot rows of settled turns."""
    return [row for turn in turns for row in _rows_of(turn)]


def live_rows(live: LiveAnswer | None) -> list[Row]:
    """Return the chatbot rows of the answer being written."""
    if live is None:
        return []
    if live.state == "waiting":
        return [_said("assistant", '<span class="ps-wait">Reading your message</span>')]
    rows = []
    if live.reasoning:
        rows.append(_thought(live.reasoning, done=live.state == "answering"))
    if live.text:
        rows.append(_said("assistant", inert(live.text)))
    return rows


def turn_at(turns: Sequence[StoredMessage], index: Any) -> StoredMessage | None:
    """Return the turn that owns row `index` of `settled_rows(turns)`; None when out of range."""
    at = index[0] if isinstance(index, (list, tuple)) and index else index
    if not isinstance(at, int) or at < 0:
        return None
    for turn in turns:
        at -= len(_rows_of(turn))
        if at < 0:
            return turn
    return None


def list_rows(found: Sequence[ConversationSummary], query: str) -> dict[str, Any]:
    """Return the value of the conversation list: rows with the heading they stand under."""
    today = date.today()
    rows = [
        {"id": c.id, "title": c.title or "New chat", "group": _group(c.updated_s, today)}
        for c in found
    ]
    return {"rows": rows, "query": query.strip()}


def figures(stats: Mapping[str, Any]) -> list[str]:
    """Return the short figures of one answer, the most asked for first."""
    said = []
    if rate := stats.get("decode_tokens_per_s"):
        said.append(f"{rate:.1f} tokens/s" if rate < 100 else f"{rate:.0f} tokens/s")
    if ttft := stats.get("ttft_s"):
        said.append(f"first token {_seconds(ttft)}")
    if stats.get("routed"):
        said.append(f"hit rate {stats.get('hit_rate', 0.0) * 100:.0f} %")
    if tokens := stats.get("new_tokens"):
        said.append(f"{tokens} token" + "s" * (tokens != 1))
    if stats.get("finish_reason") == "length":
        said.append("cut at the token limit")
    return said


def _rows_of(turn: StoredMessage) -> list[Row]:
    if turn.role == "user":
        return [_said("user", inert(turn.content))]
    rows = []
    if turn.reasoning:
        rows.append(_thought(turn.reasoning, done=True))
    if turn.content:
        rows.append(_said("assistant", inert(turn.content)))
    foot = _foot(turn)
    if foot or not rows:
        rows.append(_said("assistant", f'<div class="ps-foot">{foot}</div>'))
    return rows


def _foot(turn: StoredMessage) -> str:
    parts = []
    if turn.state == "failed":
        why = turn.error or "This answer failed."
        parts.append(f'<span class="ps-failed">{escaped(why)}</span>')
    elif turn.state == "stopped":
        parts.append('<span class="ps-stopped">Stopped</span>')
    elif turn.state == "partial":
        why = turn.error or "This answer was cut short."
        parts.append(f'<span class="ps-stopped">{escaped(why)}</span>')
    parts += [f"<span>{said}</span>" for said in figures(turn.stats)]
    if parts and turn.stats.get("emulated"):
        parts.append('<span class="ps-tag">emulated</span>')
    return "".join(parts)


def _said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _thought(text: str, *, done: bool) -> Row:
    title = "Thought" if done else "Thinking"
    metadata = {"title": title, "status": "done" if done else "pending"}
    return {"role": "assistant", "content": inert(text), "metadata": metadata}


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _group(updated_s: float, today: date) -> str:
    day = date(*time.localtime(updated_s)[:3])
    if day >= today:
        return "Today"
    if day == today - timedelta(days=1):
        return "Yesterday"
    if day > today - timedelta(days=7):
        return "Last 7 days"
    return "Earlier"
