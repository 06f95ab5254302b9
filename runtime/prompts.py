"""From messages to token ids, through the model's own chat template.

Text that a person typed can never become a control token: every spelling of one inside a message
is broken in two before the template sees it, and the halves are encoded apart. Text without such
spellings is encoded exactly as the tokenizer's own `apply_chat_template` would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError as JinjaError

from runtime.core import Message
from runtime.errors import ContextLengthError, RequestError, TemplateError

ROLES = ("system", "user", "assistant")
MAX_RENDERED_CHARACTERS = 64 * 2**20
SLICE_CHARACTERS = 50_000
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# A noncharacter: Unicode reserves it for use inside a program, so no text needs it.
BREAK = "\ufdd0"

# What a template or the code it calls can raise; anything else is our own mistake.
TEMPLATE_FAILURES = (
    JinjaError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class AddedToken(Protocol):
    """A token beside the learned vocabulary. `special` ones never belong to an answer's text."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that prompts and answers need."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...


Render = Callable[[Any, Sequence[Mapping[str, str]]], str]
"""render(tokenizer, turns) -> the conversation as its template writes it; raises TemplateError"""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `opens_reasoning`: the template already wrote the think tag."""

    ids: tuple[int, ...]
    opens_reasoning: bool


class PromptEncoder:
    """Renders and encodes conversations for one tokenizer. Used by the engine thread."""

    def __init__(self, tokenizer: Tokenizer, render: Render | None = None) -> None:
        """`render` runs the template; None runs it right here, for templates that are trusted."""
        self._tokenizer = tokenizer
        self._render_turns = render or _render_here
        control = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 and token.content.strip()
        }
        self._control_ids = frozenset(control)
        longest_first = sorted(control.values(), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._newline_ids = self._encode("\n")

    def encode(self, messages: Sequence[Message], context_tokens: int) -> Prompt:
        """Return the ids of the whole conversation up to where the answer begins.

        Raises:
            RequestError: no message, or a role that no template knows.
            ContextLengthError: no token of the context would be left for the answer.
            TemplateError: the template is missing, refused, failed or wrote too much.
        """
        if not messages:
            raise RequestError("There is no message to answer.", "Send at least one message.")
        self._refuse_what_is_far_too_long(messages, context_tokens)
        turns = []
        for message in messages:
            if message.role not in ROLES:
                raise RequestError(f"{message.role!r} is not one of the roles {', '.join(ROLES)}.")
            turns.append({"role": message.role, "content": self.defused(message.content)})
        rendered = self._render(turns)
        first, *rest = rendered.split(BREAK)
        ids = self._encode(first)
        for piece in rest:
            ids += self._encode_continued(piece)
        if not ids:
            raise TemplateError(
                "The model's chat template rendered these messages to nothing.",
                "Choose another model, or report the template to its authors.",
            )
        if len(ids) >= context_tokens:
            raise too_long(f"{len(ids):,}", context_tokens)
        return Prompt(tuple(ids), rendered.rstrip().endswith(THINK_OPEN))

    def defused(self, text: str) -> str:
        """Return `text` with a break inside every spelling of a control token.

        Lone surrogates, which no tokenizer can encode, become replacement characters.
        """
        text = _encodable(text.replace(BREAK, ""))
        broken = self._control_text.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
        if broken != text or not text.isascii():
            # A tokenizer may also normalise other spellings (full-width letters) to its tokens.
            ids = {i for piece in broken.split(BREAK) for i in self._encode_continued(piece)}
            if not self._control_ids.isdisjoint(ids):
                return BREAK.join(broken.replace(BREAK, ""))
        return broken

    def _refuse_what_is_far_too_long(self, messages: Sequence[Message], limit: int) -> None:
        """Count slices until it is clear: encoding all of a 10 MB paste would take a minute.

        Cut in slices, a text has a few tokens more than whole; a tenth more is far too many.
        """
        text = "".join(message.content for message in messages)
        if len(text) <= SLICE_CHARACTERS:
            return
        tokens = 0
        for begin in range(0, len(text), SLICE_CHARACTERS):
            tokens += len(self._encode(_encodable(text[begin : begin + SLICE_CHARACTERS])))
            if tokens > limit * 1.1:
                raise too_long(f"more than {limit:,}", limit)

    def _render(self, turns: list[dict[str, str]]) -> str:
        if not self._tokenizer.chat_template:
            raise TemplateError(
                "This model has no chat template, so it cannot hold a conversation.",
                "Choose the model's instruct or chat variant.",
            )
        rendered = self._render_turns(self._tokenizer, turns)
        if not isinstance(rendered, str):
            raise TemplateError("The model's chat template did not render to text.")
        if len(rendered) > MAX_RENDERED_CHARACTERS:
            raise TemplateError(
                f"The model's chat template wrote {len(rendered):,} characters; at most "
                f"{MAX_RENDERED_CHARACTERS:,} are accepted.",
                "Shorten the conversation.",
            )
        return rendered

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_continued(self, text: str) -> list[int]:
        """Encode text from the middle of a line.

        Some tokenizers put a space before the start of a text; after a newline they do not.
        """
        if not text:
            return []
        ids = self._encode("\n" + text)
        size = len(self._newline_ids)
        if ids[:size] == self._newline_ids:
            return ids[size:]
        return self._encode(text)


def _render_here(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]]) -> str:
    try:
        rendered: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except TEMPLATE_FAILURES as failure:
        reason = str(failure).replace(BREAK, "") or type(failure).__name__
        raise TemplateError(
            f"The model's chat template refused these messages: {reason[:300]}",
            "Check the order of the messages; some templates allow no system message.",
        ) from failure
    return rendered


def too_long(tokens: str, context_tokens: int) -> ContextLengthError:
    """Return the error for a conversation of so many tokens."""
    return ContextLengthError(
        f"The conversation has {tokens} tokens and this model's context holds "
        f"{context_tokens:,}, the answer included.",
        "Shorten the message, or start a new chat.",
    )


def _encodable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
