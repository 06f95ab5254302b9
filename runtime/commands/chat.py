"""`chat`: one prompt, one answer, in this process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runtime.commands.request import load_request


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Answer the prompt; the text is said as it comes."""
    from runtime.assembly import assemble
    from runtime.config import data_dir
    from runtime.core import Delta, Finished, LoadProgress, Message, SamplingParams

    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    messages = [Message("user", options.prompt)]
    if options.system is not None:
        messages.insert(0, Message("system", options.system))

    said = ""

    def progress(progress: LoadProgress) -> None:
        nonlocal said
        if options.json and progress.text != said:
            said = progress.text
            say(f"{said}\n")

    engine = assemble(
        load_request(options),
        progress=progress,
        virtual_clock=options.virtual_clock,
        data=data_dir(options.data_dir),
    )
    result: dict[str, Any] = {"text": "", "reasoning": "", "token_ids": []}
    result["remarks"] = list(engine.remarks)
    try:
        for chunk in engine.generate("chat", messages, params):
            if isinstance(chunk, Delta):
                result["text" if chunk.kind == "answer" else "reasoning"] += chunk.text
                result["token_ids"] += chunk.token_ids
                say("" if options.json else chunk.text)
            elif isinstance(chunk, Finished):
                result["finish_reason"] = chunk.reason
                result["stats"] = asdict(chunk.stats)
    finally:
        engine.close()
    return result


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    stats = result["stats"]
    mark = ", emulated" if stats["emulated"] else ""
    return (
        f"\n\n[{stats['new_tokens']} tokens, {stats['decode_tokens_per_s']:.1f} tokens/s, "
        f"first after {stats['ttft_s']:.2f} s, {stats['hit_rate']:.0%} of expert uses from slots; "
        f"{stats['device']}{mark}, {stats['policy']}]\n"
    )
