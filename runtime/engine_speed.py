"""Whose speed the panel shows: one request's own while it is alone, else that of all together."""

from __future__ import annotations

from runtime.engine_parts import Device, Executor
from runtime.telemetry import Panel, Timing


class ShownSpeed:
    """Keeps the panel's timing. The engine thread owns it.

    Requests together are timed anew from each pass after which somebody joined or left, so that
    the speed is that of as many as run now. The time to first token is the newest one's.
    """

    def __init__(self, panel: Panel, executor: Executor, device: Device) -> None:
        self._panel = panel
        self._executor = executor
        self._device = device
        self._timing = Timing(device.now_s(), executor.counters())
        self._anew_ttft_s: float | None = None

    def begin(self, timing: Timing) -> None:
        """Note that a request starts while no other runs."""
        self._timing = timing
        self._panel.begin(timing)

    def token(self, timing: Timing) -> None:
        """Note that the request of `timing` has just got a token."""
        if timing is self._timing:
            return
        if timing.new_tokens == 1:
            self._anew_ttft_s = timing.ttft_s
        else:
            self._timing.token(timing.last_token_s)

    def left(self, others: bool) -> None:
        """Note that a request is over; `others` says whether any is not."""
        if not others:
            self._anew_ttft_s = None
            self._panel.end()
        elif self._anew_ttft_s is None:
            self._anew_ttft_s = self._timing.ttft_s

    def after_pass(self) -> None:
        """Note that everybody has got what a pass gave them."""
        if self._anew_ttft_s is not None:
            counters = self._executor.counters()
            self._timing = Timing.from_here(self._device.now_s(), counters, self._anew_ttft_s)
            self._timing.stall_s_by_layer = self._executor.stall_s_by_layer
            self._anew_ttft_s = None
            self._panel.follow(self._timing)
        self._panel.tick()
