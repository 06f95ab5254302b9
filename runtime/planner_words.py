"""What a memory plan says to a person: sizes, and what had to give way."""

from __future__ import annotations

from runtime.core import MemoryPlan, ModelShape

MIB = 2**20
GIB = 2**30


def size_text(size_bytes: int) -> str:
    """Return a size in GiB or MiB."""
    if abs(size_bytes) >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    return f"{size_bytes / MIB:.1f} MiB"


def notes_of(shape: ModelShape, plan: MemoryPlan, least_context_tokens: int) -> tuple[str, ...]:
    """Return sentences about what the plan had to do without."""
    notes = []
    if plan.ram_experts is not None:
        whole_bytes = shape.expert_count * shape.expert_bytes
        notes.append(
            f"The experts are {size_text(whole_bytes)} and RAM has room for"
            f" {size_text(plan.ram_experts_bytes)} of them ({plan.ram_experts:,} of"
            f" {shape.expert_count:,}): the rest is read from the disk whenever it is needed."
        )
    if plan.context_tokens < min(shape.context_tokens, 2 * least_context_tokens):
        notes.append(
            f"Memory is tight: a chat can have {plan.context_tokens:,} tokens, of the"
            f" {shape.context_tokens:,} that the model allows."
        )
    if plan.pinned_bytes < plan.ram_experts_bytes:
        notes.append(
            f"The system lets {size_text(plan.pinned_bytes)} of the"
            f" {size_text(plan.ram_experts_bytes)} of experts be pinned: the others take a slower"
            " way to the card."
        )
    return tuple(notes)
