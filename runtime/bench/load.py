"""`bench load`: loading beside a plain read of the same bytes, peak memory beside the plan.

The page cache is hot and everything happens in one fresh process, in turns. A plain read into new
memory pays for its pages as loading does; one into a reused buffer shows the page cache's own rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from runtime.core import LoadProgress

LAYERS, EXPERTS, HIDDEN, INNER = 4, 64, 1024, 512
HEAD_DIM, VOCABULARY = 128, 256
ROUNDS = 3
PIECE_BYTES = 2**25
CANCEL_AT = 0.3


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a checkpoint with random weights, load it a few times, and set the figures in line."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"Writing a checkpoint of {LAYERS} layers\n")
        write_checkpoint(Path(folder))
        say("Loading it\n")
        return measure(Path(folder), ROUNDS)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Load the model in `folder` in a process of its own; times are ratios of medians."""
    task = json.dumps([str(folder), rounds])
    code = "from runtime.bench.load import child; child()"
    ran = subprocess.run(
        [sys.executable, "-c", code], input=task, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(ran.stdout.rpartition("RESULT ")[2])
    return result


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    return (
        f"{result['read_bytes'] / 1e6:.0f} MB from a hot page cache, {result['rounds']} turns:\n"
        f"  the whole load takes {result['load_to_new_memory']:.2f} times a plain read into new"
        f" memory ({result['load_to_reused_buffer']:.2f} times one into a reused buffer)\n"
        f"  its experts alone take {result['experts_to_new_memory']:.2f} times a plain read of"
        " theirs\n"
        f"  peak memory is {result['peak_to_plan']:.3f} of the plan\n"
        f"  a cancelled load ends after {result['cancel_s']:.2f} s and leaves"
        f" {result['left_bytes'] / 1e6:+.0f} MB\n"
    )


def write_checkpoint(folder: Path, layers: int = LAYERS, experts: int = EXPERTS) -> None:
    """Write a Qwen3 MoE with random weights in bfloat16, in the hub's format."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": random(HIDDEN),
    }
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name in ("q_proj", "o_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = random(HIDDEN, HIDDEN)
        for name in ("k_proj", "v_proj"):
            tensors[f"{layer}self_attn.{name}.weight"] = random(2 * HEAD_DIM, HIDDEN)
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}self_attn.{name}.weight"] = random(HEAD_DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = random(HIDDEN)
        tensors[f"{layer}mlp.gate.weight"] = random(experts, HIDDEN)
        for expert in range(experts):
            place = f"{layer}mlp.experts.{expert}."
            tensors[f"{place}gate_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{place}up_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{place}down_proj.weight"] = random(HIDDEN, INNER)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def child() -> None:
    """Measure the folder named on standard input; write one line that begins with RESULT."""
    import psutil
    import torch

    from runtime.errors import CancelledError
    from runtime.loader import load_model

    name, rounds = json.load(sys.stdin)
    folder = Path(name)
    torch.set_num_threads(1)
    process = psutil.Process()

    def load(
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[LoadProgress], None] = lambda step: None,
    ) -> Any:
        return load_model(
            folder,
            torch_device=torch.device("cpu"),
            dtype=None,
            allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
            progress=progress,
            cancelled=cancelled,
        )

    files = sorted(folder.glob("*.safetensors"))
    read_bytes = sum(path.stat().st_size for path in files)
    load().store.close()  # imports, tables and the page cache are warm from here on
    gc.collect()
    turns: dict[str, list[float]] = {"load": [], "experts": [], "new": [], "reused": [], "peak": []}
    for _ in range(rounds):
        turns["reused"].append(_plain_read_s(files, bytearray(PIECE_BYTES)))
        turns["new"].append(_plain_read_s(files, None))
        before_bytes = _peak_bytes(reset=True)
        stamps: list[float] = []
        began_s = time.perf_counter()
        loaded = load(progress=partial(_stamp_experts, stamps))
        turns["load"].append(time.perf_counter() - began_s)
        turns["experts"].append(stamps[-1] - stamps[0])
        plan_bytes = loaded.store.ram_bytes + loaded.shape.dense_bytes
        turns["peak"].append((_peak_bytes(reset=False) - before_bytes) / plan_bytes)
        expert_share = loaded.store.ram_bytes / read_bytes
        loaded.store.close()
        del loaded
        gc.collect()
    asked = threading.Event()
    cancelled_at_s: list[float] = []

    def watch(step: LoadProgress) -> None:
        if step.total_bytes and step.done_bytes > CANCEL_AT * step.total_bytes:
            if not asked.is_set():
                cancelled_at_s.append(time.perf_counter())
            asked.set()

    before_bytes = process.memory_info().rss
    try:
        load(asked.is_set, watch)
    except CancelledError:
        pass
    cancel_s = time.perf_counter() - cancelled_at_s[0]
    gc.collect()
    left_bytes = process.memory_info().rss - before_bytes
    middle = {name: statistics.median(values) for name, values in turns.items()}
    result = {
        "rounds": rounds,
        "read_bytes": read_bytes,
        "load_to_new_memory": middle["load"] / middle["new"],
        "load_to_reused_buffer": middle["load"] / middle["reused"],
        "experts_to_new_memory": middle["experts"] / (middle["new"] * expert_share),
        "peak_to_plan": max(turns["peak"]),
        "planned_bytes": plan_bytes,
        "cancel_s": cancel_s,
        "left_bytes": left_bytes,
    }
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


def _stamp_experts(stamps: list[float], step: LoadProgress) -> None:
    if "experts" in step.text:
        stamps.append(time.perf_counter())


def _plain_read_s(files: list[Path], buffer: bytearray | None) -> float:
    """Return how long reading all files takes: into `buffer`, or into memory never touched."""
    import numpy as np

    size = max(path.stat().st_size for path in files)
    began_s = time.perf_counter()
    for path in files:
        into = memoryview(buffer if buffer is not None else np.empty(size, np.uint8).data)
        with open(path, "rb", buffering=0) as file:
            done = 0
            while count := file.readinto(
                into if buffer is not None else into[done : done + PIECE_BYTES]
            ):
                done += count
    return time.perf_counter() - began_s


def _peak_bytes(*, reset: bool) -> int:
    """Return the most memory this process ever had, or has now if that is where it starts anew.

    Only where the system keeps such a figure; elsewhere what it has now.
    """
    import psutil

    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return int(psutil.Process(os.getpid()).memory_info().rss)
    if reset:
        clear.write_text("5")
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
