"""From token ids to text that is final, split into reasoning and answer.

Nothing is emitted that a later token could change: half a character waits for its other half, and
text that may turn out to be a tag waits until it is one or is not.
"""

from __future__ import annotations

from typing import Protocol

from runtime.core import DeltaKind
from runtime.prompts import THINK_CLOSE, THINK_OPEN, Tokenizer

Piece = tuple[DeltaKind, str]

REPLACEMENT = "\ufffd"
LONGEST_HALF_CHARACTER = 3  # bytes of a four-byte character that lacks its last one
WINDOW_TOKENS = 16


class Detokenizer:
    """Decodes one answer token by token; special tokens must not be pushed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Return the text that became final with this token, often empty inside a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        final = len(text)
        while final > len(text) - LONGEST_HALF_CHARACTER and text[:final].endswith(REPLACEMENT):
            final -= 1
        fresh = text[self._emitted : final]
        self._emitted = max(self._emitted, final)
        if final == len(text) and len(self._window) > WINDOW_TOKENS:
            self._shorten()
        return fresh

    def finish(self) -> str:
        """Return what was held back, without a character that was never completed."""
        rest = self._decode(self._window)[self._emitted :].rstrip(REPLACEMENT)
        self._window, self._emitted = [], 0
        return rest

    def _shorten(self) -> None:
        """Keep a few tokens of context: some decoders treat the first token of a text apart."""
        tail = self._window[-4:]
        text = self._decode(tail)
        if REPLACEMENT not in text:
            self._window, self._emitted = tail, len(text)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


class Splitter(Protocol):
    """Tells reasoning from answer in a stream of text and special tokens."""

    def text(self, text: str) -> list[Piece]: ...

    def special(self, name: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class PlainSplitter:
    """For models that do not mark their reasoning: everything is the answer."""

    def text(self, text: str) -> list[Piece]:
        return [("answer", text)] if text else []

    def special(self, name: str) -> list[Piece]:
        return []

    def finish(self) -> list[Piece]:
        return []


class ThinkSplitter:
    """`<think>` reasoning `</think>` answer; a tag counts only where the format expects it.

    The opening tag counts at the very start, the closing one inside reasoning. Line breaks beside
    the tags belong to the format and are dropped.
    """

    def __init__(self, opened: bool) -> None:
        self._state = "reasoning" if opened else "start"
        self._held = ""
        self._trim = opened

    def text(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._look_for_opening()
        if self._state == "reasoning":
            pieces += self._reasoning()
        if self._state == "answer":
            pieces += self._emit("answer", len(self._held))
        return pieces

    def special(self, name: str) -> list[Piece]:
        return self.text(name) if name in (THINK_OPEN, THINK_CLOSE) else []

    def finish(self) -> list[Piece]:
        kind: DeltaKind = "reasoning" if self._state == "reasoning" else "answer"
        return self._emit(kind, len(self._held))

    def _look_for_opening(self) -> None:
        begin = self._held.lstrip()
        if begin.startswith(THINK_OPEN):
            self._held = begin[len(THINK_OPEN) :]
            self._state, self._trim = "reasoning", True
        elif not THINK_OPEN.startswith(begin):
            self._state = "answer"

    def _reasoning(self) -> list[Piece]:
        end = self._held.find(THINK_CLOSE)
        if end < 0:
            ready = self._held[: len(self._held) - _begun(self._held, THINK_CLOSE)]
            return self._emit("reasoning", len(ready.rstrip("\n")))
        before, self._held = self._held[:end], self._held[end + len(THINK_CLOSE) :]
        if self._trim:
            before = before.lstrip("\n")
        before = before.rstrip("\n")
        self._state, self._trim = "answer", True
        return [("reasoning", before)] if before else []

    def _emit(self, kind: DeltaKind, size: int) -> list[Piece]:
        ready, self._held = self._held[:size], self._held[size:]
        if self._trim:
            ready = ready.lstrip("\n")
            self._trim = not ready
        return [(kind, ready)] if ready else []


class ChannelSplitter:
    """gpt-oss: `<|channel|>` name `<|message|>` text `<|end|>`; only `final` is the answer."""

    def __init__(self) -> None:
        self._state = "body"
        self._kind: DeltaKind = "answer"
        self._header = ""

    def text(self, text: str) -> list[Piece]:
        if self._state == "header":
            self._header += text
        if self._state != "body" or not text:
            return []
        return [(self._kind, text)]

    def special(self, name: str) -> list[Piece]:
        if name == "<|channel|>":
            self._state, self._header = "header", ""
        elif name == "<|message|>":
            final = self._header.strip().startswith("final")
            self._state, self._kind = "body", "answer" if final else "reasoning"
        else:
            self._state = "between"
        return []

    def finish(self) -> list[Piece]:
        return []


class TextStream:
    """One answer's tokens in, its typed final text out. Used by the engine thread."""

    def __init__(self, tokenizer: Tokenizer, opens_reasoning: bool = False) -> None:
        added = tokenizer.added_tokens_decoder
        self._special = {
            i: t.content
            for i, t in added.items()
            if t.special or t.content in (THINK_OPEN, THINK_CLOSE)
        }
        self._detokenizer = Detokenizer(tokenizer)
        names = {token.content for token in added.values()}
        thinks = THINK_OPEN in names or THINK_CLOSE in str(tokenizer.chat_template)
        self._splitter: Splitter = PlainSplitter()
        if {"<|channel|>", "<|message|>"} <= names:
            self._splitter = ChannelSplitter()
        elif thinks or opens_reasoning:
            self._splitter = ThinkSplitter(opens_reasoning)

    def push(self, token_id: int) -> list[Piece]:
        """Return the pieces that became final with this token."""
        name = self._special.get(token_id)
        if name is None:
            return self._splitter.text(self._detokenizer.push(token_id))
        return self._splitter.text(self._detokenizer.finish()) + self._splitter.special(name)

    def finish(self) -> list[Piece]:
        """Return what was held back at the end of the answer."""
        return self._splitter.text(self._detokenizer.finish()) + self._splitter.finish()


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` could be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
