"""The process that pins memory until the driver refuses: `hardware_pinning` starts and ends it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import torch

STEPS = 32
LEAST_STEP_BYTES = 64 * 2**20
MOST_STEP_BYTES = 2**30


def pin_in_steps(wanted_bytes: int, pin: Callable[[int], bool], say: Callable[[str], None]) -> None:
    """Pin more and more, as a store does block by block, and say how much after every step.

    The first refusal is the end: what is asked for after it says nothing.
    """
    step_bytes = min(max(wanted_bytes // STEPS, LEAST_STEP_BYTES), MOST_STEP_BYTES)
    pinned_bytes = 0
    while pinned_bytes < wanted_bytes:
        size_bytes = min(step_bytes, wanted_bytes - pinned_bytes)
        if not pin(size_bytes):
            say("refused")
            return
        pinned_bytes += size_bytes
        say(f"pinned {pinned_bytes}")
    say("enough")


def main() -> None:
    """Pin as many bytes as the first argument says, beside the second argument's on the card."""
    wanted_bytes, device_bytes = (int(argument) for argument in sys.argv[1:])
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    on_card = []
    with suppress(RuntimeError):  # somebody else has it: what can be pinned is found out anyway
        on_card.append(torch.empty(device_bytes, dtype=torch.uint8, device="cuda"))
    blocks = []

    def pin(size_bytes: int) -> bool:
        try:
            block = torch.empty(size_bytes, dtype=torch.uint8)
        except RuntimeError:
            return False
        blocks.append(block)
        return int(cudart.cudaHostRegister(block.data_ptr(), size_bytes, 0)) == 0

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    pin_in_steps(wanted_bytes, pin, say)


if __name__ == "__main__":
    main()
