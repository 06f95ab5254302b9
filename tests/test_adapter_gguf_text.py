"""Tokenizers in GGUF metadata: the same ids as the model's own files give, or a named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from runtime import adapter_gguf_text
from runtime.adapter_gguf_text import MAX_TOKEN_CHARACTERS, gguf_eos_token_ids, open_gguf_tokenizer
from runtime.adapter_text import MAX_TEMPLATE_BYTES, eos_token_ids, open_tokenizer
from runtime.config import DEFAULT_MODEL_DIR
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_files import GgufFiles
from tests.checkpoints import attach_plain_runner, load, load_reference, logits
from tests.gguf_models import made_from
from tests.gguf_text import CONTROL, NORMAL, USER_DEFINED, tokenizer_metadata
from tests.gguf_writer import gguf_bytes

RULE = "smollm"  # Single digits, then the words of GPT-2: as the default model splits text.
KEY = "tokenizer.ggml"
TEXTS = (
    "Hello, world! It's 2026; 3.14 is not 42.",
    "  leading and   inner spaces\n\n\tand a tab",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600 \u0000\u00ff",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start|",
    "",
)


def opened(folder: Path, metadata: dict[str, Any]) -> GgufFiles:
    path = folder / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "qwen3moe", **metadata}, {}))
    files = GgufFiles(path)
    files.close()  # The metadata is in memory.
    return files


def default_metadata(**changes: Any) -> dict[str, Any]:
    """Return the default model's metadata; None takes a key away."""
    changed = {f"{KEY}.{key}": value for key, value in changes.items()}
    metadata = tokenizer_metadata(DEFAULT_MODEL_DIR, RULE) | changed
    return {key: value for key, value in metadata.items() if value is not None}


def test_the_default_tokenizer_gives_the_same_ids_and_texts(tmp_path: Path) -> None:
    theirs = open_tokenizer(DEFAULT_MODEL_DIR, 2048)
    ours = open_gguf_tokenizer(opened(tmp_path, default_metadata()), 2048)
    assert ours is not None
    assert theirs is not None
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    chat = [{"role": "user", "content": "What is 17 + 4?"}]
    rendered = [
        each.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for each in (ours, theirs)
    ]
    assert rendered[0] == rendered[1]
    assert "<|im_start|>" in rendered[0]
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    special = {number: token.special for number, token in ours.added_tokens_decoder.items()}
    assert special == {n: token.special for n, token in theirs.added_tokens_decoder.items()}


def test_the_comparison_notices_merges_in_another_order(tmp_path: Path) -> None:
    theirs = open_tokenizer(DEFAULT_MODEL_DIR, 2048)
    merges = default_metadata()[f"{KEY}.merges"][::-1]
    ours = open_gguf_tokenizer(opened(tmp_path, default_metadata(merges=merges)), 2048)
    assert theirs is not None
    assert ours is not None
    assert any(ours.encode(text) != theirs.encode(text) for text in TEXTS)


