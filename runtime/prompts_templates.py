"""Chat templates rendered where they can do no harm, and our own where a model's is no use.

The child process is started with the first conversation and serves all; a template that takes too
long ends it, and the next conversation gets a new one.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import TemplateError
from runtime.prompts import BREAK

CPU_S = 2.0
"""What one rendering may compute."""

DEADLINE_S = 20.0
"""For one rendering, by the clock: where the child cannot bound its own time, this does."""

_CHILD = Path(__file__).with_name("prompts_child.py")
_ANOTHER = "Choose another model, or report the template to its authors."


class Templated(Protocol):
    """What a tokenizer tells of its template."""

    @property
    def chat_template(self) -> Any: ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...


class TemplateFailedError(TemplateError):
    """The template itself is no use, whatever the messages."""


class Templates:
    """Renders conversations in a child process. One thread at a time; `close` ends the child."""

    def __init__(self, cpu_s: float = CPU_S, deadline_s: float = DEADLINE_S) -> None:
        self._cpu_s = cpu_s
        self._deadline_s = deadline_s
        self._child: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def render(self, tokenizer: Templated, turns: Sequence[Mapping[str, str]]) -> str:
        """Return the conversation as the tokenizer's template writes it.

        Raises:
            TemplateFailedError: it failed, took too long, or needed or wrote too much.
            TemplateError: it refused these messages.
        """
        variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        request = {
            "template": tokenizer.chat_template,
            "turns": [dict(turn) for turn in turns],
            "variables": variables,
            "cpu_s": self._cpu_s,
        }
        answer = self._ask(json.dumps(request).encode())
        if "text" in answer:
            return answer["text"]
        reason = (answer.get("refused") or answer.get("failed") or "").replace(BREAK, "")
        if "refused" in answer:
            raise TemplateError(
                f"The model's chat template refused these messages: {reason:.300}",
                "Check the order of the messages; some templates allow no system message.",
            )
        raise TemplateFailedError(f"The model's chat template failed: {reason:.300}", _ANOTHER)

    def close(self) -> None:
        """End the child; safe to call twice."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with suppress(OSError):  # what it was not told cannot be flushed any more
                        stream.close()
            child.wait()

    def _ask(self, line: bytes) -> dict[str, str]:
        if self._child is None or self._child.poll() is not None:
            self._start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        try:
            child.stdin.write(line + b"\n")
            child.stdin.flush()
            reply = self._lines.get(timeout=self._deadline_s)
        except (OSError, queue.Empty):  # Windows calls a broken pipe an invalid argument
            reply = b""
        if reply:
            answer: dict[str, str] = json.loads(reply)
            return answer
        self.close()
        raise TemplateFailedError(
            "The model's chat template did not finish: it computes without end, or it needs more"
            " memory than a template may have.",
            _ANOTHER,
        )

    def _start(self) -> None:
        self.close()
        self._lines = queue.SimpleQueue()
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        threading.Thread(
            target=_forward, args=(self._child, self._lines), name="templates", daemon=True
        ).start()


def _forward(child: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on what the child writes; an empty line says that it ended."""
    assert child.stdout is not None
    try:
        for line in child.stdout:
            lines.put(line)
    except ValueError:
        pass  # closed meanwhile
    lines.put(b"")


def settle_template(templates: Templates, tokenizer: Any) -> str | None:
    """Try the tokenizer's template; give it one of ours where that is missing or no use.

    Returns:
        What a person should know of it, None where the model's own is used. A tokenizer whose
        vocabulary fits none of ours is left without a template.
    """
    fault = "It has no chat template"
    if tokenizer.chat_template:
        try:
            written = templates.render(tokenizer, [{"role": "user", "content": _TRIAL}])
        except TemplateFailedError as failure:
            fault = failure.message.rstrip(".")
        except TemplateError:
            return None  # it wants other messages, which is its right
        else:
            if _TRIAL in written:
                return None
            fault = "The model's chat template leaves the message out"
    ours = built_in_for(tokenizer.get_added_vocab())
    tokenizer.chat_template = None if ours is None else ours.template
    if ours is None:
        return f"{fault}, and none of PreScope's own fits."
    return f"{fault}; PreScope's own {ours.name} template is used instead."


_TRIAL = "Hello"


@dataclass(frozen=True)
class BuiltIn:
    """A template of ours for models that have these tokens."""

    name: str
    tokens: tuple[str, ...]
    template: str


def built_in_for(tokens: Mapping[str, object]) -> BuiltIn | None:
    """Return the template of ours that fits a vocabulary of added tokens, or None."""
    return next((one for one in BUILT_IN if all(t in tokens for t in one.tokens)), None)


def _plain(begin: str, turn: str, answer: str) -> str:
    # A line break at the very end of a template would be dropped.
    return (
        f"{begin}{{% for m in messages %}}{turn}{{% endfor %}}{{% if true %}}{answer}{{% endif %}}"
    )


_ALTERNATING = (
    "{%% for m in messages %%}{%% if m.role == 'assistant' %%}%s{%% else %%}%s{%% endif %%}"
    "{%% endfor %%}"
)
_LLAMA4 = "<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>"
_LLAMA3 = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
_GEMMA = (
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ m.content | trim }}<end_of_turn>\n"
)
BUILT_IN = (
    BuiltIn(
        "ChatML",
        ("<|im_start|>", "<|im_end|>"),
        _plain(
            "",
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
    ),
    BuiltIn(
        "Llama 3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _plain("{{ bos_token }}", _LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    BuiltIn(
        "Llama 4",
        ("<|header_start|>", "<|header_end|>", "<|eot|>"),
        _plain("{{ bos_token }}", _LLAMA4, "<|header_start|>assistant<|header_end|>\n\n"),
    ),
    BuiltIn(
        "Gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        _plain("{{ bos_token }}", _GEMMA, "<start_of_turn>model\n"),
    ),
    BuiltIn(
        "gpt-oss",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        _plain(
            "",
            "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
            "<|message|>{{ m.content }}<|end|>",
            "<|start|>assistant",
        ),
    ),
    BuiltIn(
        "DeepSeek",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜>"
        + _ALTERNATING
        % (
            "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>",
            "{% if m.role == 'user' %}<｜User｜>{% endif %}{{ m.content }}",
        )
        + "<｜Assistant｜>",
    ),
    BuiltIn(
        "GLM",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        _plain("[gMASK]<sop>", "<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n"),
    ),
    BuiltIn(
        "Granite",
        ("<|start_of_role|>", "<|end_of_role|>"),
        _plain(
            "",
            "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
    ),
    BuiltIn(
        "Phi",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        _plain("", "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
    ),
    BuiltIn(
        "Mistral",
        ("[INST]", "[/INST]"),
        "{{ bos_token }}"
        + _ALTERNATING % ("{{ m.content }}{{ eos_token }}", "[INST]{{ m.content }}[/INST]"),
    ),
)
