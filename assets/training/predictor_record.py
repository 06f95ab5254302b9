"""Write what the simulator and `bench predictor` replay: a trace of real generation, and chats.

`python -m assets.training.predictor_record --out assets/traces` lets the default model answer
held-out questions greedily and records every pass with the shipped predictor's guesses.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from assets.training.corpus import CLASSES, evaluation_item
from assets.training.evaluate import messages
from runtime.adapter import attach
from runtime.adapter_cache import KvCache
from runtime.adapter_routers import survey_routers
from runtime.loader import LoadedModel, load_model
from runtime.predictor_open import LearningPredictor
from runtime.recorder import Recorder, computing_in_place
from runtime.trace import save_trace

TRACE_SEED = 31
CHATS_SEED = 78
DECODE_PASSES = 600
MAX_NEW_TOKENS = 60
CHATS = 150


def held_out_questions(seed: int, count: int) -> list[list[dict[str, str]]]:
    """Held-out chats of one question each, the right answer last, every class in turn."""
    rng = random.Random(seed)
    groups = list(CLASSES.values())
    chats = []
    for number in range(count):
        tasks = groups[number % len(groups)]
        item = evaluation_item(rng, rng.choice(tasks))
        chats.append([*messages(item), {"role": "assistant", "content": item.answer}])
    return chats


def open_model(folder: Path) -> LoadedModel:
    """The default model in float32 with its experts in host memory."""
    return load_model(
        folder,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda step: None,
        cancelled=lambda: False,
    )


def record_decode(opened: LoadedModel, recorder: Recorder, passes: int) -> None:
    """Answer held-out questions until so many decode passes are recorded."""
    tokenizer = opened.tokenizer
    questions = held_out_questions(TRACE_SEED, passes)
    attach(opened.layers, computing_in_place(opened.layers, opened.store, recorder.launch))
    decoded = 0
    for chat in questions:
        prompt = tokenizer.apply_chat_template(
            chat[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        cache, ids, new = KvCache(opened.model.config), list(prompt), 0
        while True:
            with torch.inference_mode():
                tokens = torch.tensor(ids)
                recorder.begin_pass(tokens)
                out = opened.model(
                    input_ids=tokens[None], past_key_values=cache.past, use_cache=True
                )
            cache.past = out.past_key_values
            ids = [int(out.logits[0, -1].argmax())]
            if ids[0] in opened.eos_token_ids or new == MAX_NEW_TOKENS:
                break
            new += 1
        decoded += new
        if decoded >= passes:
            return


def main() -> None:
    """Record and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("assets/default_model"))
    parser.add_argument("--out", type=Path, default=Path("assets/traces"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(args.model)
    survey = survey_routers(opened.model, opened.layers)
    predictor = LearningPredictor(survey.views, survey.embedding, torch.float32, args.model, None)
    recorder = Recorder(predictor)
    record_decode(opened, recorder, DECODE_PASSES)
    origin = f"default model, greedy answers to held-out questions, seed {TRACE_SEED}"
    trace = recorder.trace([layer.experts for layer in opened.layers], origin)
    args.out.mkdir(parents=True, exist_ok=True)
    save_trace(args.out / "default_decode.jsonl.gz", trace)
    chats = held_out_questions(CHATS_SEED, CHATS)
    lines = ",\n".join(json.dumps(chat) for chat in chats)
    (args.out / "default_chats.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    opened.store.close()
    print(f"{len(trace.passes)} passes, {len(chats)} chats")


if __name__ == "__main__":
    main()
