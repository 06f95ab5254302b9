"""What must be true of this process before gradio is imported: quiet, offline, private, logged."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import logging.handlers
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_STUB_WRITER = "create_or_modify_pyi"


def prepare_environment(data_dir: Path) -> None:
    """Make gradio quiet, offline and private; call it before the first import of gradio."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    folder = data_dir / "tmp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    if not any(isinstance(finder, _WithoutStubs) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutStubs())


class _WithoutStubs(importlib.abc.MetaPathFinder):
    """Keeps gradio from writing `.pyi` stubs at import: 40 % of its start, and files in our tree.

    Its stub writer is replaced as soon as the module that defines it has run.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "gradio.component_meta":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if hasattr(module, _STUB_WRITER):
                    setattr(module, _STUB_WRITER, _write_no_stub)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _write_no_stub(*args: Any, **kwargs: Any) -> None:
    """Stand in for gradio's stub writer."""


def log_to(folder: Path) -> None:
    """Send every log line to `app.log`, private and rotated; never what people write.

    Where standard error is that file already, the launcher keeps it, so it is only written to.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "app.log"
    handler: logging.Handler
    if _is_standard_error(path):
        handler = logging.StreamHandler()
    else:
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=1 << 20, backupCount=3, encoding="utf-8", delay=True
        )
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[handler],
        force=True,
    )
    logging.captureWarnings(True)
    for name in ("httpx", "httpcore", "asyncio", "gradio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _is_standard_error(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False
