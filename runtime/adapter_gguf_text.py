"""The tokenizer, chat template and end tokens that GGUF metadata describes, checked before use.

transformers brings the SentencePiece kind and the rules by which text is split. Byte-level
tokenizers are put together here: its own converter respells special tokens that are not written
in the byte alphabet, such as DeepSeek's, and would never find them in a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)

from runtime.adapter_text import MAX_TEMPLATE_BYTES
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_files import GgufFiles

MAX_TOKENS = 2**20
MAX_TOKEN_CHARACTERS = 1024
MAX_ADDED_TOKENS = 2**14
MAX_CHARACTERS_TO_MERGE = 2**22
_KEY = "tokenizer.ggml"
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
# Rules of llama.cpp that transformers lacks: the same text splits as in those models' own files.
_DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
_GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais"}
_SPLITS = {
    **GGUF_PRE_TOKENIZER_SPLITS,
    **dict.fromkeys(("glm4", "chatglm-bpe"), GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]),
}
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Whole words of these vocabularies are taken as they are, before any merge.
_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"}
_Fast: Any = PreTrainedTokenizerFast
_AGAIN = "Download the model again, or choose another one."


def open_gguf_tokenizer(files: GgufFiles, vocab_size: int) -> Any | None:
    """Return the tokenizer that the metadata describes, or None if it describes none.

    Raises:
        ModelFilesError: its lists do not fit each other or the model's `vocab_size` embeddings.
        UnsupportedModelError: it is of a kind that cannot be built.
    """
    kind = files.metadata.get(f"{_KEY}.model")
    if kind is None:
        return None
    name = files.paths[0].name
    tokens = _tokens(files, name, vocab_size)
    types = _numbers(files, name, "token_type", len(tokens))
    added = sum(kind in (_CONTROL, _USER_DEFINED) for kind in types or ())
    if added > MAX_ADDED_TOKENS:
        _damaged(name, f"it has {added} special tokens")
    merges = _merges(files, name)
    try:
        if kind == "gpt2":
            backend = _byte_level(tokens, types, merges, _rule(files, name))
        elif kind == "llama":
            backend = _sentence_piece(files, name, tokens, types)
        else:
            raise UnsupportedModelError(
                f"{name} has a tokenizer of the kind {str(kind)[:40]!r}, which cannot be built"
                " yet.",
                "Choose the same model as safetensors.",
            )
        special = {
            ours: tokens[number]
            for ours, theirs in _SPECIAL.items()
            if (number := _token_id(files, theirs, len(tokens))) is not None
        }
        tokenizer: Any = _Fast(tokenizer_object=backend, **special)
    except (ModelFilesError, UnsupportedModelError):
        raise
    except Exception as error:
        # The tokenizers library raises bare Exceptions for every fault of a vocabulary.
        raise ModelFilesError(
            f"{name}: its tokenizer is damaged: {error!s:.200}", _AGAIN
        ) from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        _damaged(name, f"it has token id {highest}, but the model knows only {vocab_size}")
    tokenizer.chat_template = _chat_template(files, name)
    return tokenizer


def gguf_eos_token_ids(files: GgufFiles, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end an answer: of the text, the turn, or the message."""
    found = [_token_id(files, name, vocab_size) for name in _ENDS]
    return tuple(dict.fromkeys(number for number in found if number is not None))


def _tokens(files: GgufFiles, name: str, vocab_size: int) -> list[str]:
    tokens = files.metadata.get(f"{_KEY}.tokens")
    if not isinstance(tokens, list) or not tokens:
        _damaged(name, "its tokenizer has no tokens")
    if len(tokens) > min(vocab_size, MAX_TOKENS):
        _damaged(name, f"it has {len(tokens)} tokens, but the model knows only {vocab_size}")
    longest = max(tokens, key=len)
    if len(longest) > MAX_TOKEN_CHARACTERS:
        _damaged(name, f"it has a token of {len(longest)} characters")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        _damaged(name, f"the token {twice[:40]!r} is there twice")
    return tokens


def _merges(files: GgufFiles, name: str) -> list[tuple[str, str]] | None:
    merges = files.metadata.get(f"{_KEY}.merges")
    if merges is None:
        return None
    if not isinstance(merges, list):
        _damaged(name, "its merges are no list of texts")
    pairs = []
    for merge in merges:
        first, space, second = merge.partition(" ")
        if not (first and space and second) or " " in second:
            _damaged(name, f"the merge {merge[:40]!r} is no pair")
        pairs.append((first, second))
    return pairs


