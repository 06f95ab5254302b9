"""The table of families and formats: what the tests saw, written where it can be committed.

Tests call `note`; a run with PRESCOPE_FAMILY_TABLE=1 writes what all of them noted over the rows
that are there, so a column can be brought up to date alone:

    PRESCOPE_FAMILY_TABLE=1 pytest tests/test_families.py -m families
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "bench"
JSON_NAME, MARKDOWN_NAME = "families.json", "families.md"
PLAIN = "plain"

_noted: dict[str, dict[str, str]] = {}


def note(family: str, form: str, outcome: str) -> None:
    """Remember that `family` was loaded in `form` and how close its logits were."""
    _noted.setdefault(family, {})[form] = outcome


def read_table() -> dict[str, Any]:
    """Return the committed table; an empty one where there is none."""
    path = FOLDER / JSON_NAME
    if not path.exists():
        return {"transformers": "", "families": {}, "refused": {}}
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table


def is_current() -> bool:
    """Say whether the committed table was made with the installed transformers."""
    return bool(read_table()["transformers"] == transformers.__version__)


def is_written() -> bool:
    """Say whether this run writes the table."""
    return os.environ.get("PRESCOPE_FAMILY_TABLE") == "1"


def write_table(refused: dict[str, str]) -> None:
    """Write what was noted, if asked to by the environment; `refused` maps family to reason."""
    if not _noted or not is_written():
        return
    table = read_table()
    if not is_current():
        table["families"] = {}
    for family, forms in _noted.items():
        table["families"][family] = table["families"].get(family, {}) | forms
    table = {
        "transformers": transformers.__version__,
        "families": {name: table["families"][name] for name in sorted(table["families"])},
        "refused": dict(sorted(refused.items())),
    }
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / JSON_NAME).write_text(text, encoding="utf-8")
    (FOLDER / MARKDOWN_NAME).write_text(as_markdown(table), encoding="utf-8")


def as_markdown(table: dict[str, Any]) -> str:
    """Return the table for people."""
    families: dict[str, dict[str, str]] = table["families"]
    forms = [PLAIN, *sorted({form for row in families.values() for form in row} - {PLAIN})]
    lines = [
        "# Families and formats that the tests loaded",
        "",
        f"transformers {table['transformers']}. A tiny random checkpoint of each family is written",
        "as the hub holds it, loaded, and its logits compared: a plain one with stock `eager`, a",
        "quantised one with the same model on its dequantised weights. Written by the tests",
        "(`tests/family_table.py`); an empty cell was not tried.",
        "",
        "| family | " + " | ".join(forms) + " |",
        "|---" * (1 + len(forms)) + "|",
    ]
    for name, row in families.items():
        lines.append(f"| {name} | " + " | ".join(row.get(form, "") for form in forms) + " |")
    lines += ["", "## Refused by name", "", "| family | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in table["refused"].items()]
    return "\n".join(lines) + "\n"
