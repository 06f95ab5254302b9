"""What link and CPU really cost while serving, against what the profile promised.

A rail that stalls loses its share of the work and gets it back, as Nezha does across network
rails (arXiv 2405.17870). Pure.
"""

from __future__ import annotations

from runtime.scheduler import Costs

SHARE = 0.1
STEP = 0.1
SLOWEST = 20.0
FASTEST = 0.25
BACK_PER_PASS = 0.02
"""A rail without work is not measured: its scale goes back to 1, so that it is tried again."""


class Rail:
    """One rail: `scale` is how many times longer it takes than its profile says."""

    def __init__(self) -> None:
        self.scale = 1.0
        self._used = False

    def note(self, least_s: float, most_s: float, seconds: float) -> None:
        """Note a piece of work that was planned to take between `least_s` and `most_s`.

        Those are by the costs in use, which have this rail's scale in them already.
        """
        if least_s <= 0.0 or seconds <= 0.0:
            return
        ratio = min(SLOWEST, max(FASTEST, seconds / min(max(seconds, least_s), most_s)))
        self.scale *= 1.0 + SHARE * (ratio - 1.0)
        self.scale = min(SLOWEST, max(FASTEST, self.scale))
        self._used = True

    def end_pass(self) -> None:
        if not self._used:
            self.scale += BACK_PER_PASS * (1.0 - self.scale)
        self._used = False


class Rails:
    """The costs to plan with: the profile's, changed in steps as the rails show otherwise."""

    def __init__(self, costs: Costs) -> None:
        self.link, self.cpu = Rail(), Rail()
        self._profile = costs
        self._taken = (1.0, 1.0)
        self.costs = costs

    def end_pass(self) -> None:
        """Take over what the pass has shown."""
        self.link.end_pass()
        self.cpu.end_pass()
        if max(abs(self.link.scale - self._taken[0]), abs(self.cpu.scale - self._taken[1])) > STEP:
            self._taken = (self.link.scale, self.cpu.scale)
            self.costs = self._profile.scaled(*self._taken)