def _numbers(files: GgufFiles, name: str, key: str, count: int) -> list[float] | None:
    """Return a list with one number per token, or None where the file has none."""
    numbers = files.metadata.get(f"{_KEY}.{key}")
    if numbers is None:
        return None
    if not isinstance(numbers, np.ndarray) or len(numbers) != count:
        size = len(numbers) if isinstance(numbers, (np.ndarray, list)) else "no list"
        _damaged(name, f"its {count} tokens have {size} of {key}")
    listed: list[float] = numbers.tolist()
    return listed


def _token_id(files: GgufFiles, name: str, count: int) -> int | None:
    number = files.metadata.get(f"{_KEY}.{name}_token_id")
    if number is None or number == 2**32 - 1:  # How some converters write "none".
        return None
    if type(number) is not int or not 0 <= number < count:
        _damaged(files.paths[0].name, f"its {name} token is {str(number)[:40]} of {count}")
    return number


def _rule(files: GgufFiles, name: str) -> str:
    rule = files.metadata.get(f"{_KEY}.pre")
    known = {*_SPLITS, *_GPT2, *_DIGITS_APART, "deepseek-v3"}
    if not isinstance(rule, str) or rule not in known:
        what = "does not say" if rule is None else f"says {str(rule)[:40]!r} of"
        raise UnsupportedModelError(
            f"{name} {what} how its tokenizer splits text, which cannot be followed yet.",
            "Choose a newer file of this model, or the same model as safetensors.",
        )
    return rule


def _byte_level(
    tokens: Sequence[str],
    types: Sequence[float] | None,
    merges: Sequence[tuple[str, str]] | None,
    rule: str,
) -> Any:
    spelling: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    alphabet = set(spelling.values())
    added = {_CONTROL: list[str](), _USER_DEFINED: list[str]()}
    vocab: dict[str, int] = {}
    for number, token in enumerate(tokens):
        kind = int(types[number]) if types else 0
        if kind in added and token:
            added[kind].append(token)
        elif not alphabet.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode("utf-8"))
        vocab.setdefault(token, number)
    backend: Any = Tokenizer(
        BPE(vocab=vocab, merges=list(merges or ()), ignore_merges=rule in _WORDS_FIRST)
    )
    backend.pre_tokenizer = _splitting(rule)
    backend.decoder = decoders.ByteLevel()
    for kind, texts in added.items():
        special = kind == _CONTROL
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(text, normalized=False, special=special) for text in texts])
    return backend


def _splitting(rule: str) -> Any:
    if rule in _GPT2 or rule in _DIGITS_APART:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        apart = pre_tokenizers.Digits(individual_digits=True)
        return plain if rule in _GPT2 else pre_tokenizers.Sequence([apart, plain])
    texts = _DEEPSEEK_V3 if rule == "deepseek-v3" else (_SPLITS[rule],)
    steps = [pre_tokenizers.Split(Regex(text), behavior="isolated") for text in texts]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, plain])


def _sentence_piece(
    files: GgufFiles, name: str, tokens: Sequence[str], types: Sequence[float] | None
) -> Any:
    described: dict[str, Any] = {
        "tokenizer_type": "llama",
        "tokens": list(tokens),
        "scores": _numbers(files, name, "scores", len(tokens)),
        "token_type": types,
    }
    merges = files.metadata.get(f"{_KEY}.merges")
    if merges is not None:
        described["merges"] = merges
    elif described["scores"] is None:
        _damaged(name, "its tokenizer has neither merges nor scores")
    elif sum(map(len, tokens)) > MAX_CHARACTERS_TO_MERGE:
        # Merges are found by cutting every token everywhere.
        _damaged(name, "its tokens are too long to find their merges")
    backend, _ = convert_gguf_tokenizer("llama", described)
    return backend


def _chat_template(files: GgufFiles, name: str) -> str | None:
    template = files.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE_BYTES:
        _damaged(name, f"its chat template is longer than {MAX_TEMPLATE_BYTES} characters")
    return template


def _damaged(name: str, what: str) -> NoReturn:
    raise ModelFilesError(f"{name}: {what}.", _AGAIN)
