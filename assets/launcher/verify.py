"""Run by a new environment's Python before it is put to use: does torch really work here?

Prints one JSON object as its last line. Imports what the app imports, so that Python's compiled
files are there at the first start.
"""

import importlib
import json
from typing import Any


def main() -> None:
    import torch

    ones = torch.ones(64, 64)
    if float((ones @ ones)[0, 0]) != 64.0:
        raise SystemExit("torch computes wrong numbers on this processor")
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu", "why": ""}
    if torch.version.cuda:
        found.update(try_cuda(torch))
    for module in ("transformers", "fastapi", "uvicorn", "gradio"):
        importlib.import_module(module)
    print(json.dumps(found))


def try_cuda(torch: Any) -> dict[str, str]:
    """A matrix product on the card and a copy from pinned memory; or why that did not work."""
    try:
        cuda = torch.device("cuda")
        pinned = torch.ones(64, 64, pin_memory=True)
        there = pinned.to(cuda, non_blocking=True)
        value = float((there @ there)[0, 0].cpu())
        name = torch.cuda.get_device_name(cuda)
    except (RuntimeError, AssertionError) as error:
        return {"why": str(error).splitlines()[0][:300]}
    if value != 64.0:
        return {"why": f"the card computed {value} instead of 64"}
    return {"device": name}


if __name__ == "__main__":
    main()
