"""The memory of a store: places one after another, allocated and given back in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from runtime.errors import MemoryPlanError

LEAST_BLOCK_BYTES = 64 * 2**20
MOST_BLOCK_BYTES = 2**30


class Blocks:
    """Host memory for places of `place_bytes`, each a multiple of 64. The engine thread owns it.

    `allocate` returns so many bytes of uint8, pinned where the system allows it; `release` gets
    every block back. `total_bytes` is what all experts of the model need, for the message.
    """

    def __init__(
        self,
        place_bytes: Sequence[int],
        allocate: Callable[[int], Tensor],
        release: Callable[[Tensor], None],
        total_bytes: int,
        block_bytes: int | None = None,
    ) -> None:
        whole = sum(place_bytes)
        if block_bytes is None:
            block_bytes = min(MOST_BLOCK_BYTES, max(LEAST_BLOCK_BYTES, whole // 64))
        self._allocate = allocate
        self._release = release
        self._total_bytes = total_bytes
        self._where: list[tuple[int, int, int]] = []
        self._sizes: list[int] = []
        self._firsts: list[int] = []
        for place, size in enumerate(place_bytes):
            if not self._sizes or self._sizes[-1] + size > max(block_bytes, size):
                self._sizes.append(0)
                self._firsts.append(place)
            self._where.append((len(self._sizes) - 1, self._sizes[-1], size))
            self._sizes[-1] += size
        self._blocks: list[Tensor] = []

    @property
    def size_bytes(self) -> int:
        """How much memory is allocated now."""
        return sum(self._sizes[: len(self._blocks)])

    def memory(self, place: int) -> Tensor:
        """Return the memory of a place, uint8."""
        block, offset, size = self._where[place]
        return self._blocks[block][offset : offset + size]

    def need(self, places: int) -> None:
        """Allocate until the first `places` places have memory.

        Raises:
            MemoryPlanError: there is no room.
        """
        while len(self._blocks) < len(self._firsts) and self._firsts[len(self._blocks)] < places:
            size_bytes = self._sizes[len(self._blocks)]
            try:
                self._blocks.append(self._allocate(size_bytes))
            except (MemoryError, RuntimeError) as error:
                raise MemoryPlanError(
                    f"The experts need {self._total_bytes / 2**30:.2f} GiB of memory, and there is"
                    f" no room for the next {size_bytes / 2**20:.1f} MiB of them.",
                    "Close other programs, or choose a smaller model.",
                ) from error

    def release(self, places: int) -> None:
        """Give back every block that only places from number `places` on are in."""
        while self._blocks and self._firsts[len(self._blocks) - 1] >= places:
            self._release(self._blocks.pop())
