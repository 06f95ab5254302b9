"""What a model is loaded from: the hub's safetensors folder, or GGUF files; opened and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.adapter import MoeLayer
from runtime.adapter_config import read_config, read_quantisation
from runtime.adapter_gguf import sort_gguf
from runtime.adapter_gguf_config import read_gguf_config
from runtime.adapter_gguf_text import gguf_eos_token_ids, open_gguf_tokenizer
from runtime.adapter_recipes import Checkpoint, sort_checkpoint
from runtime.adapter_text import eos_token_ids, open_tokenizer
from runtime.gguf_files import GgufFiles, is_gguf
from runtime.gguf_names import model_stem
from runtime.quantized_folding import fold
from runtime.safetensors_files import SafetensorsFiles


@dataclass(frozen=True)
class ModelSource:
    """The open files of one model and how they are read; whoever opened it closes `files`.

    `sort(skeleton, layers)` finds experts and dense weights, `tokenizer()` opens the tokenizer,
    and `end_ids(tokenizer)` returns the ids that end an answer.
    """

    name: str
    files: SafetensorsFiles
    config: Any
    sort: Callable[[nn.Module, Sequence[MoeLayer]], Checkpoint]
    tokenizer: Callable[[], Any | None]
    end_ids: Callable[[Any | None], tuple[int, ...]]


def open_source(path: Path, half: torch.dtype = torch.bfloat16) -> ModelSource:
    """Open the model at `path`: a folder of safetensors, a folder of GGUF, or one GGUF file.

    Quantised weights in a folder that name float16 are for computing in `half`.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
    """
    if is_gguf(path):
        return _opened(GgufFiles(path), _gguf_source)
    return _opened(SafetensorsFiles(path), lambda files: _folder_source(path, files, half))


def _opened(files: Any, build: Callable[[Any], ModelSource]) -> ModelSource:
    try:
        return build(files)
    except BaseException:
        files.close()
        raise


def _folder_source(folder: Path, files: SafetensorsFiles, half: torch.dtype) -> ModelSource:
    config = read_config(folder, half)
    tensors = fold(files.tensors, read_quantisation(folder))
    vocab_size = config.get_text_config().vocab_size
    return ModelSource(
        name=folder.name,
        files=files,
        config=config,
        sort=lambda skeleton, layers: sort_checkpoint(skeleton, layers, tensors),
        tokenizer=lambda: open_tokenizer(folder, vocab_size),
        end_ids=lambda tokenizer: eos_token_ids(folder, config, tokenizer),
    )


def _gguf_source(files: GgufFiles) -> ModelSource:
    config = read_gguf_config(files)
    vocab_size = config.get_text_config().vocab_size
    return ModelSource(
        name=model_stem(files.paths[0].name),
        files=files,
        config=config,
        sort=partial(sort_gguf, files),
        tokenizer=lambda: open_gguf_tokenizer(files, vocab_size),
        end_ids=lambda tokenizer: gguf_eos_token_ids(files, vocab_size),
    )
