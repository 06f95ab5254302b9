"""The page's pure parts: rows, indices, inert text; and what the page must not contain."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.answer import LiveAnswer
from app.history import ConversationSummary, StoredMessage
from app.policies import policy_choices, policy_text
from app.ui_rows import figures, list_rows, live_rows, settled_rows, turn_at
from app.ui_text import JOINER, escaped, inert, plain
from runtime.core import POLICIES

STYLES = Path(__file__).resolve().parent.parent / "app" / "styles"
OPENS_TAG = re.compile(r"<[A-Za-z/!?]")


def turn(id: int, role: str, content: str = "text", **more: object) -> StoredMessage:
    return StoredMessage(id, "c", role, content, **more)  # type: ignore[arg-type]


TURNS = [
    turn(1, "user"),
    turn(2, "assistant", reasoning="hm", stats={"decode_tokens_per_s": 9.0}),
    turn(3, "user"),
    turn(4, "assistant", "", state="failed", error="No room."),
    turn(5, "user"),
    turn(6, "assistant", "part", state="stopped"),
]


def test_every_row_leads_back_to_its_turn() -> None:
    owners = []
    for one in TURNS:
        owners += [one.id] * len(settled_rows([one]))
    assert owners == [1, 2, 2, 2, 3, 4, 5, 6, 6]
    for index, owner in enumerate(owners):
        found = turn_at(TURNS, index)
        assert found is not None
        assert found.id == owner
    found = turn_at(TURNS, (5, 0))
    assert found is not None
    assert found.id == 4


@pytest.mark.parametrize("index", [-1, 9, 10**9, None, "1", (), [], {}])
def test_an_index_that_no_row_has_leads_nowhere(index: object) -> None:
    assert turn_at(TURNS, index) is None


def test_a_turn_says_how_it_ended() -> None:
    said = "\n".join(row["content"] for row in settled_rows(TURNS))
    assert "9.0 tokens/s" in said
    assert "No room." in said
    assert "Stopped" in said
    empty = settled_rows([turn(1, "assistant", "")])
    assert len(empty) == 1


def test_figures_of_an_answer() -> None:
    stats = {
        "decode_tokens_per_s": 12.34,
        "ttft_s": 0.25,
        "hit_rate": 0.876,
        "routed": 10,
        "new_tokens": 1,
        "finish_reason": "length",
    }
    assert figures(stats) == [
        "12.3 tokens/s",
        "first token 250 ms",
        "hit rate 88 %",
        "1 token",
        "cut at the token limit",
    ]
    assert figures({}) == []


def test_the_answer_under_way() -> None:
    def live(state: str, reasoning: str = "", text: str = "") -> LiveAnswer:
        return LiveAnswer(1, reasoning, text, state, 0.0, 1)  # type: ignore[arg-type]

    assert live_rows(None) == []
    assert "ps-wait" in live_rows(live("waiting"))[0]["content"]
    thinking = live_rows(live("reasoning", "why <b>"))
    assert thinking[0]["metadata"]["status"] == "pending"
    assert not OPENS_TAG.search(thinking[0]["content"])
    both = live_rows(live("answering", "why", "so"))
    assert [row.get("metadata", {}).get("status") for row in both] == ["done", None]


def test_chats_stand_under_the_day_they_were_last_used() -> None:
    now = time.time()
    days = [now, now - 86_400, now - 3 * 86_400, now - 400 * 86_400]
    found = [ConversationSummary(str(i), "", at) for i, at in enumerate(days)]
    value = list_rows(found, " x ")
    assert [row["group"] for row in value["rows"]] == [
        "Today",
        "Yesterday",
        "Last 7 days",
        "Earlier",
    ]
    assert value["query"] == "x"
    assert value["rows"][0]["title"] == "New chat"


COMING = (
    "prescope",
    "hybrid",
    "moe-infinity",
    "on-demand",
    "cpu-miss",
    "static-split",
    "layer-stream",
    "cpu-only",
)


def test_every_policy_is_described_and_told_apart() -> None:
    texts = [text for text, _ in policy_choices((*POLICIES, *COMING))]
    labels = [text.split("\n")[0] for text in texts]
    assert len(set(labels)) == len({*POLICIES, *COMING})
    for text in texts:
        label, what = text.split("\n")
        assert what.endswith("."), text
        assert len(text) <= 150
    assert [name for name in COMING if policy_text(name).predicts] == ["prescope", "moe-infinity"]
    named = "\n".join(texts).replace("\N{NON-BREAKING HYPHEN}", "-")
    for engine in ("FreeToken", "Mixtral-offloading", "Fiddler", "--cpu-moe", "--n-cpu-moe"):
        assert engine in named
    assert "LM Studio" in named
    assert "accelerate" in named


def test_a_policy_without_a_text_goes_by_its_name() -> None:
    assert policy_choices(("brand-new",)) == [("brand-new", "brand-new")]


MARKS = st.sampled_from(
    ["<", ">", "![", "]", "(", "`", "```", "~~~", "\n", " ", "- ", "> ", "$", "$$", "img", "/", "!"]
    + ["a", "\r\n", "\t", ":", '"', "\\[", "\\]", JOINER, "mermaid", "<script>", "1. "]
)
SOUP = st.lists(MARKS, max_size=60).map("".join)


@given(SOUP)
def test_soup_opens_no_tag_outside_plain_fences(text: str) -> None:
    """Whatever is left able to open a tag lies between fences at the left edge."""
    outside, fence = [], ""
    for line in inert(text).split("\n"):
        if fence:
            fence = "" if line.rstrip() == fence else fence
        elif found := re.match(r"(`{3,}|~{3,})[\w.+#-]*\s*$", line):
            fence = found[1]
        else:
            outside.append(line)
    assert not any(OPENS_TAG.search(line) or "![" in line for line in outside)


@given(SOUP)
def test_inert_text_can_be_taken_back_and_is_stable(text: str) -> None:
    once = inert(text)
    assert inert(plain(once)) == once
    if "$" not in text and "mermaid" not in text:
        assert plain(once) == plain(text).replace("\r\n", "\n").replace("\r", "\n")


def test_code_keeps_its_text_where_no_parser_can_doubt() -> None:
    code = "Look:\n\n```html\n<b>bold</b>\n```\nand `<i>`"
    assert "<b>bold</b>" in inert(code)
    assert f"<{JOINER}i>" in inert(code)
    for doubtful in (
        "- a\n  ```\n<b>\n",
        "$$\n```\n$$\n<b>",
        "> ```\n```\n<b>\n",
        "```a`b\n<b>",
        "```\nx\n   ```\n<b>",
    ):
        assert "<b>" not in inert(doubtful)
    assert "mermaid" not in inert("```mermaid\ngraph TD\n```")


def test_errors_are_one_line_of_text() -> None:
    assert escaped("a\n<b> & ![x](y)") == f"a &lt;{JOINER}b&gt; &amp; !{JOINER}[x](y)"


def test_the_page_asks_nobody_else_and_holds_no_stream_open() -> None:
    """No address outside, and none of Gradio's parts that cost a connection or a core per tab."""
    for path in STYLES.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert not re.search(r"https?://|@import|//[a-z]+\.[a-z]", text), path.name
    for path in STYLES.parent.glob("ui*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"gr\.(State|Timer|LinePlot|Plot|Sidebar)\b|cancels=", text), path.name
        assert "server_functions" not in text


def colours(selector: str) -> dict[str, str]:
    css = (STYLES / "base.css").read_text(encoding="utf-8")
    block = css.split(selector + " {", 1)[1].split("}", 1)[0]
    return dict(re.findall(r"--ps-([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [":root", "body.dark"])
def test_text_and_drawings_stand_out(mode: str) -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn, on every ground they appear on."""
    found = colours(mode)
    texts = ("text", "muted", "faint", "accent", "link", "bad", "warn", "good")
    drawn = ("s0", "s1", "s2", "s3", "s4", "accent-data")
    too_faint = [
        (name, ground, round(contrast(found[name], found[ground]), 2))
        for names, wanted in ((texts, 4.5), (drawn, 3.0))
        for name in names
        for ground in ("bg", "side", "surface", "input")
        if contrast(found[name], found[ground]) < wanted
    ]
    pairs = [
        ("accent-ink", "accent"),
        ("accent", "accent-soft"),
        ("text", "user"),
        ("text", "hover"),
        ("muted", "hover"),
        ("faint", "hover"),
        ("text", "code"),
        ("text", "bad-soft"),
        ("bad", "bad-soft"),
        ("tip-text", "tip"),
        ("muted", "bad-soft"),
        ("muted", "warn-soft"),
    ]
    too_faint += [
        (one, other, round(contrast(found[one], found[other]), 2))
        for one, other in pairs
        if contrast(found[one], found[other]) < 4.5
    ]
    assert too_faint == []


def test_the_picker_says_what_a_model_would_do_or_that_it_cannot_run() -> None:
    from app.models import ModelOffer
    from app.ui_models import _label

    fits = ModelOffer("m", "/m", 61_000_000_000, "gpt_oss", 128, "", "folder", "needs the disk")
    assert _label(fits) == "m · 61 GB · needs the disk"
    assert _label(ModelOffer("m", "/m", 0, "", 0, "No experts.", "folder")) == "m · not supported"
    assert _label(ModelOffer("m", "/m", 7_000_000, "", 8, "", "folder")) == "m · 7 MB"
