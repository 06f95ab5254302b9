"""What else lies in a model's folder is never opened, imported or run (F7), and nothing calls out.

In a process of its own, because what is watched (every file, socket, program) is watched for good.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.families import make_checkpoint

_WATCH = """
import json, os, sys
folder, seen, asked = sys.argv[1], [], []
calls = {"socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "pickle.find_class"}
def audit(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if path.startswith(folder):
            seen.append(os.path.relpath(path, folder))
    elif event in calls:
        asked.append(event)
    elif event == "subprocess.Popen":
        asked.append(event + ":" + os.path.basename(str(args[1][2])) if len(args[1]) > 2 else event)
    elif event == "import" and folder in str(args[1] or ""):
        asked.append("import " + str(args[0]))
sys.path.append(folder)
import torch
from pathlib import Path
from runtime.loader import load_model, read_shape
sys.addaudithook(audit)
read_shape(Path(folder))
load_model(Path(folder), torch_device=torch.device("cpu"), dtype=None,
           allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
           progress=lambda step: None, cancelled=lambda: False)
print("RESULT" + json.dumps([sorted(set(seen)), asked]))
"""
READ = {"config.json", "model.safetensors", "generation_config.json"}
TRAPS = (
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.pth",
    "training_args.bin",
    "optimizer.pickle",
    "model.gguf",
    "modeling_evil.py",
    "configuration_evil.py",
    "tokenization_evil.py",
    "sitecustomize.py",
    "usercustomize.py",
    "conftest.py",
    "transformers.py",
    "kernel.so",
    "model.onnx",
    "flax_model.msgpack",
    "preprocessor_config.json",
    "adapter_config.json",
    "README.md",
)


def test_no_other_file_is_opened_and_nothing_is_asked_of_anybody(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint("qwen3_moe", folder)
    flag = tmp_path / "flag"
    code = f"open({str(flag)!r}, 'w').close()"
    pickle = f"cbuiltins\nexec\n(S{code!r}\ntR.".encode()
    for name in TRAPS:
        (folder / name).write_bytes(code.encode() if name.endswith(".py") else pickle)
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["auto_map"] = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    }
    record |= {"trust_remote_code": True, "_attn_implementation_internal": "evil/kernel"}
    path.write_text(json.dumps(record), encoding="utf-8")
    out = subprocess.run(
        [sys.executable, "-c", _WATCH, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    seen, asked = json.loads(out.rpartition("RESULT")[2])
    assert set(seen) <= READ
    assert {"config.json", "model.safetensors"} <= set(seen)  # the watch works
    assert asked == []
    assert not flag.exists()
