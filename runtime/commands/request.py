"""What the common options ask for."""

from __future__ import annotations

import argparse

from runtime.core import LoadRequest


def load_request(options: argparse.Namespace) -> LoadRequest:
    """Return the load request that the command line describes."""
    return LoadRequest(
        model=options.model,
        policy=options.policy,
        cache_fraction=options.cache_fraction,
        vram_bytes=options.vram,
        link_bytes_per_s=options.link_bytes_per_s,
        eviction=options.eviction,
        prediction=not options.no_prediction,
        experts=options.experts or "as stored",
        ram_bytes=options.ram,
    )
