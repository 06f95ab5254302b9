"""The tokenizer and its special tokens, from JSON files alone and without any code of the model.

The tokenizer is what tokenizer.json says it is; no class is looked up by a name in a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from runtime.adapter_text_check import check_tokenizer
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.safetensors_files import open_regular, read_json

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 128 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_SMALL_BYTES = 16 * 2**20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_Tokenizer: Any = PreTrainedTokenizerFast
_AGAIN = "Download the model again, or choose another one."


def open_tokenizer(folder: Path, vocab_size: int) -> Any | None:
    """Return the folder's tokenizer, or None if it has none; `vocab_size` is the embedding's.

    Raises:
        ModelFilesError: a file is damaged or has token ids the model has no embedding for.
        UnsupportedModelError: there is a tokenizer, but not as tokenizer.json.
    """
    path = folder / TOKENIZER_NAME
    if not path.exists():
        others = [
            n
            for n in ("tokenizer.model", "vocab.json", "tiktoken.model", "spiece.model")
            if (folder / n).exists()
        ]
        if not others:
            return None
        raise UnsupportedModelError(
            f"The tokenizer is only there as {others[0]}; {TOKENIZER_NAME} is needed.",
            "Choose a version of this model that has tokenizer.json.",
        )
    with open_regular(path) as file:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES or not (file.read(1) or b"").startswith(b"{"):
            raise ModelFilesError(f"{TOKENIZER_NAME} ({size} bytes) is no tokenizer.", _AGAIN)
    check_tokenizer(path)
    settings = _optional_json(folder / "tokenizer_config.json", MAX_SMALL_BYTES)
    special = {name: _token(settings[name]) for name in _SPECIAL if settings.get(name)}
    try:
        tokenizer: Any = _Tokenizer(tokenizer_file=str(path), **special)
    except Exception as error:
        # The tokenizers library raises bare Exceptions for every fault of the file.
        raise ModelFilesError(f"{TOKENIZER_NAME} is damaged: {error!s:.200}", _AGAIN) from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise ModelFilesError(
            f"{TOKENIZER_NAME} has token id {highest}, but the model knows only {vocab_size}.",
            _AGAIN,
        )
    tokenizer.chat_template = _chat_template(folder, settings)
    return tokenizer


def eos_token_ids(folder: Path, config: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """Return the ids that end an answer: the generation settings', the model's, the tokenizer's."""
    settings = _optional_json(folder / "generation_config.json", MAX_SMALL_BYTES)
    text = config.get_text_config()
    ids: dict[int, None] = {}
    for source in (
        settings.get("eos_token_id"),
        getattr(config, "eos_token_id", None),
        getattr(text, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        for value in source if isinstance(source, list) else [source]:
            if type(value) is int and 0 <= value < text.vocab_size:
                ids[value] = None
    return tuple(ids)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        with open_regular(path) as file:
            text = file.read(MAX_TEMPLATE_BYTES + 1) or b""
        template: Any = text.decode("utf-8", errors="replace")
    else:
        template = settings.get("chat_template")
        if template is None:
            extra = _optional_json(folder / "chat_template.json", MAX_SMALL_BYTES)
            template = extra.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE_BYTES:
        raise ModelFilesError(
            f"The chat template is longer than {MAX_TEMPLATE_BYTES} characters.", _AGAIN
        )
    return template


def _optional_json(path: Path, max_bytes: int) -> dict[str, Any]:
    return read_json(path, max_bytes) if path.exists() else {}


def _token(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or len(text) > 1000:
        raise ModelFilesError(f"tokenizer_config.json has the token {str(value)[:40]!r}.", _AGAIN)
    return text
