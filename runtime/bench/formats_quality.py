"""What quantising a model's experts does to its answers: held-out chats read with right answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from runtime.adapter import MoeLayer, attach
from runtime.bench.predictor_reading import open_in_place, read_chats
from runtime.core import ExpertId
from runtime.device_host import HostDevice
from runtime.formats import ExpertFormat, Form, FormKind, Matrix, lay_out
from runtime.kernels import views
from runtime.layer_rows import RoutedTokens, open_rows
from runtime.loader import LoadedModel
from runtime.quantize import form_of, quantise
from runtime.weight_forms import encode, memories, parts_of

CHATS_USED = 78
QUANTISED: dict[str, FormKind] = {"int8": "int8", "int4": "int4"}

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Held:
    """A layer's experts, held in some way."""

    layout: ExpertFormat
    experts: tuple[Parts, ...]


def quality_of_experts(
    folder: Path, chats_file: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compare int8 and int4 experts with those of the files: answers, next tokens, KL.

    Everything is computed in float32, so that the numbers differ and nothing else.

    Raises:
        ModelError: the model cannot be opened.
    """
    opened = open_in_place(folder)
    try:
        chats = [
            ids
            for ids in (_ids(opened, chat) for chat in read_chats(chats_file)[-CHATS_USED:])
            if ids is not None
        ]
        say(f"Reading {len(chats)} held-out chats with the experts as they are\n")
        plain = [_held(opened, layer, None) for layer in opened.layers]
        reference = _read(opened, plain, chats)
        plain_bytes = opened.store.ram_bytes * _stored_share(opened)
        experts = {"as they are": _compared(reference, reference, chats) | {"bytes_ratio": 1.0}}
        for name, kind in QUANTISED.items():
            say(f"The same chats with {name} experts\n")
            layers = [_held(opened, layer, kind) for layer in opened.layers]
            held_bytes = sum(len(layer.experts) * layer.layout.size_bytes for layer in layers)
            figures = _compared(reference, _read(opened, layers, chats), chats)
            experts[name] = figures | {"bytes_ratio": held_bytes / plain_bytes}
        return {"chats": len(chats), "experts": experts}
    finally:
        opened.store.close()


def _stored_share(opened: LoadedModel) -> float:
    """The experts are held in float32 here, and would be in bfloat16 on a card."""
    return 0.5 if opened.layers[0].format.parts[0].dtype == "float32" else 1.0


def _ids(opened: LoadedModel, chat: Sequence[Mapping[str, str]]) -> tuple[list[int], int] | None:
    """Return a chat's tokens and how many of them are the prompt; None: it cannot be read so."""
    tokenizer: Any = opened.tokenizer
    prompt, whole = (
        tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=open_answer, return_dict=False
        )
        for messages, open_answer in ((chat[:-1], True), (chat, False))
    )
    end = tokenizer.eos_token_id
    if end in whole[len(prompt) :]:
        whole = whole[: whole.index(end, len(prompt)) + 1]
    if whole[: len(prompt)] != prompt or not len(prompt) < len(whole) <= opened.context_tokens:
        return None
    return whole, len(prompt)


def _held(opened: LoadedModel, layer: MoeLayer, kind: FormKind | None) -> _Held:
    """Return a layer's experts as they are, or its matrices quantised and the rest as it is."""
    plain = tuple(
        views(opened.store.bytes_of(ExpertId(layer.index, expert)), layer.format)
        for expert in range(layer.experts)
    )
    if kind is None:
        return _Held(layer.format, plain)
    transposed = layer.math.transposed
    forms: dict[str, Form] = {}
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    matrices = []
    for part in layer.format.parts:
        shape = part.shape[::-1] if transposed else part.shape
        form = form_of(kind, (shape[0], shape[1])) if len(shape) == 2 else None
        if form is None:
            tensors.append((part.name, part.shape, part.dtype))
        else:
            forms[part.name] = form
            matrices.append(Matrix(part.name, (shape[0], shape[1]), form))
            tensors += parts_of(matrices[-1])
    layout = lay_out(tensors, matrices)
    slab = torch.zeros((layer.experts, layout.size_bytes), dtype=torch.uint8)
    experts = tuple(views(flat, layout) for flat in slab)
    for source, target, flat in zip(plain, experts, slab, strict=True):
        for name, tensor in source.items():
            if name not in forms:
                target[name].copy_(tensor)
        for matrix in matrices:
            weight = source[matrix.name].t() if transposed else source[matrix.name]
            encode(quantise(weight, matrix.form), matrix, memories(flat.numpy(), layout))
    return _Held(layout, experts)


def _read(
    opened: LoadedModel, held: Sequence[_Held], chats: Sequence[tuple[list[int], int]]
) -> list[Tensor]:
    """Return the log-probabilities of each chat's next tokens, (answer's tokens, vocabulary)."""
    maths = [
        layer.math.reading(mine.layout, few_tokens=None)
        for layer, mine in zip(opened.layers, held, strict=True)
    ]

    crossing = HostDevice()

    def run(layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        part = RoutedTokens(hidden, top_k_index, top_k_weights)
        (rows,), _ = open_rows(maths[layer], crossing, [part])
        for expert in rows.demands:
            rows.compute(expert, held[layer].experts[expert])
        return rows.combined()

    attach(opened.layers, run)
    probabilities = []
    with torch.inference_mode():
        for ids, prompt in chats:
            logits = opened.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            probabilities.append(log_softmax(logits[prompt - 1 : -1].float(), dim=-1))
    return probabilities


def _compared(
    reference: Sequence[Tensor], ours: Sequence[Tensor], chats: Sequence[tuple[list[int], int]]
) -> dict[str, float]:
    right = same = tokens = 0
    divergence = 0.0
    for theirs, mine, (ids, prompt) in zip(reference, ours, chats, strict=True):
        best = mine.argmax(dim=1)
        right += int(best.tolist() == ids[prompt:])
        same += int((best == theirs.argmax(dim=1)).sum())
        divergence += kl_div(mine, theirs, reduction="sum", log_target=True).item()
        tokens += len(best)
    return {
        "exact_match": right / len(chats),
        "same_tokens": same / tokens,
        "mean_kl": divergence / tokens,
    }
