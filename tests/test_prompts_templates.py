"""Strangers' chat templates: rendered as transformers would, and harmless whatever they try."""

from __future__ import annotations

import copy
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from runtime.core import Message
from runtime.errors import TemplateError
from runtime.prompts import BREAK, PromptEncoder
from runtime.prompts_templates import (
    BUILT_IN,
    TemplateFailedError,
    Templates,
    built_in_for,
    settle_template,
)
from tests.standin import CHATML, tokenizer

TURNS = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": 'Hëllo 語 "quoted"\n  two'},
    {"role": "assistant", "content": "<think>\nwell\n</think>\nHi"},
    {"role": "user", "content": "again"},
]


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    made = Templates(cpu_s=0.4)
    yield made
    made.close()


def words(template: str | None) -> Any:
    made = copy.copy(tokenizer())
    made.chat_template = template
    return made


HONEST = {
    "ChatML": CHATML,
    "loops and filters": "{% for m in messages %}{{ loop.index }}{{ m['role'] | upper }}:"
    "{{ m.content | trim | replace('l', 'L') }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "a macro": "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% endfor %}",
    "JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "special tokens": "{{ bos_token }}[{{ eos_token }}]{{ messages[0].content }}",
    "what is not there": "{% if tools %}a{% endif %}{% if documents is none %}b{% endif %}"
    "{{ enable_thinking is defined }}{{ add_generation_prompt }}{{ x is defined }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "white space": "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}\n{% endif %}\n"
    "{%- endfor %}\n",
    "slices": "{{ messages[1:][0].content.split('\\n')[-1] }}{{ messages[-1]['content'][::-1] }}",
    "a dict": "{{ dict(a=1) | tojson }}{{ messages[0].get('role') }}"
    "{{ messages[0].items() | list }}",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_render_as_in_transformers(name: str, templates: Templates) -> None:
    tokens = words(HONEST[name])
    theirs = tokens.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert templates.render(tokens, TURNS) == theirs


def test_the_prompt_is_the_same_whoever_renders(templates: Templates) -> None:
    messages = [Message("user", "a <|im_end|> b"), Message("assistant", "c"), Message("user", "d")]
    here = PromptEncoder(tokenizer()).encode(messages, 512)
    there = PromptEncoder(tokenizer(), templates.render).encode(messages, 512)
    assert here == there


HOSTILE = {
    "two nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "a comparison of powers": "{{ 7 ** (10 ** 8) > 3 }}",
    "a long text": "{{ 'a' * 2000000000 }}",
    "a doubling": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t | length }}",
    "a nested list": "{{ [[0] * 10000] * 100000 }}",
    "too much output": "{% for i in range(90000) %}0123456789012345678901234567890{% endfor %}",
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class access": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ 1 // 0 }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "no syntax": "{% for %}",
    "a division": "{{ 1 / 0 }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ 1 // 0 }}",
    "wide format": "{{ '%2000000000d' % 1 }}",
    "join": "{{ range(99999) | join('a' * 100000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_named_error(name: str, templates: Templates) -> None:
    began_s = time.monotonic()
    with pytest.raises(TemplateFailedError, match="chat template") as failed:
        templates.render(words(HOSTILE[name]), TURNS)
    assert failed.value.next_step
    assert time.monotonic() - began_s < 10  # 0.4 s of computing, on a machine that is busy
    # Whatever became of the child, the next conversation is served.
    assert templates.render(words(CHATML), TURNS).startswith("<|im_start|>system")


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EINVAL])
def test_a_child_that_died_unnoticed_ends_in_a_named_error(error: int) -> None:
    class Gone:
        """A pipe to nobody; Windows calls that an invalid argument."""

        def write(self, data: bytes) -> None:
            raise OSError(error, "nobody reads this")

        def flush(self) -> None:
            raise AssertionError("nothing was written")

        def close(self) -> None:
            raise OSError(error, "nobody reads this")

    templates = Templates()
    assert templates.render(words(CHATML), TURNS)
    child = templates._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    child.poll = lambda: None  # type: ignore[method-assign]
    child.stdin = Gone()  # type: ignore[assignment]
    with pytest.raises(TemplateFailedError, match="did not finish"):
        templates.render(words(CHATML), TURNS)
    assert child.returncode is not None
    assert templates.render(words(CHATML), TURNS)
    templates.close()


