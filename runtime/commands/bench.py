"""`bench SUITE`: runs one of the suites in `runtime/bench`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from runtime.bench import SUITES
from runtime.errors import ConfigError


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the suite's figures.

    Raises:
        ConfigError: there is no such suite.
    """
    if options.suite is None:
        return {"suites": SUITES}
    if options.suite not in SUITES:
        raise ConfigError(
            f"There is no benchmark suite called {options.suite!r}.",
            f"Choose one of: {', '.join(SUITES)}.",
        )
    module = importlib.import_module(f"runtime.bench.{options.suite.replace('-', '_')}")
    result: dict[str, Any] = {"suite": options.suite, **module.run(options, say)}
    return result


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    if "suites" in result:
        return "".join(f"{name:12} {what}\n" for name, what in result["suites"].items())
    module = importlib.import_module(f"runtime.bench.{result['suite'].replace('-', '_')}")
    text: str = module.tell(result)
    return text
