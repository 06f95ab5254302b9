"""One forward pass for everybody whose turn it is: forwards of their own, experts in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from runtime.engine_parts import EngineParts
from runtime.errors import MemoryPlanError
from runtime.meeting import Meeting, outcome_of
from runtime.planner import prefill_tokens
from runtime.sequences import Conversation

MOST_SHRINKS = 3
"""How often slots are given up for one step: a quarter of them each time."""


class StoppedError(Exception):
    """The caller asked to stop in the middle of a prefill pass."""


@dataclass(frozen=True)
class Step:
    """What one pass computes of one conversation; `stop` breaks it off between two layers."""

    conversation: Conversation
    ids: Sequence[int]
    stop: Callable[[], bool] | None = None


Outcome = torch.Tensor | Exception
"""The logits (vocabulary,) of a step's last token, or why there are none."""


class Passes:
    """Runs the model. The engine thread owns it.

    `forget` gives back the memory of all that nobody waits for, `shrink` some of the slots' and
    says whether it could.
    """

    def __init__(
        self, parts: EngineParts, forget: Callable[[], None], shrink: Callable[[], bool]
    ) -> None:
        self._parts = parts
        self._forget = forget
        self._shrink = shrink
        self._steps: Sequence[Step] = ()
        self.meeting = Meeting(parts.executor.run_together)

    def heartbeat(self) -> None:
        """Note that the forward that calls has done another layer.

        Raises:
            StoppedError: its caller asked to stop.
        """
        if self._steps:
            stop = self._steps[self.meeting.current].stop
            if stop is not None and stop():
                raise StoppedError

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Compute every step; one that fails leaves the others alone.

        A step for which memory ran out is tried again by itself, without the other chats, then
        with fewer slots, `MOST_SHRINKS` times; then it is a MemoryPlanError. A broken-off
        conversation is rewound where its cache can be cut, and else computed anew.
        """
        outcomes = self._pass(steps)
        tight = {
            number: str(outcome)
            for number, outcome in enumerate(outcomes)
            if isinstance(outcome, torch.OutOfMemoryError)
        }
        for number, reason in tight.items():
            # Only the words are kept: the error itself holds on to the tensors of the pass.
            outcomes[number] = MemoryPlanError(reason)
        if tight:
            self._forget()
        for number, reason in tight.items():
            outcomes[number] = self._again(steps[number], reason)
        return outcomes

    def _again(self, step: Step, reason: str) -> Outcome:
        """Try a step by itself, then with fewer and fewer slots."""
        tokens = list(step.conversation.ids)
        for _ in range(1 + MOST_SHRINKS):
            broken = self._restored(step.conversation, tokens)
            outcome = self._pass([step])[0] if broken is None else broken
            if not isinstance(outcome, torch.OutOfMemoryError):
                return outcome
            reason = str(outcome)
            del outcome, broken  # they hold on to the tensors of the attempt
            if not self._shrink():
                break
        return MemoryPlanError(
            f"The card's memory ran out at {len(tokens):,} tokens: {reason[:200]}",
            "Start a new chat, or load the model with a smaller cache.",
        )

    def _restored(self, conversation: Conversation, tokens: Sequence[int]) -> Exception | None:
        """Bring a conversation back to `tokens`, computed anew where its cache cannot be cut.

        Returns why that was not possible.
        """
        with self._parts.executor.computing():
            failed = outcome_of(conversation.rewind)
        if isinstance(failed, Exception):
            return failed
        if conversation.intact:
            return None
        conversation.ids.clear()
        conversation.cache, conversation.intact = self._parts.new_cache(), True
        conversation.cache.expect(conversation.granted_tokens)
        while (done := len(conversation.ids)) < len(tokens):
            room = prefill_tokens(self._parts.plan, self._parts.shape, done)
            end = done + room if conversation.cache.continues else len(tokens)
            (outcome,) = self._pass([Step(conversation, tokens[done:end])])
            if isinstance(outcome, Exception):
                return outcome
        return None

    def _pass(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run the model once over all steps."""
        done = outcome_of(lambda: self._compute(steps))
        outcomes: list[Outcome] = done if isinstance(done, list) else [done for _ in steps]
        for step, outcome in zip(steps, outcomes, strict=True):
            if isinstance(outcome, torch.Tensor):
                step.conversation.ids.extend(step.ids)
                step.conversation.intact = True
            elif isinstance(outcome, StoppedError):
                with self._parts.executor.computing():
                    outcome_of(step.conversation.rewind)  # what cannot be kept is not intact
        return outcomes

    def _compute(self, steps: Sequence[Step]) -> list[Outcome]:
        parts = self._parts
        for step in steps:
            step.conversation.intact = False
        counts = [len(step.ids) for step in steps]
        together = [token for step in steps for token in step.ids]
        with parts.executor.computing():  # what is guessed now is read on that stream
            parts.executor.begin_pass(sum(counts), together, max(counts))
            # Here for all: a list is waited for on its way, behind what others have launched.
            ids = torch.tensor(together, device=parts.device.torch_device)
            inputs = torch.split(ids, counts)
        forwards = [partial(self._forward, *each) for each in zip(steps, inputs, strict=True)]
        self._steps = steps
        try:
            # Both are the thread's own and hold for every forward of the meeting.
            with torch.inference_mode(), parts.executor.computing():
                outcomes = self.meeting.run(forwards)
        finally:
            self._steps = ()
        parts.device.wait_for_compute()
        return outcomes

    def _forward(self, step: Step, ids: torch.Tensor) -> torch.Tensor:
        cache = step.conversation.cache
        output = self._parts.model(
            input_ids=ids.unsqueeze(0),
            past_key_values=cache.past,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.past = output.past_key_values
        logits: torch.Tensor = output.logits[0, -1]
        return logits
