"""An engine without torch for tests of the engine process; names and words choose what it does.

Models: "broken" files, "raising" any exception, "slow" (until cancelled), "fatal" (kills the
process), "large" fits only alone, "never fits", any other name loads. Words: "hang" never accepts,
"forever" never ends, "print" prints to standard output, "kill" dies mid-answer, "refuse" is a bad
request, "crash" raises, "stall" finds that no expert arrives any more; anything else is echoed word
by word.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from runtime.config import data_dir
from runtime.core import (
    Accepted,
    Delta,
    Finished,
    GenerationChunk,
    GenerationStats,
    LoadProgress,
    LoadRequest,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.errors import (
    CancelledError,
    MemoryPlanError,
    ModelFilesError,
    RequestError,
    TransferError,
)


class FakeGeneration:
    """Says its words one a step."""

    def __init__(self, text: str, stop: Callable[[], bool]) -> None:
        self.over = False
        self.failure: Exception | None = None
        self._text = text
        self._stop = stop
        self._words = text.split()
        self._number = 0
        self._chunks: list[GenerationChunk] = [Accepted(len(text))]

    def take(self) -> list[GenerationChunk]:
        chunks, self._chunks = self._chunks, []
        return chunks

    def step(self, policy: str) -> None:
        number, words = self._number, self._words
        stopped = self._stop()
        if stopped or (self._text != "forever" and number == len(words)):
            stats = GenerationStats(False, "fake", policy, len(self._text), number)
            self._chunks.append(Finished("cancelled" if stopped else "stop", stats))
            self.over = True
            return
        word = words[number % len(words)]
        if word == "kill" and number:
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "crash":
            self.failure, self.over = RuntimeError("boom"), True
            return
        if word == "stall":
            self.failure, self.over = TransferError("No expert arrived.", "Wait."), True
            return
        self._chunks.append(Delta("answer", f"{word} ", (number,)))
        self._number += 1


class FakeEngine:
    alive = 0

    def __init__(self, name: str, publish: Callable[[TelemetrySnapshot], None]) -> None:
        FakeEngine.alive += 1
        self.name = name
        self.remarks: tuple[str, ...] = ()
        self.profile: Any = SimpleNamespace(device_kind="cuda" if "card" in name else "cpu")
        self.policy = "hybrid"
        self.prediction = True
        self.broken = False
        self.idled = 0
        self._publish = publish
        self._running: list[FakeGeneration] = []

    def submit(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
        stop: Callable[[], bool],
    ) -> FakeGeneration:
        text = messages[-1].content
        if text == "hang":
            time.sleep(60)
        if text == "tight":
            self.remarks = ("Memory ran out while answering.",)
        if text == "refuse":
            raise RequestError("No.", "Ask otherwise.")
        self._publish(snapshot(self.name, self.policy, self.prediction))
        if text == "print":
            print("stray text")
            os.write(1, b"\x00\x00\x00\x05stray")
            sys.stdout.flush()
        generation = FakeGeneration(text, stop)
        self._running.append(generation)
        return generation

    def step(self) -> None:
        time.sleep(0.005)
        for generation in self._running:
            generation.step(self.policy)
            self.broken |= "card" in self.name and generation.failure is not None
        self._running = [one for one in self._running if not one.over]

    def idle(self, budget_s: float) -> bool:
        self.idled += 1
        self._publish(snapshot(f"{self.name}, rested {self.idled}", self.policy, self.prediction))
        return self.idled < 3

    def watch_ram(self) -> None:
        self._publish(snapshot(f"{self.name}, watched", self.policy, self.prediction))

    def device_works(self) -> bool:
        return not self.broken

    def set_prediction(self, on: bool) -> None:
        self.prediction = on
        self._publish(snapshot(self.name, self.policy, self.prediction))

    def reset_predictor(self) -> None:
        self.idled = 0
        self._publish(snapshot(f"{self.name}, reset", self.policy, self.prediction))

    def set_policy(self, policy: str) -> None:
        self.policy = policy

    def close(self) -> None:
        FakeEngine.alive -= 1


class Weights:
    """What a load that fails had read; in a cycle, as models are."""

    failed: weakref.ref[Weights] | None = None

    def __init__(self) -> None:
        self.itself = self


def assemble(
    request: LoadRequest,
    *,
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
    publish: Callable[[TelemetrySnapshot], None],
    beside: bool,
) -> FakeEngine:
    progress(LoadProgress("Reading", 1, 2))
    if Weights.failed is not None and Weights.failed() is not None:
        raise MemoryPlanError("A load that failed still holds its memory.", "Load it again.")
    weights = Weights()
    Weights.failed = weakref.ref(weights)
    if request.model == "broken":
        raise ModelFilesError("model.safetensors is truncated.", "Download it again.")
    if request.model == "raising":
        raise ZeroDivisionError("surprise")
    if request.model == "fatal":
        os.kill(os.getpid(), signal.SIGKILL)
    if request.model == "never fits" or (request.model == "large" and FakeEngine.alive):
        raise MemoryPlanError("It needs 7 GB and 3 GB are free.", "Choose a smaller model.")
    while request.model == "slow":
        if cancelled():
            raise CancelledError("The load was cancelled.")
        time.sleep(0.005)
    Weights.failed = None
    engine = FakeEngine(request.model, publish)
    if request.experts != "as stored":
        engine.remarks = (f"Experts are {request.experts}.", f"Kept in {data_dir()}.")
    return engine


def snapshot(model: str, policy: str, prediction: bool = True) -> TelemetrySnapshot:
    return TelemetrySnapshot(
        sequence=1,
        emulated=False,
        device="fake",
        model=model,
        policy=policy,
        generating=True,
        tokens_per_s=1.5,
        ttft_s=0.0,
        served=(1, 2, 3, 4, 5),
        hit_rate=0.5,
        link_bytes_per_s=0.0,
        link_max_bytes_per_s=0.0,
        link_bytes_total=0,
        stall_s_per_token=0.0,
        token_s=0.0,
        cpu_s_per_token=0.0,
        vram_used_bytes=0,
        vram_budget_bytes=0,
        ram_used_bytes=0,
        ram_total_bytes=0,
        cache_slots=0,
        cache_slots_used=0,
        layers=1,
        experts=1,
        heat="AA==",
        prediction=prediction,
    )
