"""Where a model's numbers become invalid: one pass with every layer watched, after the fact.

Watching costs a wait per layer, so that nothing of it is done while the numbers are good.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import InvalidNumbersError

MAX_TOKENS = 256
_LAYER = re.compile(r"(?:^|.*\.)(\d+)")
_NEXT_STEP = "Load the model again; if it happens every time, its files are damaged."


def named(model: object, run: Callable[[], object], error: InvalidNumbersError) -> Exception:
    """Return `error` with the layer in which it began, as far as another pass shows it.

    `run` computes that pass; whatever it raises or returns is ignored.
    """
    if not isinstance(model, nn.Module):
        return error
    where = _first_invalid(model, run)
    if where is None:
        return error
    return InvalidNumbersError(f"The model produced invalid numbers in {where}.", _NEXT_STEP)


def _first_invalid(model: nn.Module, run: Callable[[], object]) -> str | None:
    found: list[str] = []
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        number = _LAYER.fullmatch(name)
        assert number is not None

        def note(module: nn.Module, args: Any, named_args: Any, output: Any) -> None:
            if found or _is_valid(output):
                return
            came_so = not _is_valid((args, list(named_args.values())))
            where = f"layer {number[1]} ({name})"
            found.append(f"what {where} is given" if came_so else where)

        return note

    for name, module in model.named_modules():
        if _is_layer(model, name):
            hooks.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _is_layer(model: nn.Module, name: str) -> bool:
    """Say whether a module is an entry of a list that lies in no other list: a decoder layer."""
    *above, last = name.split(".")
    if not last.isdigit() or any(part.isdigit() for part in above):
        return False
    return isinstance(model.get_submodule(".".join(above)), nn.ModuleList)


def _is_valid(value: Any) -> bool:
    """Say whether hidden states hold numbers: masks, which hold infinities, are no such thing."""
    if isinstance(value, Tensor):
        return value.dim() != 3 or not value.is_floating_point() or bool(_finite(value))
    if isinstance(value, (tuple, list)):
        return all(_is_valid(item) for item in value)
    return True


def _finite(value: Tensor) -> Tensor:
    return torch.isfinite(value).all()
