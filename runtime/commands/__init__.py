"""The commands by name. Each module has `run(options, say) -> result` and `tell(result) -> text`.

`run` returns the JSON object; `tell` puts the same into words. Modules are imported only when
their command runs, and import what is heavy inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL = {
    "metavar": "MODEL",
    "help": "`default`, a folder, or owner/name of a model in the Hugging Face cache",
}


@dataclass(frozen=True)
class Command:
    """A subcommand: `arguments` are what `add_argument` takes, by name."""

    help: str
    module: str
    arguments: Mapping[str, Mapping[str, Any]]


COMMANDS = {
    "probe": Command("what this computer has and how fast it is", "runtime.commands.probe", {}),
    "plan": Command(
        "whether a model fits, what would go where, and how fast it would be",
        "runtime.commands.plan",
        {
            "model": {
                "metavar": "MODEL",
                "help": MODEL["help"] + "; a config.json without the weights is enough",
            },
            "--profile": {
                "metavar": "NAME",
                "help": "a machine by its card, such as rtx4090, in place of this one; --ram is"
                " then all the RAM it has",
            },
            "--link": {"metavar": "NAME", "help": "the stated card's link, such as pcie3x16"},
            "--cpu": {"metavar": "NAME", "help": "the stated machine's CPU, such as cpu55"},
            "--unloaded": {
                "action": "store_true",
                "help": "this machine as its last load found it, while no model is loaded; leaves"
                " the card alone",
            },
            "--context": {
                "type": int,
                "metavar": "TOKENS",
                "help": "room for one chat of so many tokens, at least",
            },
        },
    ),
    "chat": Command(
        "answer one prompt",
        "runtime.commands.chat",
        {
            "model": {**MODEL},
            "prompt": {"metavar": "PROMPT", "help": "what to say"},
            "--system": {"metavar": "TEXT", "help": "a system message before the prompt"},
            "--temperature": {
                "type": float,
                "default": 0.0,
                "metavar": "T",
                "help": "0 takes the likeliest token each time (default: %(default)s)",
            },
            "--top-p": {"type": float, "default": 1.0, "metavar": "P", "help": "(default: 1)"},
        },
    ),
    "bench": Command(
        "run a benchmark suite",
        "runtime.commands.bench",
        {
            "suite": {
                "nargs": "?",
                "metavar": "SUITE",
                "help": "which suite; without one, they are listed",
            },
            "--model": {**MODEL, "default": "default"},
            "--quick": {"action": "store_true", "help": "a subset, well under a minute"},
            "--full": {"action": "store_true", "help": "everything there is, an hour or more"},
            "--cells": {"type": int, "metavar": "N", "help": "only N of the suite's cells"},
            "--jobs": {
                "type": int,
                "default": 0,
                "metavar": "N",
                "help": "processes to run at once (default: one per core)",
            },
            "--plot": {"metavar": "FILE", "help": "draw the result into a PNG file"},
            "--charge-planning": {
                "action": "store_true",
                "help": "add what deciding takes in Python to the modelled host's time",
            },
            "--ablate": {"action": "store_true", "help": "leave out one part at a time instead"},
            "--planning": {"action": "store_true", "help": "how long plans take per layer instead"},
            "--live": {"action": "store_true", "help": "run the default model instead"},
            "--layers": {"type": int, "metavar": "N", "help": "layers of the large checkpoint"},
            "--folder": {"metavar": "DIR", "help": "where the large checkpoint lies, or shall lie"},
        },
    ),
    "doctor": Command("look for problems and say what to do", "runtime.commands.doctor", {}),
}
