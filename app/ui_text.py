"""Text from a model, a person or an error on its way into the page.

Nothing that arrives as text may become markup that acts: no tag, no image that fetches an address.
Markdown, code and formulas stay. The page's clipboard drops the joiners again.
"""

from __future__ import annotations

import html
import re

JOINER = "\u2060"
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"!(?=\[)")
_DEFINITION = re.compile(r"\](?=:)")
_OPEN = re.compile(r"(`{3,}|~{3,})[ \t]*([\w.+#-]{0,40})[ \t]*")
_FENCE_LIKE = re.compile(r"[\s>]*(?:(?:[-*+]|\d+[.)])[\s>]+)*[`~]{3}")
_DIAGRAM = re.compile(r"([`~]{3,}[ \t]*)mermaid", re.IGNORECASE)
_FORMULA = re.compile(r"(\$\$.+?\$\$|\$[^$\n]+\$)", re.DOTALL)


def inert(text: str) -> str:
    """Return Markdown that renders the same but cannot open a tag or fetch an image.

    A word joiner (invisible, no width) after `<` and `!` is enough for every Markdown parser; in
    a formula a space does the same. Fenced code keeps its text, which its colours need, but only
    where no parser can doubt which lines are code: fences at the left edge, in pairs, none inside
    a formula. Otherwise code is treated like prose. What would be drawn as a diagram stays code.
    """
    plain_text = plain(text).replace("\r\n", "\n").replace("\r", "\n")
    parts = _fenced(_DIAGRAM.sub(r"\1text", plain_text))
    return "\n".join(part if code else _dead_prose(part) for code, part in parts)


def escaped(text: str) -> str:
    """Return one line of plain text for our own HTML inside a chat message."""
    return html.escape(_dead(" ".join(plain(text).split()), JOINER))


def plain(text: str) -> str:
    """Take back what `inert` added, for text that comes from the page."""
    return text.replace(JOINER, "")


def _fenced(text: str) -> list[tuple[bool, str]]:
    """Return the text as (is code, lines) in order; all of it as prose when in doubt."""
    parts: list[tuple[bool, str]] = []
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        if not _FENCE_LIKE.match(line):
            lines.append(line)
        elif fence:
            if line.rstrip() != fence:
                return [(False, text)]
            parts.append((True, "\n".join([*lines, line])))
            lines, fence = [], ""
        else:
            opening = _OPEN.fullmatch(line)
            before = "\n".join(lines)
            if opening is None or not _formulas_closed(before):
                return [(False, text)]
            if lines:
                parts.append((False, before))
            lines, fence = [line], opening[1]
    parts.append((bool(fence), "\n".join(lines)))
    return parts


def _formulas_closed(prose: str) -> bool:
    """Tell whether no display formula is open at the end, which would swallow a fence."""
    return prose.count("$$") % 2 == 0 and prose.count("\\[") == prose.count("\\]")


def _dead_prose(text: str) -> str:
    parts = _FORMULA.split(text)
    return "".join(_dead(part, " " if i % 2 else JOINER) for i, part in enumerate(parts))


def _dead(text: str, joiner: str) -> str:
    for mark in (_TAG, _IMAGE, _DEFINITION):
        text = mark.sub(lambda found: found[0] + joiner, text)
    return text
