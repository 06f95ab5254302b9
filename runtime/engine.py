"""One loaded model that answers several conversations at once, token after token.

Everything here runs on one thread, the engine's. Times are the device's, so that an emulated card
reports modelled seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
from torch import Tensor

from runtime.core import (
    FinishReason,
    GenerationChunk,
    HardwareProfile,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.engine_diagnosis import MAX_TOKENS, named
from runtime.engine_generation import Generation
from runtime.engine_parts import EngineParts
from runtime.engine_pass import Outcome, Passes, Step, StoppedError
from runtime.engine_speed import ShownSpeed
from runtime.errors import InvalidNumbersError
from runtime.meeting import outcome_of
from runtime.planner import PREFILL_TOKENS, prefill_tokens
from runtime.prompts import PromptEncoder
from runtime.sampler import check_params
from runtime.sequences import MAX_TOGETHER, Conversation, Conversations
from runtime.telemetry import Gauges, Panel, Timing, generation_stats

log = logging.getLogger("prescope.engine")


class Engine:
    """Answers conversations with one model, up to `MAX_TOGETHER` at once.

    `submit` accepts a request and `step` computes one forward pass for everybody: the next token
    of those that answer and the next chunk of those whose prompt is being read. So requests join
    and leave at token boundaries. `generate` is both in a loop, for one request.

    The model's MoE layers must call `experts`.
    """

    def __init__(
        self,
        parts: EngineParts,
        publish: Callable[[TelemetrySnapshot], None] = lambda snapshot: None,
        prefill_chunk_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self.parts = parts
        self._prompts = PromptEncoder(parts.tokenizer, parts.render)
        plan = parts.plan
        longest = plan.context_tokens or plan.kv_tokens
        self.context_tokens = min(parts.context_tokens, plan.kv_tokens, longest)
        self._conversations = Conversations(parts.new_cache, plan.kv_tokens)
        self._passes = Passes(parts, self.forget, self._shrink)
        self._chunk_tokens = prefill_chunk_tokens
        self._panel = Panel(self.gauges, publish, parts.device.now_s)
        self._speed = ShownSpeed(self._panel, parts.executor, parts.device)
        self._process = psutil.Process()
        self._waiting: list[Generation] = []
        self._running: list[Generation] = []
        self._given_up: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.parts.shape.name

    @property
    def profile(self) -> HardwareProfile:
        return self.parts.profile

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences for a person about how the model was loaded and what it gave up since."""
        return (*self.parts.remarks, *self._given_up)

    @property
    def kept_tokens(self) -> int:
        """How many tokens of past conversations are held for reuse."""
        return self._conversations.tokens

    @property
    def answering(self) -> int:
        """How many requests are not over, those that wait for their place included."""
        return len(self._running) + len(self._waiting)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that `generate` would start from."""
        return list(self._prompts.encode(messages, self.context_tokens).ids)

    def forget(self) -> None:
        """Drop the keys and values of every conversation that does not answer."""
        self._conversations.clear()

    def set_policy(self, policy: str) -> None:
        """Change the placement policy from the next token on."""
        self.parts.executor.set_policy(policy)
        self._panel.refresh()

    def set_prediction(self, on: bool) -> None:
        """Let experts be copied ahead of their layer, or not, from the next token on."""
        self.parts.executor.set_prediction(on)
        self._panel.refresh()

    def reset_predictor(self) -> None:
        """Forget what the predictor of experts has learned on this machine."""
        self.parts.executor.reset_predictor()
        self._panel.refresh()

    def idle(self, budget_s: float) -> bool:
        """Use a pause to learn; return whether more time could be used. Seconds of this machine."""
        began_s = time.monotonic()
        self.parts.executor.idle(budget_s)
        return time.monotonic() - began_s > budget_s / 2

    def watch_ram(self) -> None:
        """Get out of the way of other programs while nobody asks anything."""
        held = self.parts.executor.ram_experts
        self.parts.watch_ram()
        if self.parts.executor.ram_experts != held:
            self._panel.refresh()

    def announce(self) -> None:
        """Publish a snapshot although nothing has been generated yet."""
        self._panel.refresh()

    def device_works(self) -> bool:
        """Say whether the device still computes: a card that failed once refuses everything."""
        return not isinstance(outcome_of(self.parts.device.wait_for_compute), Exception)

    def experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts of one layer for the forward that calls.

        Args:
            layer: index of the MoE layer.
            hidden: (tokens, hidden).
            index: (tokens, k), the experts of each token.
            weights: (tokens, k).

        Returns:
            (tokens, hidden).
        """
        rows = self._passes.meeting.experts(layer, hidden, index, weights)
        self.heartbeat()
        return rows

    def heartbeat(self) -> None:
        """Keep the telemetry flowing between two layers; a prefill may be broken off here."""
        self._panel.tick()
        self._passes.heartbeat()

    def generate(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[GenerationChunk]:
        """Answer the message list: `Accepted`, `Delta`s, `Finished`.

        The ids of all deltas together are the generated ids, the end-of-turn token included.
        `stop` is asked before every token and between the layers of a prefill. Closing the
        iterator ends the generation; what was computed stays reusable either way. Others that
        were submitted get on meanwhile.

        Raises:
            RequestError: before the first chunk, for messages or parameters that cannot be used.
            ModelError: the model produced invalid numbers.
        """
        generation = self.submit(conversation_id, messages, params, stop)
        try:
            while not generation.over:
                yield from generation.take()
                self.step()
            yield from generation.take()
            if generation.failure is not None:
                raise generation.failure
        finally:
            self._leave(generation)

    def submit(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Accept a request; it is computed by `step`, beside the others.

        Raises:
            RequestError: for messages or parameters that cannot be used.
        """
        check_params(params)
        timing = Timing(self.parts.device.now_s(), self.parts.executor.counters())
        prompt = self._prompts.encode(messages, self.context_tokens)
        timing.prompt_tokens = len(prompt.ids)
        room = min(params.max_new_tokens, self.context_tokens - timing.prompt_tokens)
        generation = Generation(
            conversation_id, prompt, params, room, stop, self.parts.tokenizer, timing
        )
        if not self.answering:
            self._speed.begin(timing)
        self._waiting.append(generation)
        self._let_in()
        conversation = generation.conversation
        generation.accept(len(conversation.ids) if conversation is not None else 0)
        return generation

    def step(self) -> None:
        """Compute one forward pass for everybody whose turn it is.

        What fails is the end of its own request only.
        """
        for generation in (*self._running, *self._waiting):
            if generation.stop():
                self._end(generation, "cancelled")
        self._let_in()
        self.parts.watch_ram()
        turns = self._turns()
        if not turns:
            return
        outcomes = self._passes.run([step for _, step in turns])
        for (generation, _), outcome in zip(turns, outcomes, strict=True):
            self._advance(generation, outcome)
        self._speed.after_pass()

    def gauges(self) -> Gauges:
        """Read everything that snapshots and statistics are made of."""
        parts, plan = self.parts, self.parts.plan
        running = [one.conversation for one in self._running if one.conversation is not None]
        kv_tokens = self.kept_tokens + sum(len(conversation.ids) for conversation in running)
        kv_bytes = kv_tokens * parts.shape.kv_bytes_per_token
        on_card = plan.dense_bytes + plan.workspace_bytes + plan.slots_bytes + kv_bytes
        executor, profile = parts.executor, parts.profile
        return Gauges(
            emulated=profile.emulated,
            device=profile.device_name,
            model=parts.shape.name,
            policy=executor.policy,
            counters=executor.counters(),
            heat=executor.heat(),
            layers=parts.shape.layers,
            experts=max(parts.shape.experts, default=0),
            link_max_bytes_per_s=profile.link_bytes_per_s.value,
            vram_used_bytes=0 if profile.device_kind == "cpu" else on_card,
            vram_budget_bytes=0 if profile.device_kind == "cpu" else plan.budget_bytes,
            ram_used_bytes=self._process.memory_info().rss,
            ram_total_bytes=profile.ram_total_bytes,
            cache_slots=executor.slots,
            cache_slots_used=executor.slots_used,
            prediction=executor.look_ahead,
            verdict=executor.verdict,
            stall_s_by_layer=executor.stall_s_by_layer,
            ram_experts=executor.ram_experts,
        )

    def close(self) -> None:
        """End what is under way and give the device and its memory back."""
        for generation in (*self._running, *self._waiting):
            self._end(generation, "cancelled")
        self.forget()
        self.parts.close()

    def _shrink(self) -> bool:
        """Give some slots up for what a pass could not allocate; say whether there were any."""
        executor = self.parts.executor
        before = executor.slots
        if not executor.shrink():
            return False
        told = f"Memory ran out while answering: {executor.slots:,} expert slots are left."
        self._given_up = (told,)
        log.warning("%s There were %d.", told, before)
        return True

    def _let_in(self) -> None:
        """Give those that wait their places, in order."""
        while self._waiting and len(self._running) < MAX_TOGETHER:
            generation = self._waiting.pop(0)
            with self.parts.executor.computing():  # cutting a cache is work on the device as well
                generation.conversation = self._conversations.take(
                    generation.conversation_id, generation.prompt_ids, generation.most_tokens
                )
            self._running.append(generation)

    def _turns(self) -> list[tuple[Generation, Step]]:
        """Decide what the next pass computes.

        Everybody who answers gets a token. Prompts get as many tokens together as one chunk has,
        in turn, so that a long one delays nobody by more than that; a chunk is no larger than the
        plan has workspace for. Who finds no room for keys and values sits this pass out; the first
        to come always finds it.
        """
        turns: list[tuple[Generation, Step]] = []
        left = self._chunk_tokens
        for generation in sorted(self._running, key=lambda one: (one.prefilling, one.passes)):
            conversation = generation.conversation
            assert conversation is not None
            past_tokens = len(conversation.ids)
            room = prefill_tokens(self.parts.plan, self.parts.shape, past_tokens)
            ids = generation.next_ids(min(self._chunk_tokens, room))
            if generation.prefilling and len(ids) > left < self._chunk_tokens:
                continue
            if self._conversations.grow(conversation, len(ids)):
                stop = None
                if generation.prefilling:
                    left -= len(ids)
                    stop = generation.stop
                turns.append((generation, Step(conversation, ids, stop)))
        return turns

    def _advance(self, generation: Generation, outcome: Outcome) -> None:
        """Let a request have what its pass came to; whatever fails in it is its own end."""
        if isinstance(outcome, StoppedError):
            self._end(generation, "cancelled")
        elif isinstance(outcome, Exception):
            self._fail(generation, outcome)
        elif generation.note_pass():
            logits = outcome
            done = outcome_of(lambda: self._next_token(generation, logits))
            if isinstance(done, InvalidNumbersError):
                self._fail(generation, self._diagnosed(generation, done))
            elif isinstance(done, Exception):
                self._fail(generation, done)

    def _diagnosed(self, generation: Generation, error: InvalidNumbersError) -> Exception:
        """Find the layer at fault; what was computed of the conversation is not kept."""
        assert generation.conversation is not None
        generation.conversation.intact = False
        ids = tuple(generation.conversation.ids[-MAX_TOKENS:])
        alone = Conversation("", self.parts.new_cache(), most_tokens=len(ids))
        return named(self.parts.model, lambda: self._passes.run([Step(alone, ids)]), error)

    def _next_token(self, generation: Generation, logits: Tensor) -> None:
        now_s = self.parts.device.now_s()
        reason = generation.advance(logits, self.parts.eos_token_ids, now_s)
        timing = generation.timing
        if timing.new_tokens == 1:
            timing.decode_counters = self.parts.executor.counters()
            timing.stall_s_by_layer = self.parts.executor.stall_s_by_layer
        self._speed.token(timing)
        if reason is not None:
            self._end(generation, reason)

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        now_s = self.parts.device.now_s()
        generation.finish(reason, generation_stats(generation.timing, self.gauges(), now_s))
        self._leave(generation)

    def _fail(self, generation: Generation, failure: Exception) -> None:
        generation.fail(failure)
        self._leave(generation)

    def _leave(self, generation: Generation) -> None:
        """Take a request out, if it is not out yet; what was computed stays reusable."""
        if generation in self._waiting:
            self._waiting.remove(generation)
        elif generation in self._running:
            self._running.remove(generation)
            assert generation.conversation is not None
            with self.parts.executor.computing():  # giving its room back is work on the device
                self._conversations.keep(generation.conversation)
        else:
            return
        self._speed.left(others=self.answering > 0)
