"""A predictor's files: what ships with a model, and what was learned on this machine.

Each is a pair, weights as safetensors and a small JSON beside them, with a format version, the
fingerprint of the model's routers and a hash of the weights. A file that does not fit is ignored,
and the reason is returned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from runtime.predictor_reuse import RouterView

FORMAT_VERSION = 1
SHIPPED_NAME = "predictor"
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Stored:
    """What a pair of files holds: named tensors and plain facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def fingerprint(views: Sequence[RouterView | None]) -> str:
    """Name a model by its routers: their shapes and a hash of their weights in bfloat16.

    The same for one checkpoint whatever dtype it is loaded in, if it is stored in bfloat16.
    """
    digest = hashlib.sha256()
    for view in views:
        if view is None:
            digest.update(b"none;")
            continue
        weight = view.weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{tuple(weight.shape)}/{view.top_k}/{view.scoring};".encode())
        digest.update(weight.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write both files; the JSON last and at once, so that a half-written pair is never valid.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
    header = {**facts, "format": FORMAT_VERSION, "sha256": hashlib.sha256(raw).hexdigest()}
    for path, content in (
        (folder / f"{name}.safetensors", raw),
        (folder / f"{name}.json", (json.dumps(header, indent=1) + "\n").encode()),
    ):
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        os.replace(partial, path)


def read(folder: Path, name: str, expected_fingerprint: str) -> tuple[Stored | None, str]:
    """Return what the pair holds and "", or None and why it is ignored ("" if there is none)."""
    weights, facts_path = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not facts_path.exists() and not weights.exists():
        return None, ""
    try:
        if max(weights.stat().st_size, facts_path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MiB")
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT_VERSION:
            raise ValueError(f"its format is not {FORMAT_VERSION}")
        if facts.get("fingerprint") != expected_fingerprint:
            raise ValueError("it was made for another model")
        raw = weights.read_bytes()
        if hashlib.sha256(raw).hexdigest() != facts.get("sha256"):
            raise ValueError("its weights are not those it was written with")
        tensors = load(raw)
        broken = [
            key
            for key, tensor in tensors.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        if broken:
            raise ValueError(f"{broken[0]} has values that are not finite")
        return Stored(tensors, facts), ""
    except (OSError, ValueError, SafetensorError) as error:
        return None, f"The predictor's file {facts_path} is ignored: {error}."


def remove(folder: Path, name: str) -> None:
    """Delete the pair, the JSON first."""
    for suffix in (".json", ".safetensors"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
