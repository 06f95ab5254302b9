"""Which policy serves, and how far it copies ahead: a person's word and the controller's.

Owned by the executor; the engine thread calls it.
"""

from __future__ import annotations

from runtime.controller import OFF, Controller
from runtime.core import Verdict
from runtime.policy import Policy, PolicySetup
from runtime.policy_table import FREE_EVICTION, make_policy
from runtime.residency import Residency
from runtime.transfer_queue import Order


class Steering:
    """Changes the policy of one residency and how far it looks ahead."""

    def __init__(
        self, residency: Residency, setup: PolicySetup, eviction: str | None = None
    ) -> None:
        self._residency = residency
        self._setup = setup
        self._eviction = eviction
        self._wanted = True
        self._controller = Controller()

    @property
    def looks_ahead(self) -> bool:
        """Whether experts are copied ahead now."""
        policy = self._residency.policy
        return policy.copies_ahead and policy.look_ahead > OFF

    @property
    def guesses(self) -> bool:
        """Whether the predictor is asked."""
        return self._residency.policy.predicts and self.looks_ahead

    @property
    def verdict(self) -> Verdict | None:
        """What was measured of copying ahead; None where nothing is copied ahead."""
        return self._controller.verdict if self._residency.policy.copies_ahead else None

    def follow(self, name: str) -> tuple[Order, ...]:
        """Change the policy from the next layer on; return what to order for that.

        Raises:
            ConfigError: there is no such policy, or it needs slots and there are none.
        """
        policy = serving_policy(name, self._setup, self._eviction)
        policy.look_ahead = self._controller.look_ahead if self._wanted else OFF
        return self._residency.follow(policy).orders

    def predict(self, on: bool) -> tuple[Order, ...]:
        """Let experts be copied ahead, or not; return what to order for that."""
        self._wanted = on
        self._residency.policy.look_ahead = self._controller.look_ahead if on else OFF
        return () if on else self._residency.cancel_prefetches().orders

    def begin_pass(self, now_s: float, tokens: int, prompt: bool) -> None:
        """Let the controller choose how far to look ahead in this pass."""
        policy = self._residency.policy
        if self._wanted and policy.copies_ahead:
            policy.look_ahead = self._controller.begin_pass(now_s, tokens, prompt)


def serving_policy(name: str, setup: PolicySetup, eviction: str | None) -> Policy:
    """Return a policy with the eviction rule a person chose, where it lets one choose."""
    free = eviction is not None and name in FREE_EVICTION
    return make_policy(name, setup, eviction=eviction) if free else make_policy(name, setup)