def test_the_default_model_as_gguf_is_the_default_model(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(DEFAULT_MODEL_DIR)
    reference = load_reference(DEFAULT_MODEL_DIR, config)
    path = made_from(reference, "qwen3_moe", "BF16", default_metadata()).write(tmp_path / "m.gguf")
    loaded, theirs = load(path), load(DEFAULT_MODEL_DIR)
    assert loaded.has_chat_template
    assert loaded.eos_token_ids == theirs.eos_token_ids
    assert loaded.context_tokens == theirs.context_tokens
    assert loaded.shape.experts == theirs.shape.experts
    assert loaded.shape.expert_bytes == theirs.shape.expert_bytes
    for model in (loaded, theirs):
        attach_plain_runner(model.layers, model.store)
    assert loaded.model.dtype == torch.bfloat16
    for ours, expected in zip(logits(loaded.model), logits(theirs.model), strict=True):
        assert torch.equal(ours, expected)


def test_end_tokens_are_those_of_text_turn_and_message(tmp_path: Path) -> None:
    ends = {"eos_token_id": 2, "eot_token_id": 7, "eom_token_id": 2}
    files = opened(tmp_path, default_metadata(**ends))
    assert gguf_eos_token_ids(files, 2048) == (2, 7)
    config = AutoConfig.from_pretrained(DEFAULT_MODEL_DIR)
    theirs = eos_token_ids(DEFAULT_MODEL_DIR, config, None)
    assert gguf_eos_token_ids(opened(tmp_path, default_metadata()), 2048) == theirs
    none = default_metadata(eos_token_id=2**32 - 1)
    assert gguf_eos_token_ids(opened(tmp_path, none), 2048) == ()


def test_special_tokens_outside_the_byte_alphabet_are_found_whole(tmp_path: Path) -> None:
    metadata = default_metadata()
    added = ["<\uff5cUser\uff5c>", "<\u2581end of\u2581text>"]
    metadata[f"{KEY}.tokens"] += added
    metadata[f"{KEY}.token_type"] += [CONTROL, USER_DEFINED]
    tokenizer = open_gguf_tokenizer(opened(tmp_path, metadata), 2050)
    for number, token in enumerate(added, 2048):
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
        assert number in ids
        assert tokenizer.decode(ids) == f"a{token}b"
    text = f"a{added[0]}b{added[1]}"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == f"ab{added[1]}"


@pytest.mark.parametrize(
    ("rule", "text", "pieces"),
    [
        ("gpt-2", "ab 123 4", ["ab", " 123", " 4"]),
        ("smollm", "ab 12", ["ab", " ", "1", "2"]),
        ("qwen2", "ab 123\n x", ["ab", " ", "1", "2", "3", "\n", " x"]),
        ("glm4", "ab 12345", ["ab", " ", "123", "45"]),
        ("gpt-4o", "abC's 1234", ["ab", "C's", " ", "123", "4"]),
        ("deepseek-v3", "ab 1234\u4f60\u597d!x", ["ab", " ", "123", "4", "\u4f60\u597d", "!x"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(
    rule: str, text: str, pieces: list[str], tmp_path: Path
) -> None:
    tokenizer = open_gguf_tokenizer(opened(tmp_path, default_metadata(pre=rule)), 2048)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in split] == pieces


def test_a_sentence_piece_vocabulary_merges_by_its_scores(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello"]
    tokens = pieces + words
    metadata = {
        f"{KEY}.model": "llama",
        f"{KEY}.tokens": tokens,
        f"{KEY}.scores": [0.0] * len(pieces) + [-float(n) for n in range(len(words))][::-1],
        f"{KEY}.token_type": [2, CONTROL, CONTROL, *[6] * 256, *[NORMAL] * len(words)],
        f"{KEY}.bos_token_id": 1,
        f"{KEY}.eos_token_id": 2,
        f"{KEY}.unknown_token_id": 0,
    }
    tokenizer = open_gguf_tokenizer(opened(tmp_path, metadata), len(tokens))
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    assert [tokens[number] for number in ids] == ["\u2581hello", "\u2581hello"]
    for text in ("hello", "hello z\u00f6o", "</s>hello"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.eos_token == "</s>"


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert open_gguf_tokenizer(opened(tmp_path, {}), 2048) is None


TOKENS = default_metadata()[f"{KEY}.tokens"]
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": None}, "no tokens"),
    "tokens that are one text": ({"tokens": "abc"}, "no tokens"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "no tokens"),
    "more tokens than embeddings": ({"tokens": [*TOKENS, "more"]}, "2049 tokens"),
    "a token twice": ({"tokens": [*TOKENS[:-1], TOKENS[5]]}, "is there twice"),
    "an endless token": (
        {"tokens": [*TOKENS[:-1], "x" * (MAX_TOKEN_CHARACTERS + 1)]},
        "1025 characters",
    ),
    "too few types": ({"token_type": [1, 1]}, "2048 tokens have 2 of token_type"),
    "types that are texts": ({"token_type": ["a"]}, "token_type"),
    "merges that are numbers": ({"merges": [1, 2]}, "no list of texts"),
    "a merge of one": ({"merges": ["ab"]}, "is no pair"),
    "a merge of three": ({"merges": ["a b c"]}, "is no pair"),
    "a merge of unknown tokens": ({"merges": ["qqqq zzzz"]}, "damaged"),
    "an end that is no token": ({"eos_token_id": 2048}, "eos token is 2048"),
    "an end in words": ({"eos_token_id": "2"}, "eos token is 2"),
    "an end below zero": ({"padding_token_id": -1}, "padding token is -1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tokenizers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, words = DAMAGED[name]
    with pytest.raises(ModelFilesError, match=words):
        open_gguf_tokenizer(opened(tmp_path, default_metadata(**changes)), 2048)


def test_vocabularies_that_would_take_minutes_are_refused(tmp_path: Path) -> None:
    many = default_metadata(token_type=[CONTROL] * 2048)
    files = opened(tmp_path, many)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_gguf_text, "MAX_ADDED_TOKENS", 2047)
        with pytest.raises(ModelFilesError, match="2048 special tokens"):
            open_gguf_tokenizer(files, 2048)
    long = {
        f"{KEY}.model": "llama",
        f"{KEY}.tokens": [f"{number:01000d}" for number in range(4500)],
        f"{KEY}.scores": [0.0] * 4500,
    }
    with pytest.raises(ModelFilesError, match="too long to find their merges"):
        open_gguf_tokenizer(opened(tmp_path, long), 4500)
    del long[f"{KEY}.scores"]
    with pytest.raises(ModelFilesError, match="neither merges nor scores"):
        open_gguf_tokenizer(opened(tmp_path, long), 4500)


def test_a_template_may_not_be_endless(tmp_path: Path) -> None:
    metadata = default_metadata() | {"tokenizer.chat_template": "x" * (MAX_TEMPLATE_BYTES + 1)}
    with pytest.raises(ModelFilesError, match="chat template is longer"):
        open_gguf_tokenizer(opened(tmp_path, metadata), 2048)
    metadata["tokenizer.chat_template"] = 5
    tokenizer = open_gguf_tokenizer(opened(tmp_path, metadata), 2048)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "rwkv"}, "of the kind 'rwkv'"),
        ({"model": 5}, "of the kind '5'"),
        ({"pre": "brand-new"}, "says 'brand-new' of how its tokenizer splits text"),
        ({"pre": None}, "does not say how its tokenizer splits text"),
    ],
)
def test_tokenizers_that_would_be_guessed_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        open_gguf_tokenizer(opened(tmp_path, default_metadata(**changes)), 2048)
