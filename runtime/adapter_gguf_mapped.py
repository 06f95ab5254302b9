"""Architectures whose way from GGUF to parameters transformers describes itself: used as it says.

Only names and arithmetic are taken from it; files are opened, checked and read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.utils import (
    get_gguf_conversion_mapping,
    is_gguf_arch_supported,
)

from runtime.adapter_config import REFUSALS
from runtime.errors import ModelFilesError


class GgufMapping:
    """transformers' own renamings and conversions for one architecture."""

    def __init__(self, architecture: str, skeleton: Any) -> None:
        entries = get_gguf_conversion_mapping(architecture, skeleton.config)
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: entry for entry in self._converters for p in entry.source_patterns}
        self._prefix = skeleton.base_model_prefix
        self._state = skeleton.state_dict()

    def place(self, name: str) -> str:
        """Return the parameter that a tensor becomes."""
        return self._renamed(name)[0]

    def arranged(self, name: str, shape: tuple[int, ...], numbers: Sequence[Tensor]) -> Tensor:
        """Return the parameter of this shape from a tensor's numbers."""
        (tensor,) = numbers
        place, pattern = self._renamed(name)
        if pattern is None:
            return tensor.reshape(shape)
        for operation in self._by_pattern[pattern].operations:
            results: Any = operation.convert(
                {pattern: tensor},
                source_patterns=[pattern],
                target_patterns=[place],
                full_layer_name=place,
            )
            (tensor,) = results.values()
        return tensor.reshape(shape)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        return renamed


def mapping_of(architecture: str, skeleton: Any) -> GgufMapping | None:
    """Return transformers' mapping for an architecture, or None where it has none.

    Raises:
        ModelFilesError: the sizes in the configuration do not fit each other.
    """
    if not is_gguf_arch_supported(architecture):
        return None
    try:
        return GgufMapping(architecture, skeleton)
    except REFUSALS as error:
        raise ModelFilesError(
            f"No {architecture} model can be made of the metadata: {error!s:.200}",
            "Download the model again, or choose another one.",
        ) from error


def mapped_config(
    architecture: str, metadata: dict[str, Any], tensors: Sequence[str]
) -> dict[str, Any]:
    """Return the configuration that transformers makes of the metadata, unchecked.

    Raises:
        KeyError: the metadata lacks something.
    """
    lists = {key: value.tolist() if hasattr(value, "tolist") else value
             for key, value in metadata.items()}  # fmt: skip
    # transformers wants the length of the vocabulary in its place.
    lists["tokenizer.ggml.tokens"] = len(lists.get("tokenizer.ggml.tokens") or ())
    config: dict[str, Any] = GGUF_CONFIG_ARCHS[architecture](lists, tuple(tensors))
    return config