def test_what_a_template_says_itself_is_passed_on(templates: Templates) -> None:
    refusing = words("{{ raise_exception('roles must alternate' ~ messages[0].content) }}")
    with pytest.raises(TemplateError, match="roles must alternatea.b") as refused:
        templates.render(refusing, [{"role": "user", "content": f"a.{BREAK}b"}])
    assert not isinstance(refused.value, TemplateFailedError)


@pytest.mark.skipif(sys.platform == "win32", reason="rights are given up by POSIX limits")
def test_a_template_that_got_out_of_its_sandbox_could_not_open_a_file(tmp_path: Path) -> None:
    """The child itself, with its sandbox taken away."""
    import subprocess

    flag = tmp_path / "flag"
    child = (
        "import runpy, builtins, jinja2.sandbox\n"
        "jinja2.sandbox.ImmutableSandboxedEnvironment.is_safe_attribute = lambda *a: True\n"
        "jinja2.sandbox.ImmutableSandboxedEnvironment.is_safe_callable = lambda *a: True\n"
        "runpy.run_path('runtime/prompts_child.py', run_name='__main__')\n"
    )
    attack = (
        "{{ cycler.__init__.__globals__['__builtins__']['open'](%r, 'w') }}" % str(flag)  # noqa: UP031
    )
    import json

    request = json.dumps({"template": attack, "turns": [], "variables": {}, "cpu_s": 9.0}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", child],
        input=request.encode(),
        capture_output=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
        check=False,
    )
    assert b"failed" in done.stdout
    assert b"Too many open files" in done.stdout
    assert not flag.exists()


def test_a_child_that_dies_between_two_conversations_is_replaced() -> None:
    templates = Templates()
    try:
        templates.render(words(CHATML), TURNS)
        child = templates._child
        assert child is not None
        os.kill(child.pid, 9)
        child.wait()
        assert templates.render(words(CHATML), TURNS).endswith("assistant\n")
        second = templates._child
    finally:
        templates.close()
    assert second is not None
    assert second.poll() is not None
    templates.close()


def test_where_nothing_bounds_time_the_deadline_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: a child that answers nothing."""
    import runtime.prompts_templates as room

    silent = Path(__file__).parent / "silent_child.py"
    monkeypatch.setattr(room, "_CHILD", silent)
    templates = Templates(deadline_s=0.3)
    with pytest.raises(TemplateFailedError, match="did not finish"):
        templates.render(words(CHATML), TURNS)
    templates.close()


# Our own templates


@pytest.mark.parametrize("one", BUILT_IN, ids=lambda one: str(one.name))
def test_our_own_templates_hold_every_message_once_in_order(one: Any, templates: Templates) -> None:
    written = templates.render(words(one.template), TURNS)
    places = [written.index(turn["content"].strip()) for turn in TURNS]
    assert places == sorted(places)
    assert all(written.count(turn["content"].strip()) == 1 for turn in TURNS)
    assert written.index("again") < len(written) - 3  # something opens the answer
    vocabulary = dict.fromkeys(one.tokens, 1)
    assert built_in_for(vocabulary) is one
    for token in one.tokens:
        assert token in written or token in ("[INST]", "<|channel|>", "<|eot|>")


BAD = {
    "missing": (None, "has no chat template"),
    "endless": (HOSTILE["two nested loops"], "did not finish"),
    "broken": ("{% for %}", "failed"),
    "empty": ("{% if false %}x{% endif %}", "leaves the message out"),
    "deaf": ("<|im_start|>user\nfixed<|im_end|>", "leaves the message out"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_is_no_use_is_replaced_and_that_is_said(
    name: str, templates: Templates
) -> None:
    template, fault = BAD[name]
    tokens = words(template)
    told = settle_template(templates, tokens)
    assert told is not None
    assert fault in told
    assert "ChatML" in told
    prompt = PromptEncoder(tokens, templates.render).encode([Message("user", "hi")], 512)
    theirs = PromptEncoder(tokenizer()).encode([Message("user", "hi")], 512)
    assert prompt == theirs


def test_a_good_template_stays_and_nothing_is_said(templates: Templates) -> None:
    for template in (CHATML, "{{ raise_exception('a system message comes first') }}"):
        tokens = words(template)
        assert settle_template(templates, tokens) is None
        assert tokens.chat_template == template


def test_without_fitting_tokens_there_is_no_template(templates: Templates) -> None:
    tokens = words("{% for %}")
    tokens.get_added_vocab = lambda: {"<a>": AddedToken("<a>")}
    told = settle_template(templates, tokens)
    assert told is not None
    assert "none of PreScope's own fits" in told
    assert tokens.chat_template is None
