"""Machines by their parts: cards, links, CPUs and host overheads whose rates were published.

None of them was measured here, so every reading says "assumed". Link rates are the practical ones
of pinned host-to-device copies, not the datasheet's. What a profile leaves out: the link slows a
little while the CPU computes (published pairs lose 14 to 33 % of it), here it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from runtime.core import HardwareProfile, Reading
from runtime.errors import ConfigError

MEMORY_SHARE = 0.85
"""Share of a card's nominal memory rate that kernels reach."""

TENSOR_SHARE = 0.5
"""Share of a card's dense bf16 rate that grouped expert products reach at large token counts."""

UNPINNED_SHARE = 0.5
"""A copy from pageable memory goes through a staging buffer: 11 to 18 of 25 GB/s on PCIe 4.0."""

LINK_CALL_S = 48e-6
CPU_CALL_S = 20e-6
"""Fixed costs of one copy and of one CPU call, fitted by others on PCIe 4 and 5 hosts."""

CPU_FLOPS_PER_S_PER_CORE = 116e9
CPU_FLOPS_PER_S_PER_CORE_QUANTISED = 90e9
"""What further tokens of an expert cost one core, from timings of torch's own kernels.

A bf16 expert of 4.72 million weights takes 1.02 ms for one token and, with AVX-512 but without
AMX, 2.24 ms for 16: 81 us per token more. An int4 one takes 0.335 ms and 1.82 ms for 16, 13.7 ms
for 128; int8 14.5 ms for 128: 99 to 109 us per token more. Desktop CPUs have no AMX.
"""

DISK_BYTES_PER_S = 5e9
DISK_CALL_S = 100e-6
"""A PCIe 4.0 NVMe disk reading whole experts with several reads in flight: 5 to 7 GB/s."""

RAM_IN_USE_BYTES = 4 << 30
"""What the system, a desktop and a browser hold of a machine's RAM before anything is loaded."""

QUANTISED_BELOW_BITS = 16.0
LAYER_DENSE_BYTES = 51_000_000
"""Attention, norms, router and a layer's part of the output head: Qwen3-30B-A3B in 16 bits."""


@dataclass(frozen=True)
class Card:
    """A card. `flops_per_s` is its dense bf16 rate; `links` are those its slot can have."""

    name: str
    vram_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    links: tuple[str, ...]

    @property
    def bytes_per_s(self) -> float:
        """The rate at which it reads weights."""
        return MEMORY_SHARE * self.memory_bytes_per_s


@dataclass(frozen=True)
class Cpu:
    """A CPU by the rate at which it consumes expert weights for one token, and its cores."""

    name: str
    expert_bytes_per_s: float
    cores: int


@dataclass(frozen=True)
class Machine:
    """One machine by its axes; `profile` makes the numbers of it for one model."""

    card: str
    link: str
    cpu: str
    host_layer_s: float

    @property
    def name(self) -> str:
        return f"{self.card} {self.link} {self.cpu} host {self.host_layer_s * 1e6:.0f}us"

    def profile(
        self, layer_dense_bytes: int = LAYER_DENSE_BYTES, weight_bits: float = 16.0
    ) -> HardwareProfile:
        """Return its profile for a model with this much dense weight per layer."""
        card, cpu = CARDS[self.card], CPUS[self.cpu]
        return machine(
            card,
            LINKS[self.link],
            cpu.expert_bytes_per_s,
            self.host_layer_s,
            cpu_cores=cpu.cores,
            layer_dense_bytes=layer_dense_bytes,
            weight_bits=weight_bits,
            name=self.name,
        )


_UP_TO_3 = ("pcie3x4", "pcie3x16")
_UP_TO_4 = (*_UP_TO_3, "pcie4x16")
_UP_TO_5 = (*_UP_TO_4, "pcie5x16")
_GIB = 1 << 30

LINKS: Mapping[str, float] = {
    "pcie3x4": 3e9,
    "pcie3x16": 12e9,
    "pcie4x16": 25e9,
    "pcie5x16": 54e9,
}
"""Bytes/s. A laptop's PCIe 4.0 x8 is as fast as 3.0 x16; x4 stands for eGPUs, chipset slots."""

CPUS: Mapping[str, Cpu] = {
    cpu.name: cpu for cpu in (Cpu("cpu25", 25e9, 6), Cpu("cpu55", 55e9, 8), Cpu("cpu75", 75e9, 16))
}
"""DDR4 or weak kernels, dual-channel DDR5, and a workstation or server."""

HOST_LAYER_S: tuple[float, ...] = (20e-6, 100e-6, 250e-6)
"""Whole-token graphs, a careful eager loop, plain modules."""

CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("rtx3090", 24 * _GIB, 936e9, 71e12, _UP_TO_4),
        Card("rtx4090", 24 * _GIB, 1008e9, 165e12, _UP_TO_4),
        Card("rtx5090", 32 * _GIB, 1792e9, 209e12, _UP_TO_5),
        Card("laptop12", 12 * _GIB, 432e9, 60e12, _UP_TO_3),
        Card("a100", 32 * _GIB, 1555e9, 312e12, _UP_TO_4),
    )
}
"""The A100 is held to 32 GB as in the PreScope paper; the laptop is an RTX 4080 Laptop."""

