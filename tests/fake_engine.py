"""An engine without a model: the same contract, seeded answers, telemetry that moves.

Words in the last user message choose what happens, so that a test or a person can ask for it:
`!think` thinks first, `!code`, `!math`, `!table` and `!html` answer in that shape, `!long` answers
at length, `!slow` at 4 tokens/s, `!wait` takes 30 s to its first token, `!die` ends the engine
mid-answer, `!refuse` refuses the prompt, `!busy` has no room, `!full` fills the context.
A model whose path contains "broken" fails to load; "endless" never finishes loading. Prediction
brings a tenth more tokens/s; recall grows with the tokens it saw until it is reset.
"""

from __future__ import annotations

import base64
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.core import (
    Accepted,
    Delta,
    DeltaKind,
    EngineStatus,
    Finished,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    LoadProgress,
    LoadRequest,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.errors import BusyError, ContextLengthError, EngineDiedError

LAYERS, EXPERTS = 6, 32
PREDICTING = ("prescope", "moe-infinity")
WITHOUT_PREDICTION = 0.9
_THOUGHT = "The person asks about offloading. First the cache, then the link. Keep it short."
_PROSE = (
    "Only a few **experts** work on each token, so the rest can wait in RAM. "
    "The cache keeps those that were used *recently and often*; a miss is either copied over "
    "the link or computed on the CPU, whichever is done first.\n\n"
    "1. Experts in a slot answer at once.\n2. Misses are split.\n3. Nothing is guessed.\n"
)
_SHAPES = {
    "!code": "A loop:\n\n```python\nfor layer in layers:\n    hidden = layer(hidden)\n```\n",
    "!math": "The time is $t = \\max(f/b, n/c)$ and\n\n$$\\sum_{i=1}^{n} w_i = 1.$$\n",
    "!table": "| policy | tokens/s |\n|---|---|\n| on-demand | 9 |\n| hybrid | 14 |\n",
    "!html": (
        "<script>window.__pwned=1</script><img src=x onerror='window.__pwned=1'>"
        "![x](https://example.com/leak.png) [link](javascript:window.__pwned=1)\n"
    ),
}


class FakeEngine:
    """Implements `runtime.client.EngineClient`. Any thread may call; nothing leaves the process."""

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        seed: int = 0,
        tokens_per_s: float = 60.0,
        load_s: float = 1.5,
        restart_s: float = 1.0,
    ) -> None:
        self.data_dir = data_dir
        self.tokens_per_s, self.load_s, self.restart_s = tokens_per_s, load_s, restart_s
        self.closed = False
        self.prompts: list[list[Message]] = []
        self.loads: list[LoadRequest] = []
        self.resets = 0
        self._seed = seed
        self._lock = threading.Lock()
        self._status = EngineStatus(state="empty")
        self._policy = "prescope"
        self._prediction = True
        self._learned = 0
        self._generating = 0
        self._tokens = 0
        self._sequence = 0
        self._load_number = 0

    def status(self) -> EngineStatus:
        with self._lock:
            return self._status

    def snapshot(self) -> TelemetrySnapshot | None:
        with self._lock:
            if self._status.model is None:
                return None
            if self._generating:
                self._sequence += 1
            return self._snapshot()

    def load(self, request: LoadRequest) -> None:
        with self._lock:
            self.loads.append(request)
            self._load_number += 1
            number = self._load_number
            self._status = replace(
                self._status, state="loading", loading=request.model, notice="", next_step=""
            )
        threading.Thread(target=self._load, args=(request, number), daemon=True).start()

    def cancel_load(self) -> None:
        with self._lock:
            self._load_number += 1
            if self._status.loading is not None:
                self._status = self._settled(notice="Loading was cancelled.")

    def generate(
        self, conversation_id: str, messages: Sequence[Message], params: SamplingParams
    ) -> Iterator[GenerationChunk]:
        self.prompts.append(list(messages))
        text = messages[-1].content
        if "!refuse" in text:
            raise ContextLengthError(
                "The prompt has 9,000 tokens; the context holds 4,096.", "Shorten it."
            )
        if "!busy" in text:
            raise BusyError("Eight requests are waiting already.", "Try again in a moment.")
        return self._answer(text, params, sum(len(m.content) for m in messages) // 4 + 1)

    def set_policy(self, policy: str) -> None:
        with self._lock:
            self._policy = policy

    def set_prediction(self, on: bool) -> None:
        with self._lock:
            self._prediction = on
            self._sequence += 1

    def reset_predictor(self) -> None:
        with self._lock:
            self.resets += 1
            self._learned = 0
            self._sequence += 1

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._load_number += 1

    def _answer(
        self, text: str, params: SamplingParams, prompt_tokens: int
    ) -> Iterator[GenerationChunk]:
        started = time.monotonic()
        with self._lock:
            self._generating += 1
        try:
            yield Accepted(prompt_tokens)
            if "!wait" in text:
                time.sleep(30.0)
            pieces = self._pieces(text)
            first_s, sent, rate = 0.0, 0, self._rate()
            reason: FinishReason = "length" if "!full" in text else "stop"
            for sent, (kind, piece) in enumerate(pieces, 1):
                rate = 4.0 if "!slow" in text else self._rate()
                time.sleep(1.0 / rate)
                if "!die" in text and sent > min(12, len(pieces) // 2):
                    self._die()
                    raise EngineDiedError(
                        "The engine stopped in the middle of the answer.", "Retry to ask again."
                    )
                first_s = first_s or time.monotonic() - started
                with self._lock:
                    self._tokens += 1
                    self._learned += 1
                yield Delta(kind, piece, (sent,))
                if sent >= params.max_new_tokens:
                    reason = "length"
                    break
            yield Finished(reason, self._stats(prompt_tokens, sent, first_s, rate))
        finally:
            with self._lock:
                self._generating -= 1
                self._sequence += 1

    def _predicts(self) -> bool:
        return self._prediction and self._policy in PREDICTING

    def _rate(self) -> float:
        return self.tokens_per_s * (1.0 if self._predicts() else WITHOUT_PREDICTION)

    def _pieces(self, text: str) -> list[tuple[DeltaKind, str]]:
        body = "".join(shape for word, shape in _SHAPES.items() if word in text) or _PROSE
        if "!long" in text:
            body = "\n\n".join([body] * 40)
        thought = _THOUGHT if "!think" in text else ""
        return [("reasoning", part) for part in _tokens(thought)] + [
            ("answer", part) for part in _tokens(body)
        ]

    def _stats(self, prompt: int, new: int, first_s: float, rate: float) -> GenerationStats:
        random_ = random.Random(self._seed * 7919 + new)
        served = [random_.randint(0, 4 * new + 1) for _ in range(5)]
        return GenerationStats(
            emulated=True,
            device="Emulated card",
            policy=self._policy,
            prompt_tokens=prompt,
            new_tokens=new,
            ttft_s=first_s,
            decode_tokens_per_s=rate,
            hit_rate=served[0] / max(1, sum(served)),
            routed=sum(served),
            served_resident=served[0],
            served_prefetch_in_time=served[1],
            served_prefetch_late=served[2],
            served_on_demand=served[3],
            served_cpu=served[4],
            cache_slots=64,
            cache_slots_used=48,
        )

    def _load(self, request: LoadRequest, number: int) -> None:
        steps = 20
        for step in range(steps + 1):
            with self._lock:
                if number != self._load_number:
                    return
                total = 40_000_000
                self._status = replace(
                    self._status,
                    progress=LoadProgress("Reading experts", total * step // steps, total),
                )
            time.sleep(self.load_s / steps)
            while "endless" in request.model and number == self._load_number:
                time.sleep(0.05)
        with self._lock:
            if number != self._load_number:
                return
            if "broken" in request.model:
                self._status = self._settled(
                    notice=f"{request.model} cannot be loaded: model.safetensors is cut short.",
                    next_step="Download it again.",
                )
            else:
                self._status = self._settled(model=request.model)
                if request.experts != "as stored":
                    remark = f"The {request.experts} experts are not kept: the disk is full."
                    self._status = replace(self._status, remarks=(remark,))
                self._policy = request.policy or self._policy
            self._sequence += 1

    def _settled(
        self, model: str | None = None, notice: str = "", next_step: str = ""
    ) -> EngineStatus:
        model = model or self._status.model
        return EngineStatus(
            state="ready" if model else "empty",
            model=model,
            notice=notice,
            next_step=next_step,
            restarts=self._status.restarts,
        )

    def _die(self) -> None:
        with self._lock:
            self._status = replace(
                self._status,
                state="restarting",
                restarts=self._status.restarts + 1,
                notice="The engine stopped and is being started again.",
            )
        threading.Timer(self.restart_s, self._revive).start()

    def _revive(self) -> None:
        with self._lock:
            if self._status.state == "restarting":
                self._status = self._settled(notice="The engine was started again.")

    def _snapshot(self) -> TelemetrySnapshot:
        random_ = random.Random(self._seed * 104729 + self._sequence)
        phase = self._sequence / 9.0
        busy = self._generating > 0
        served = [random_.randint(0, 60) if busy else 0 for _ in range(5)]
        if not self._predicts():
            served[1] = served[2] = 0
        heat = bytes(
            int(63 + 60 * math.sin(phase + layer + expert * 0.7))
            | (0x80 if (expert * 7 + layer * 3 + self._sequence // 8) % 3 == 0 else 0)
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        )
        told = self._predicts() and self._tokens > 0
        stall_s = 0.03 + 0.01 * math.sin(phase)
        return TelemetrySnapshot(
            sequence=self._sequence,
            emulated=True,
            device="Emulated card",
            model=self._status.model or "",
            policy=self._policy,
            generating=busy,
            tokens_per_s=self._rate() * (0.98 + 0.04 * random_.random()) if busy else 0.0,
            ttft_s=0.2,
            served=(served[0], served[1], served[2], served[3], served[4]),
            hit_rate=0.6 + 0.3 * math.sin(phase) if busy else 0.0,
            link_bytes_per_s=40e6 + 15e6 * math.sin(phase * 1.3) if busy else 0.0,
            link_max_bytes_per_s=60e6,
            link_bytes_total=self._tokens * 700_000,
            stall_s_per_token=stall_s if busy else 0.0,
            token_s=0.07 if busy else 0.0,
            cpu_s_per_token=0.015 if busy else 0.0,
            vram_used_bytes=52_000_000,
            vram_budget_bytes=64_000_000,
            ram_used_bytes=900_000_000,
            ram_total_bytes=16_000_000_000,
            cache_slots=64,
            cache_slots_used=48,
            layers=LAYERS,
            experts=EXPERTS,
            heat=base64.b64encode(heat).decode(),
            prediction=self._predicts(),
            prefetch_bytes_per_token=(180e3 + 30e3 * math.sin(phase), 24e3, 60e3)
            if told
            else (0.0, 0.0, 0.0),
            predictor_recall=0.4 + 0.3 * min(1.0, self._learned / 400) if told else None,
            predictor_precision=0.64 if told else None,
            predictor_s_per_token=0.00021 if told else 0.0,
            verdict="Copying ahead pays here: 11 % more tokens/s over 12 trials." if told else "",
            trial_tokens_per_s=(WITHOUT_PREDICTION * self.tokens_per_s, self.tokens_per_s)
            if told
            else None,
            stall_s_by_layer=tuple(stall_s * (1 + layer) / 21 for layer in range(LAYERS))
            if self._tokens
            else (),
        )


def _tokens(text: str) -> list[str]:
    """Cut text as a tokenizer would, roughly: words with the blank before them."""
    pieces: list[str] = []
    for character in text:
        if not pieces or character in " \n":
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces
