"""`probe`: what this computer has, each figure with where it comes from."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the profile that the default model would run on."""
    from runtime.assembly import profile_for
    from runtime.core import LoadRequest

    profile = profile_for(LoadRequest(link_bytes_per_s=options.link_bytes_per_s))
    return {"emulated": profile.emulated, **asdict(profile)}


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines.append(f"{name:40} {value['value']:.4g} ({value['source']})")
        else:
            lines.append(f"{name:40} {value:,}" if type(value) is int else f"{name:40} {value}")
    return "\n".join(lines) + "\n"
