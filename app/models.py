"""Which models the dropdown offers, found on this disk without loading or trusting any of them.

Three places: the built-in model, the folders a person added, and what the Hugging Face cache holds
already. A `config.json` or the beginning of a GGUF file is read with a size cap and believed only
for its expert count.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from app.settings import SettingsStore
from runtime.errors import ModelError
from runtime.gguf_header import read_outline
from runtime.gguf_names import SUFFIX, model_stem, models_among, part_names, part_of

DEFAULT = "default"
DEFAULT_LABEL = "PreScope Tiny (built in)"
MAX_CONFIG_BYTES = 1 << 20
_MAX_ENTRIES = 2000
_MAX_OFFERS = 300
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
    "num_moe_experts",
    "n_experts",
)
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")
_REVISION = frozenset("0123456789abcdef")


Source = Literal["built in", "folder", "Hugging Face cache"]


@dataclass(frozen=True)
class ModelOffer:
    """One line of the dropdown. `path` is what `LoadRequest.model` takes.

    `why` is empty when the model looks usable, else the sentence why not. Whether it really
    loads is for the engine to say. `plan` says in a few words what it would do on this machine,
    once that is known.
    """

    label: str
    path: str
    size_bytes: int
    model_type: str
    experts: int
    why: str
    source: Source
    plan: str = ""

    @property
    def supported(self) -> bool:
        return not self.why


class ModelShelf:
    """Looks at the disk whenever asked; holds nothing but where to look."""

    def __init__(
        self,
        settings_store: SettingsStore,
        *,
        default_folder: Path | None = None,
        environ: Mapping[str, str] = os.environ,
        plan_of: Callable[[str], str] = lambda path: "",
    ) -> None:
        self._plan_of = plan_of
        self._settings = settings_store
        self._default_folder = default_folder
        self._environ = environ

    def __call__(self) -> list[ModelOffer]:
        """Return the built-in model, then folders, then the cache; never raises."""
        found = [self._built_in()]
        for name in filter(None, self._settings.current().model_folders):
            found += itertools.islice(_in_folder(Path(name)), _MAX_OFFERS)
        found += itertools.islice(_in_cache(cache_folder(self._environ)), _MAX_OFFERS)
        offers = list({offer.path: offer for offer in reversed(found)}.values())[::-1]
        return [self._planned(offer) for offer in offers]

    def _planned(self, offer: ModelOffer) -> ModelOffer:
        """Add what the model would do here; the built-in one is made to run everywhere."""
        if offer.source == "built in" or not offer.supported:
            return offer
        return replace(offer, plan=self._plan_of(offer.path))

    def _built_in(self) -> ModelOffer:
        if self._default_folder is None:
            return ModelOffer(DEFAULT_LABEL, DEFAULT, 0, "", 0, "", "built in")
        seen = inspect_folder(self._default_folder, DEFAULT_LABEL, "built in")
        return ModelOffer(
            DEFAULT_LABEL, DEFAULT, seen.size_bytes, seen.model_type, seen.experts, "", "built in"
        )


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Return where the Hugging Face hub keeps its downloads under these variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(os.path.expanduser(environ[name]))
    if environ.get("HF_HOME"):
        return Path(os.path.expanduser(environ["HF_HOME"])) / "hub"
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "huggingface" / "hub"


def inspect_folder(folder: Path, name: str, source: Source) -> ModelOffer:
    """Return what a model folder looks like from outside; never raises on what is in it."""
    size_bytes = 0
    for path in _entries(folder):
        if path.name.endswith(".safetensors"):
            size_bytes += _file_bytes(path)
    config, reason = _config(folder / "config.json")
    model_type = config.get("model_type")
    experts = _experts(config)
    if not reason and experts < 2:
        reason = "Not a mixture of experts: its config.json names no experts."
    if not reason and size_bytes == 0:
        reason = "There are no .safetensors files in it."
    return ModelOffer(
        label=printable(name),
        path=str(folder),
        size_bytes=size_bytes,
        model_type=printable(model_type) if isinstance(model_type, str) else "",
        experts=experts,
        why=reason,
        source=source,
    )


def inspect_gguf(path: Path, name: str, source: Source) -> ModelOffer:
    """Return what a GGUF model looks like, from any of its parts; never raises on its content."""
    part = part_of(path.name)
    names = part_names(part[0], part[2]) if part and part[2] <= _MAX_ENTRIES else [path.name]
    sizes = {each: _file_bytes(path.with_name(each)) for each in names}
    reason = next((f"{each} is missing." for each, size in sizes.items() if size == 0), "")
    architecture, experts = "", 0
    if not reason:
        first = path.with_name(names[0])
        try:
            with open(first, "rb", buffering=0) as file:
                architecture, experts = read_outline(file, first)
        except ModelError as error:
            reason = error.message
        except OSError as error:
            reason = f"{first.name} cannot be read ({error.strerror})."
    if not reason and experts < 2:
        reason = "Not a mixture of experts: its metadata names no experts."
    return ModelOffer(
        label=printable(name),
        path=str(path),
        size_bytes=sum(sizes.values()),
        model_type=printable(architecture),
        experts=experts,
        why=reason,
        source=source,
    )


def _in_folder(folder: Path) -> Iterator[ModelOffer]:
    """Yield the folder itself if it is a model, else the models in it and directly below it."""
    if folder.suffix == SUFFIX and _file_bytes(folder):
        yield inspect_gguf(folder, model_stem(folder.name), "folder")
        return
    if _has_weights_of_its_own(folder):
        yield inspect_folder(folder, folder.name or str(folder), "folder")
        return
    found = False
    for path in models_among(_entries(folder)):
        found = True
        yield inspect_gguf(path, model_stem(path.name), "folder")
    for below in _entries(folder):
        if _has_weights_of_its_own(below):
            found = True
            yield inspect_folder(below, below.name, "folder")
        else:
            for path in models_among(_entries(below)):
                found = True
                yield inspect_gguf(path, model_stem(path.name), "folder")
    if not found:
        reason = "No model was found in this folder." if _is_folder(folder) else "No such folder."
        yield ModelOffer(
            printable(folder.name or str(folder)), str(folder), 0, "", 0, reason, "folder"
        )


def _in_cache(cache: Path) -> Iterator[ModelOffer]:
    for repo in _entries(cache):
        kind, *parts = repo.name.split("--")
        snapshot = _snapshot(repo) if kind == "models" and parts else None
        if snapshot is None:
            continue
        name = "/".join(parts)
        models = models_among(_entries(snapshot))
        if not models or _has_weights_of_its_own(snapshot):
            yield inspect_folder(snapshot, name, "Hugging Face cache")
        for path in models:
            label = f"{name}: {model_stem(path.name)}"
            yield inspect_gguf(path, label, "Hugging Face cache")


def _snapshot(repo: Path) -> Path | None:
    """Return the folder of the revision that `refs/main` names, else of the newest."""
    named = _read(repo / "refs" / "main", 100).decode("ascii", "replace").strip()
    if named and set(named) <= _REVISION and _is_folder(repo / "snapshots" / named):
        return repo / "snapshots" / named
    found = [path for path in _entries(repo / "snapshots") if _is_folder(path)]
    return max(found, key=_changed_s, default=None)


def _config(path: Path) -> tuple[dict[str, Any], str]:
    """Return the config and, when it cannot be used, why."""
    size = _file_bytes(path, any_kind=True)
    if size < 0:
        return {}, "There is no config.json in it."
    if size > MAX_CONFIG_BYTES:
        return {}, f"Its config.json has {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read."
    try:
        config = json.loads(_read(path, MAX_CONFIG_BYTES + 1))
    except (ValueError, RecursionError):
        return {}, "Its config.json is not JSON."
    return (config, "") if isinstance(config, dict) else ({}, "Its config.json is not an object.")


def _experts(config: dict[str, Any]) -> int:
    """Return the largest expert count that a config names, 0 for none."""
    counts = [0]
    groups = [config]
    for _ in range(2):
        groups += [
            group[name] for group in groups for name in _NESTED if isinstance(group.get(name), dict)
        ]
    for group in groups:
        for key in _EXPERT_KEYS:
            value = group.get(key)
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and not isinstance(count, bool) and count < 1 << 20:
                    counts.append(count)
    return max(counts)


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in itertools.islice(entries, _MAX_ENTRIES))
    except (OSError, ValueError):
        return []


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _has_weights_of_its_own(folder: Path) -> bool:
    """Say whether a folder is a model by its config.json, and not only beside GGUF files."""
    if _file_bytes(folder / "config.json", any_kind=True) < 0:
        return False
    entries = _entries(folder)
    return any(path.suffix == ".safetensors" for path in entries) or not models_among(entries)


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _file_bytes(path: Path, any_kind: bool = False) -> int:
    """Return the size of a plain file; else 0, or -1 with `any_kind` when there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return -1 if any_kind else 0
    return found.st_size if stat.S_ISREG(found.st_mode) else (-1 if any_kind else 0)


def _read(path: Path, limit: int) -> bytes:
    if _file_bytes(path) == 0:
        return b""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def printable(text: str) -> str:
    """Return a label: one line, no control or direction characters, at most 120 characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:120]
