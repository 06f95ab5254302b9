"""The ledger of the emulated machine: absolute ideal times of link, device, CPU and disk.

Pure arithmetic on seconds, no clock and no threads. The emulated device charges real work to it;
the simulator charges the same work without doing it. Ideal end times are absolute, so a sleep
that lasts too long never adds up.
"""

from __future__ import annotations

from runtime.core import HardwareProfile


class Timeline:
    """Host, copy stream, compute stream and disk of one modelled machine.

    `host_s` is the modelled time of the thread that runs the model. The two streams run beside
    it: `copy_free_s` and `compute_free_s` are when each has finished all it was given, and
    `disk_free_s` when the disk has.
    """

    def __init__(self, profile: HardwareProfile, start_s: float = 0.0) -> None:
        self._profile = profile
        self.host_s = start_s
        self.copy_free_s = start_s
        self.compute_free_s = start_s
        self.disk_free_s = start_s

    def layer(self, tokens: int, extra_bytes: int = 0, forwards: int = 1) -> None:
        """Charge a layer's host work and dense compute, then wait for it: routing needs it.

        `extra_bytes` more weights are read on the way, such as a predictor's. Sequences that each
        run a forward of their own pay for host and dense work apart.
        """
        profile = self._profile
        self.host_s += profile.host_layer_s.value * forwards
        dense = profile.device_layer_s.value
        more_tokens = (tokens - forwards) / profile.device_tokens_per_pass.value
        extra_s = extra_bytes / profile.device_bytes_per_s.value
        self._compute(dense * (forwards + more_tokens) + extra_s)
        self.host_s = max(self.host_s, self.compute_free_s)

    def copy_waits(self, until_s: float) -> None:
        """Let what follows on the copy stream begin no earlier than `until_s`."""
        self.copy_free_s = max(self.copy_free_s, until_s)

    def compute_waits(self, until_s: float) -> None:
        """Let what follows on the compute stream begin no earlier than `until_s`."""
        self.compute_free_s = max(self.compute_free_s, until_s)

    def device_expert(self, size_bytes: int, tokens: int) -> None:
        """Queue one expert's compute on the device."""
        profile = self._profile
        cost = size_bytes / profile.device_bytes_per_s.value
        factor = 1 + (tokens - 1) / profile.device_tokens_per_pass.value
        self._compute(cost * factor)

    def cpu_experts(self, work: list[tuple[int, int]], copying_until_s: float) -> float:
        """Charge (bytes, tokens) experts to the CPU in one call; return the seconds they took.

        Until `copying_until_s` the link takes its share of host memory and the CPU runs slower.
        """
        profile = self._profile
        tokens_per_pass = profile.cpu_tokens_per_pass.value
        work_bytes = sum(size * (1 + (tokens - 1) / tokens_per_pass) for size, tokens in work)
        began_s = self.host_s
        self.host_s += profile.cpu_call_s.value
        slow = profile.cpu_expert_bytes_per_s_while_copying.value
        shared_s = min(max(0.0, copying_until_s - self.host_s), work_bytes / slow)
        alone_s = (work_bytes - shared_s * slow) / profile.cpu_expert_bytes_per_s.value
        self.host_s += shared_s + alone_s
        return self.host_s - began_s

    def copy(self, size_bytes: int, ready_s: float, first: bool) -> tuple[float, float]:
        """Queue one chunk on the link, ordered at `ready_s`; return when it begins and lands.

        The call that starts a transfer takes a while, but not on the link: copies that wait
        behind others have long been called when their turn comes.
        """
        called_s = ready_s + self._profile.link_call_s.value if first else ready_s
        begins_s = max(self.copy_free_s, called_s)
        self.copy_free_s = begins_s + size_bytes / self._profile.link_bytes_per_s.value
        return begins_s, self.copy_free_s

    def disk(self, size_bytes: int, ordered_s: float) -> float:
        """Queue one read, ordered at `ordered_s`; return when it lands.

        Several are under way at a time: each needs its start, but only the bytes queue up.
        """
        begins_s = max(self.disk_free_s, ordered_s + self._profile.disk_call_s.value)
        self.disk_free_s = begins_s + size_bytes / self._profile.disk_bytes_per_s.value
        return self.disk_free_s

    def copying_until_s(self, backlog_bytes: int) -> float:
        """Return when the link will be idle if nothing is added to its backlog."""
        return self.copy_free_s + backlog_bytes / self._profile.link_bytes_per_s.value

    def wait_for_compute(self) -> None:
        """Let the host wait until the device has computed all it was given."""
        self.host_s = max(self.host_s, self.compute_free_s)

    def _compute(self, cost_s: float) -> None:
        self.compute_free_s = max(self.compute_free_s, self.host_s) + cost_s
