"""A chat with a GGUF file, through the whole engine: the default model, written as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR, model_folder
from runtime.core import Delta, LoadRequest, Message, SamplingParams
from runtime.loader import read_shape
from tests.checkpoints import load_reference
from tests.gguf_models import GgufModel, made_from
from tests.gguf_text import tokenizer_metadata
from tests.gguf_writer import Stored

QUESTIONS = ["Hello, who are you?", "What is 17 + 5?"]


def answers(model: str) -> list[str]:
    engine = assemble(LoadRequest(model=model), virtual_clock=True)
    texts = []
    for question in QUESTIONS:
        chunks = engine.generate(
            question, [Message("user", question)], SamplingParams(max_new_tokens=24), lambda: False
        )
        texts.append("".join(chunk.text for chunk in chunks if isinstance(chunk, Delta)))
    engine.close()
    return texts


def default_as_gguf() -> GgufModel:
    config = AutoConfig.from_pretrained(DEFAULT_MODEL_DIR)
    reference = load_reference(DEFAULT_MODEL_DIR, config)
    metadata = tokenizer_metadata(DEFAULT_MODEL_DIR, "smollm")
    return made_from(reference, "qwen3_moe", "BF16", metadata)


def q8_0(matrix: Tensor) -> Stored:
    """Round a matrix to blocks of 32 numbers that share a float16 scale."""
    blocks = matrix.float().reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).to(torch.float16)
    codes = (blocks / scales.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
    raw = torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), 1)
    return Stored("Q8_0", tuple(matrix.shape), raw.numpy().tobytes())


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return answers("default")


def test_a_gguf_of_the_default_model_answers_like_it(tmp_path: Path, expected: list[str]) -> None:
    path = default_as_gguf().write(tmp_path / "tiny.gguf")
    assert all(expected)
    assert answers(str(path)) == expected
    assert read_shape(model_folder(str(tmp_path))) == read_shape(path)


def test_eight_bits_are_enough_for_the_same_answers(tmp_path: Path, expected: list[str]) -> None:
    made = default_as_gguf()
    for name, held in made.tensors.items():
        if held.type == "BF16":
            raw = torch.frombuffer(bytearray(held.content), dtype=torch.bfloat16)
            made.tensors[name] = q8_0(raw.view(held.shape))
    path = made.write(tmp_path / "tiny-Q8_0.gguf")
    assert path.stat().st_size < 0.62 * default_as_gguf().write(tmp_path / "b.gguf").stat().st_size
    assert answers(str(path)) == expected


def test_a_link_to_a_file_without_the_suffix_is_followed(tmp_path: Path) -> None:
    made = default_as_gguf()
    blob = made.write(tmp_path / "0123abcd")
    link = tmp_path / "tiny.gguf"
    try:
        link.symlink_to(blob)
    except OSError:
        pytest.skip("links need rights on Windows")
    assert model_folder(str(link)) == link
    assert read_shape(model_folder(str(link))).name == "tiny"
