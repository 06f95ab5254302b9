"""The default model's tokenizer, or any other byte-level one, as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def tokenizer_metadata(folder: Path, rule: str) -> dict[str, Any]:
    """Return what llama.cpp's converter writes for tokenizer.json and its settings."""
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    vocab = described["model"]["vocab"]
    added = {entry["content"]: entry for entry in described["added_tokens"]}
    numbered = vocab | {text: entry["id"] for text, entry in added.items()}
    tokens = sorted(numbered.items(), key=lambda pair: pair[1])
    kinds = []
    for token, _ in tokens:
        special = added.get(token)
        kind = CONTROL if special and special["special"] else USER_DEFINED
        kinds.append(kind if special else NORMAL)
    ids = dict(tokens)
    template = folder / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": ids[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[settings["pad_token"]],
        "tokenizer.chat_template": template.read_text("utf-8"),
    }
