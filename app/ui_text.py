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
_OPEN = re.compile(r"(`{3,})([^`]*)$|(~{3,})(.*)$")
_FENCE_LIKE = re.compile(r"[ \t]*[`~]{3}")
_FORMULA = re.compile(r"(\$\$.+?\$\$|\$[^$\n]+\$)", re.DOTALL)
_LANGUAGE = re.compile(r"[\w.+#-]{0,40}")
_DRAWN = ("mermaid",)


def inert(text: str) -> str:
    """Return Markdown that renders the same but cannot open a tag or fetch an image.

    A word joiner (invisible, no width) after `<` and `!` is enough for every Markdown parser; in
    a formula a space does the same. Code fenced at the left edge keeps its text: its fences are
    written out so that no parser can see them begin or end anywhere else.
    """
    out: list[str] = []
    prose: list[str] = []
    fence = ""
    for line in text.replace(JOINER, "").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if fence:
            if re.fullmatch(f" {{0,3}}{fence}{fence[0]}*[ \t]*", line):
                out.append(fence)
                fence = ""
            else:
                out.append(JOINER + line if _FENCE_LIKE.match(line) else line)
        elif opening := _OPEN.match(line):
            out.extend(_flush(prose))
            fence = opening[1] or opening[3]
            out.append(fence + _language(opening[2] or opening[4] or ""))
        else:
            prose.append(line)
    return "\n".join(out + _flush(prose) + ([fence] if fence else []))


def escaped(text: str) -> str:
    """Return one line of plain text for our own HTML inside a chat message."""
    return html.escape(_dead(" ".join(text.replace(JOINER, "").split()), JOINER))


def plain(text: str) -> str:
    """Take back what `inert` added, for text that comes from the page."""
    return text.replace(JOINER, "")


def _language(info: str) -> str:
    found = _LANGUAGE.match(info.strip())
    name = found[0] if found else ""
    return "text" if name.lower() in _DRAWN else name


def _dead(text: str, joiner: str) -> str:
    for mark in (_TAG, _IMAGE, _DEFINITION):
        text = mark.sub(lambda found: found[0] + joiner, text)
    return text


def _flush(prose: list[str]) -> list[str]:
    if not prose:
        return []
    parts = _FORMULA.split("\n".join(prose))
    prose.clear()
    return ["".join(_dead(part, " " if i % 2 else JOINER) for i, part in enumerate(parts))]
