"""One loaded model that answers conversations: prefill in chunks, then token after token.

Everything here runs on one thread, the engine's. Times are the device's, so that an emulated card
reports modelled seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from runtime.core import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    GenerationChunk,
    HardwareProfile,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.engine_parts import EngineParts
from runtime.errors import MemoryPlanError
from runtime.prompts import PromptEncoder
from runtime.sampler import Sampler, check_params
from runtime.sequences import Conversation, Conversations
from runtime.telemetry import Gauges, Panel, Timing, generation_stats
from runtime.text_stream import Piece, TextStream

PREFILL_CHUNK_TOKENS = 512


class _StoppedError(Exception):
    """The caller asked to stop in the middle of a prefill pass."""


class Engine:
    """Answers conversations with one model, one at a time.

    `heartbeat` must be called by the model between its layers: it keeps the telemetry flowing and
    lets a long prefill be stopped.
    """

    def __init__(
        self,
        parts: EngineParts,
        publish: Callable[[TelemetrySnapshot], None] = lambda snapshot: None,
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        self.parts = parts
        self._prompts = PromptEncoder(parts.tokenizer)
        self.context_tokens = min(parts.context_tokens, parts.plan.kv_tokens)
        self._conversations = Conversations(parts.new_cache, parts.plan.kv_tokens)
        self._chunk_tokens = prefill_chunk_tokens
        self._panel = Panel(self.gauges, publish, parts.device.now_s)
        self._process = psutil.Process()
        self._running: Conversation | None = None
        self._interrupted: Callable[[], bool] | None = None

    @property
    def name(self) -> str:
        return self.parts.shape.name

    @property
    def profile(self) -> HardwareProfile:
        return self.parts.profile

    @property
    def kept_tokens(self) -> int:
        """How many tokens of past conversations are held for reuse."""
        return self._conversations.tokens

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that `generate` would start from."""
        return list(self._prompts.encode(messages, self.context_tokens).ids)

    def forget(self) -> None:
        """Drop the keys and values of every conversation."""
        self._conversations.clear()

    def set_policy(self, policy: str) -> None:
        """Change the placement policy from the next token on."""
        self.parts.executor.set_policy(policy)
        self._panel.refresh()

    def announce(self) -> None:
        """Publish a snapshot although nothing has been generated yet."""
        self._panel.refresh()

    def heartbeat(self) -> None:
        """Note that another layer is done."""
        self._panel.tick()
        if self._interrupted is not None and self._interrupted():
            raise _StoppedError

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
        iterator ends the generation; what was computed stays reusable either way.

        Raises:
            RequestError: before the first chunk, for messages or parameters that cannot be used.
            ModelError: the model produced invalid numbers.
        """
        check_params(params)
        device = self.parts.device
        timing = Timing(device.now_s(), self.parts.executor.counters())
        prompt = self._prompts.encode(messages, self.context_tokens)
        timing.prompt_tokens = len(prompt.ids)
        room = min(params.max_new_tokens, self.context_tokens - timing.prompt_tokens)
        with self.parts.executor.computing():  # cutting a cache is work on the device as well
            conversation = self._conversations.take(conversation_id, prompt.ids)
        self._conversations.make_room(timing.prompt_tokens + room)
        sampler = Sampler(params, list(prompt.ids))
        text = TextStream(self.parts.tokenizer, prompt.opens_reasoning)
        self._running = conversation
        self._panel.begin(timing)
        try:
            yield Accepted(timing.prompt_tokens, len(conversation.ids))
            reason: FinishReason = "cancelled"
            pending: list[int] = []
            logits = self._prefill(conversation, prompt.ids[len(conversation.ids) :], stop)
            while logits is not None:
                token = sampler.next_token(logits)
                timing.token(device.now_s())
                if timing.new_tokens == 1:
                    timing.decode_counters = self.parts.executor.counters()
                pending.append(token)
                yield from _deltas(text.push(token), pending)
                if token in self.parts.eos_token_ids:
                    reason = "stop"
                    break
                if timing.new_tokens == room:
                    reason = "length"
                    break
                if stop():
                    break
                logits = self._forward(conversation, [token])
            yield from _deltas(text.finish(), pending)
            if pending:
                yield Delta("answer", "", tuple(pending))
            yield Finished(reason, generation_stats(timing, self.gauges(), device.now_s()))
        finally:
            self._running = None
            self._conversations.keep(conversation)
            self._panel.end()

    def gauges(self) -> Gauges:
        """Read everything that snapshots and statistics are made of."""
        parts, plan = self.parts, self.parts.plan
        running = len(self._running.ids) if self._running is not None else 0
        kv_bytes = (self.kept_tokens + running) * parts.shape.kv_bytes_per_token
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
        )

    def close(self) -> None:
        """Give the device and its memory back."""
        self.forget()
        self.parts.close()

    def _prefill(
        self, conversation: Conversation, ids: Sequence[int], stop: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Compute the prompt's new tokens; None if stopped before the last of them."""
        logits = None
        size = self._chunk_tokens if conversation.cache.continues else len(ids)
        self._interrupted = stop
        try:
            for begin in range(0, len(ids), size):
                if stop():
                    return None
                logits = self._forward(conversation, ids[begin : begin + size])
        except _StoppedError:
            with self.parts.executor.computing():
                conversation.rewind()
            return None
        finally:
            self._interrupted = None
        return logits

    def _forward(self, conversation: Conversation, ids: Sequence[int]) -> torch.Tensor:
        """Run the model over `ids`; if memory runs out, once more without the other chats."""
        try:
            return self._pass(conversation, ids)
        except torch.OutOfMemoryError as failure:
            # Only the words are kept: the error itself holds on to the tensors of the pass.
            reason = str(failure)
        self.forget()
        with self.parts.executor.computing():
            conversation.rewind()
        if conversation.intact:
            try:
                return self._pass(conversation, ids)
            except torch.OutOfMemoryError as failure:
                reason = str(failure)
        raise MemoryPlanError(
            f"The card's memory ran out at {len(conversation.ids):,} tokens: {reason[:200]}",
            "Start a new chat, or load the model with a smaller cache.",
        )

    def _pass(self, conversation: Conversation, ids: Sequence[int]) -> torch.Tensor:
        """Run the model over `ids` once and return the logits of the last one."""
        parts = self.parts
        conversation.intact = False
        parts.executor.begin_pass(len(ids))
        with torch.inference_mode(), parts.executor.computing():
            output = parts.model(
                input_ids=torch.tensor([ids], device=parts.device.torch_device),
                past_key_values=conversation.cache.past,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: torch.Tensor = output.logits[0, -1]
            conversation.cache.past = output.past_key_values
        parts.device.wait_for_compute()
        conversation.ids.extend(ids)
        conversation.intact = True
        self._panel.tick()
        return logits


def _deltas(pieces: list[Piece], pending: list[int]) -> Iterator[Delta]:
    """Turn pieces of text into deltas; the first one carries the ids that waited for it."""
    for kind, text in pieces:
        yield Delta(kind, text, tuple(pending))
        pending.clear()
