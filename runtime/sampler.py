"""Choose the next token from logits: greedy, or temperature, top-k, top-p and min-p with a seed.

The filters follow transformers' order: repetition penalty, temperature, top-k, top-p, min-p. All
arithmetic after the greedy path is in fp32 on the CPU, where the generator lives, so that one seed
gives one answer whatever the device.
"""

from __future__ import annotations

import math

import torch

from runtime.core import SamplingParams
from runtime.errors import InvalidNumbersError, RequestError

SHORT_LIST = 1024
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1


def check_params(params: SamplingParams) -> None:
    """Refuse values that no sampler could honour.

    Raises:
        RequestError: naming the field, the value and the allowed range.
    """
    if params.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, not {params.max_new_tokens}.")
    if params.top_k < 0:
        raise RequestError(f"top_k must be 0 (off) or more, not {params.top_k}.")
    if params.seed is not None and not SEED_MIN <= params.seed <= SEED_MAX:
        raise RequestError(f"seed must be a 64-bit number, not {params.seed}.")
    ranges = {
        "temperature": (params.temperature, 0.0, 100.0, "0 (greedy) to 100"),
        "top_p": (params.top_p, 0.0, 1.0, "0 to 1"),
        "min_p": (params.min_p, 0.0, 1.0, "0 to 1"),
        "repetition_penalty": (params.repetition_penalty, 0.01, 100.0, "0.01 to 100"),
    }
    for name, (value, low, high, allowed) in ranges.items():
        if not low <= value <= high:  # NaN fails every comparison, so it is refused as well
            raise RequestError(f"{name} must be {allowed}, not {value}.")


class Sampler:
    """One generation's choice of tokens; owns its random generator and the ids seen so far."""

    def __init__(self, params: SamplingParams, prompt_ids: list[int]) -> None:
        check_params(params)
        self._params = params
        self._penalised = params.repetition_penalty != 1.0
        self._greedy = params.temperature == 0.0
        self._seen = set(prompt_ids) if self._penalised else set()
        self._generator = torch.Generator(device="cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def next_token(self, logits: torch.Tensor) -> int:
        """Return the id that follows, from the logits of one position, shape `[vocabulary]`.

        Raises:
            InvalidNumbersError: the logits hold NaN, or nothing but infinities.
        """
        if self._greedy and not self._penalised:
            token = int(logits.argmax())
            _require_finite(float(logits[token]))
            return token
        scores = logits.detach().to("cpu", torch.float32)
        if self._penalised:
            scores = penalise(scores, self._seen, self._params.repetition_penalty)
        _require_finite(float(scores.max()))
        if self._greedy:
            token = int(scores.argmax())
        else:
            candidates, weights = filtered(scores, self._params)
            drawn = int(torch.multinomial(weights, 1, generator=self._generator))
            token = int(candidates[drawn])
        if self._penalised:
            self._seen.add(token)
        return token


def penalise(scores: torch.Tensor, seen: set[int], penalty: float) -> torch.Tensor:
    """Return a copy of `scores` with the tokens of `seen` made less likely by `penalty`."""
    ids = torch.tensor(sorted(seen), dtype=torch.long)
    picked = scores[ids]
    picked = torch.where(picked < 0, picked * penalty, picked / penalty)
    return scores.index_copy(0, ids, picked)


def filtered(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids that may be drawn and their weights, which sum to 1.

    At least one id is always left. Ties with the last id of `top_k` are kept.
    """
    scores = scores / params.temperature
    ids, kept, total = _candidates(scores, params)
    if params.top_p < 1.0:
        weights = (kept - total).exp()
        before = weights.cumsum(-1) - weights
        count = max(1, int((before < params.top_p).sum()))
        ids, kept = ids[:count], kept[:count]
    if params.min_p > 0.0:
        near = kept >= kept.max() + math.log(params.min_p)
        ids, kept = ids[near], kept[near]
    return ids, kept.softmax(-1)


def _candidates(
    scores: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ids and scores that can matter and the log-sum they are normalised by.

    They come likeliest first where `top_p` needs the order. Sorting a whole vocabulary costs
    10 ms, so a short list is tried first and taken if it holds enough of the mass.
    """
    size = scores.shape[-1]
    ids = torch.arange(size)
    if 0 < params.top_k < size:
        last = torch.topk(scores, params.top_k).values[-1]
        ids = (scores >= last).nonzero().flatten()
        scores = scores[ids]
    total = scores.logsumexp(-1)
    if params.top_p >= 1.0:
        return ids, scores, total
    if len(ids) > 4 * SHORT_LIST:
        values, order = torch.topk(scores, SHORT_LIST)
        if float((values - total).exp().sum()) > params.top_p:
            return ids[order], values, total
    ordered, order = torch.sort(scores, descending=True, stable=True)
    return ids[order], ordered, total


def _require_finite(top: float) -> None:
    if not math.isfinite(top):
        raise InvalidNumbersError(
            f"The model produced invalid numbers (its best score is {top}).",
            "Load the model again; if it happens every time, its files are damaged.",
        )