MACHINES: Mapping[str, Machine] = {
    "rtx3090": Machine("rtx3090", "pcie4x16", "cpu25", 100e-6),
    "rtx4090": Machine("rtx4090", "pcie4x16", "cpu55", 100e-6),
    "rtx5090": Machine("rtx5090", "pcie5x16", "cpu55", 100e-6),
    "laptop12": Machine("laptop12", "pcie3x16", "cpu55", 100e-6),
    "egpu3090": Machine("rtx3090", "pcie3x4", "cpu55", 100e-6),
    "paper-a100": Machine("a100", "pcie4x16", "cpu75", 250e-6),
}
"""Named presets. `paper-a100` is the PreScope paper's: PCIe 4.0 x16, one Xeon Gold 6230R, stock
modules as the host loop. Its CPU rate is not published; six channels of DDR4-2933 and half-rate
bf16 on 26 cores are taken for 75 GB/s and 16 cores."""


def stated_machine(name: str, link: str | None = None, cpu: str | None = None) -> Machine:
    """Return the machine that a person names: a preset or a card, with parts of it replaced.

    A card without a link gets its slot's fastest, without a CPU an ordinary desktop's.

    Raises:
        ConfigError: there is no part of that name, or the card's slot has no such link.
    """
    if name in MACHINES:
        found = MACHINES[name]
    elif name in CARDS:
        found = Machine(name, CARDS[name].links[-1], "cpu55", 100e-6)
    else:
        names = sorted({*MACHINES, *CARDS})
        raise ConfigError(f"There is no machine called {name!r}.", f"Choose {', '.join(names)}.")
    links = CARDS[found.card].links
    if link is not None and link not in links:
        raise ConfigError(
            f"The card {found.card} has no link {link!r}.", f"Choose one of {', '.join(links)}."
        )
    if cpu is not None and cpu not in CPUS:
        raise ConfigError(f"There is no CPU called {cpu!r}.", f"Choose one of {', '.join(CPUS)}.")
    return replace(found, link=link or found.link, cpu=cpu or found.cpu)


def while_copying(cpu_bytes_per_s: float, link_bytes_per_s: float) -> float:
    """Return what is left to the CPU while the link copies: both read the same memory.

    Published pairs, in GB/s: 65.8 alone and 43.4 beside a link of 25.1; 62 and 37 beside 57;
    64 and 54 beside 24. The rule gives 44.5, 34.1 and 43.6.
    """
    return max(0.55 * cpu_bytes_per_s, cpu_bytes_per_s - 0.85 * link_bytes_per_s)


def tokens_per_pass(flops_per_s: float, bytes_per_s: float, weight_bits: float) -> float:
    """Return how many more tokens cost as much as reading the weights once more.

    One token more is 2 operations per weight; reading a weight is `weight_bits` / 8 bytes.
    """
    return flops_per_s * weight_bits / 8 / (2 * bytes_per_s)


def machine(
    card: Card,
    link_bytes_per_s: float,
    cpu_bytes_per_s: float,
    host_layer_s: float,
    *,
    cpu_cores: int = 8,
    layer_dense_bytes: int = LAYER_DENSE_BYTES,
    weight_bits: float = 16.0,
    ram_bytes: int = 64 * _GIB,
    name: str = "",
) -> HardwareProfile:
    """Return the profile of a machine made of these parts; `weight_bits` is the experts' format."""
    quantised = weight_bits < QUANTISED_BELOW_BITS
    per_core = CPU_FLOPS_PER_S_PER_CORE_QUANTISED if quantised else CPU_FLOPS_PER_S_PER_CORE

    def assumed(value: float) -> Reading:
        return Reading(value, "assumed")

    return HardwareProfile(
        device_kind="emulated",
        device_name=name or card.name,
        vram_total_bytes=card.vram_bytes,
        vram_free_bytes=card.vram_bytes,
        ram_total_bytes=ram_bytes,
        ram_free_bytes=ram_bytes,
        link_bytes_per_s=assumed(link_bytes_per_s),
        link_unpinned_bytes_per_s=assumed(UNPINNED_SHARE * link_bytes_per_s),
        link_call_s=assumed(LINK_CALL_S),
        cpu_expert_bytes_per_s=assumed(cpu_bytes_per_s),
        cpu_expert_bytes_per_s_while_copying=assumed(
            while_copying(cpu_bytes_per_s, link_bytes_per_s)
        ),
        cpu_call_s=assumed(CPU_CALL_S),
        device_bytes_per_s=assumed(card.bytes_per_s),
        device_layer_s=assumed(layer_dense_bytes / card.bytes_per_s),
        host_layer_s=assumed(host_layer_s),
        cpu_tokens_per_pass=assumed(
            tokens_per_pass(cpu_cores * per_core, cpu_bytes_per_s, weight_bits)
        ),
        device_tokens_per_pass=assumed(
            tokens_per_pass(TENSOR_SHARE * card.flops_per_s, card.bytes_per_s, weight_bits)
        ),
        disk_bytes_per_s=assumed(DISK_BYTES_PER_S),
        disk_call_s=assumed(DISK_CALL_S),
    )
