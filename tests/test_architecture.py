"""The floors, the fences and the words of the design, checked on the source itself."""

from __future__ import annotations

import ast
import functools
import gc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "errors": 0,
    "core": 0,
    "config": 0,
    "telemetry": 0,
    "formats": 0,
    "compiled": 0,
    "wire": 0,
    "planner": 1,
    "profiles": 1,
    "cache": 1,
    "scheduler": 1,
    "transfer_queue": 1,
    "transfer_pump": 1,
    "timeline": 1,
    "residency": 1,
    "layer_run": 1,
    "simulate": 1,
    "rehearsal": 1,
    "trace": 1,
    "synthetic": 1,
    "eviction": 1,
    "use_counts": 1,
    "offline": 1,
    "policy": 1,
    "calibration": 1,
    "rails": 1,
    "activation_tracing": 1,
    "controller": 1,
    "machines": 1,
    "throughput": 1,
    "prediction": 2,
    "predictor": 2,
    "recorder": 3,
    "meeting": 5,
    "device": 2,
    "device_cuda": 2,
    "device_emulated": 2,
    "device_host": 2,
    "hardware": 2,
    "safetensors_files": 2,
    "file_digests": 2,
    "store": 2,
    "hot_experts": 2,
    "weight_forms": 2,
    "weight_packing": 2,
    "quantize": 2,
    "quantized": 2,
    "gguf": 2,
    "gguf_names": 0,
    "gguf_types": 0,
    "gguf_header": 1,
    "expert_file": 2,
    "expert_file_header": 1,
    "ram_tier": 1,
    "supply": 1,
    "disk": 2,
    "private_streams": 2,
    "kernels": 2,
    "link": 3,
    "transfer": 3,
    "layer_rows": 3,
    "executor": 3,
    "adapter": 4,
    "loader": 4,
    "sequences": 5,
    "prompts": 5,
    "text_stream": 5,
    "assembly": 5,
    "sampler": 5,
    "engine": 5,
    "host": 6,
    "inbox": 6,
    "engine_process": 6,
    "client": 6,
    "commands": 6,
    "bench": 6,
    "__main__": 6,
}
PURE = {name for name, floor in FLOORS.items() if floor <= 1}
APP_MAY_IMPORT = PURE | {"client"}
AVOIDED_WORDS = re.compile(r"manager|handler|helper|utils|common", re.IGNORECASE)


def modules(package: str) -> dict[str, Path]:
    folder = ROOT / package
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in sorted(folder.rglob("*.py"))
    }


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Parse a module once. CPython 3.11 miscounts its depth if a collection runs meanwhile."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def imports(path: Path) -> set[str]:
    """Dotted names of everything a module imports, also inside functions."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str], package: str = "runtime") -> set[str]:
    """The modules of `package` among imported names."""
    known = modules(package)
    parts = {name.removeprefix(package + ".") for name in names if name.startswith(package + ".")}
    return {part for part in parts if part in known}


def floor_of(room: str) -> int:
    """A room split off another keeps its floor: `adapter_cache` stands on that of `adapter`."""
    if room in FLOORS:
        return FLOORS[room]
    parents = [name for name in FLOORS if room.startswith((name + "_", name + "."))]
    if not parents:
        pytest.fail(f"runtime/{room} has no floor: add it to FLOORS")
    return FLOORS[max(parents, key=len)]


def test_imports_go_down_or_stay_on_their_floor() -> None:
    for room, path in modules("runtime").items():
        if room == "__init__":
            continue
        for other in rooms(imports(path)):
            assert floor_of(other) <= floor_of(room), f"runtime/{room} imports {other} above it"


def test_rooms_have_no_import_cycles() -> None:
    graph = {room: rooms(imports(path)) - {room} for room, path in modules("runtime").items()}

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " -> ".join((*trail, room))
        for other in graph[room]:
            visit(other, (*trail, room))

    for room in graph:
        visit(room, ())


def test_floors_zero_and_one_are_pure() -> None:
    for room, path in modules("runtime").items():
        if room != "__init__" and floor_of(room) <= 1:
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & {"torch", "threading", "asyncio", "transformers"}, room


def test_the_app_imports_only_what_needs_no_torch() -> None:
    for name, path in modules("app").items():
        roots = {imported.split(".")[0] for imported in imports(path)}
        assert not roots & {"torch", "transformers", "accelerate"}, name
        above = {room for room in rooms(imports(path)) if room.split(".")[0] not in APP_MAY_IMPORT}
        assert not above, f"app/{name} imports {above}"


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("gradio", re.compile(r"^app/ui")),
        ("transformers", re.compile(r"^runtime/(adapter|loader)|^assets/training/")),
        ("torch.cuda", re.compile(r"^runtime/(device|hardware|kernels)|^assets/launcher/verify")),
        ("llvmlite", re.compile(r"^runtime/(kernels_(fused|llvm)|\w+_loops)")),
        ("numba", re.compile(r"^runtime/(compiled|\w+_loops)")),
    ],
)
def test_fenced_libraries_stay_in_their_rooms(word: str, allowed: re.Pattern[str]) -> None:
    for package in ("runtime", "app", "assets"):
        for path in modules(package).values():
            where = path.relative_to(ROOT).as_posix()
            inside = any(name == word or name.startswith(word + ".") for name in imports(path))
            uses = word == "torch.cuda" and re.search(r"\btorch\.cuda\.", path.read_text("utf-8"))
            assert allowed.match(where) or not (inside or uses), f"{where} uses {word}"


def test_the_runtime_package_imports_nothing() -> None:
    assert not imports(ROOT / "runtime" / "__init__.py")


def test_no_module_or_class_has_a_word_that_says_nothing() -> None:
    for package in ("runtime", "app"):
        for name, path in modules(package).items():
            assert not AVOIDED_WORDS.search(name), path
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.ClassDef):
                    assert not AVOIDED_WORDS.search(node.name), f"{path}: {node.name}"


def test_every_public_thing_of_the_runtime_has_a_docstring() -> None:
    bare = []
    for name, path in modules("runtime").items():
        for node in parsed(path).body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef))
            if public and not node.name.startswith("_") and not ast.get_docstring(node):  # type: ignore[attr-defined, arg-type]
                bare.append(f"{name}.{node.name}")  # type: ignore[attr-defined]
    enums = {"cache.SlotState", "transfer_queue.Cause", "transfer_queue.Outcome"}
    assert not set(bare) - enums, bare
