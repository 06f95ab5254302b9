"""The same model as transformers alone would run it, to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load_reference(
    folder: Path, dtype: torch.dtype | None, experts_implementation: str | None = None
) -> Any:
    """Return the model with all its weights in memory and nothing of ours in it.

    `dtype` None takes that of the files, `experts_implementation` None transformers' own choice.
    Only for folders that can be trusted: nothing is checked here.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        experts_implementation=experts_implementation,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model.eval()


def generate_greedy(model: Any, prompt_ids: list[int], new_tokens: int) -> list[int]:
    """Return what transformers' `generate` adds to the prompt, exactly `new_tokens` of them."""
    ids = torch.tensor([prompt_ids], device=model.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    added: list[int] = made[0, len(prompt_ids) :].tolist()
    return added
