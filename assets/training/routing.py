"""How the trained routers behave: what a cache and a predictor have to work with.

Measured on held-out chats read token by token: how evenly experts are used, how often a
token needs an expert the previous token used, and how an LRU cache would do.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from pathlib import Path

import torch

from assets.training.corpus import CLASSES, evaluation_item
from assets.training.evaluate import load, messages
from assets.training.model import spread
from assets.training.tokens import render

ROUTING_SEED = 77
TOKENS = 12_000


@torch.no_grad()
def record(model, tokenizer, tokens: int = TOKENS, seed: int = ROUTING_SEED) -> list[torch.Tensor]:
    """Chosen experts of held-out chats: one tensor [layers, tokens, top_k] per chat."""
    rng = random.Random(seed)
    tasks = [task for group in CLASSES.values() for task in group]
    chats, seen = [], 0
    while seen < tokens:
        turns = []
        for _ in range(rng.randint(1, 3)):
            item = evaluation_item(rng, tasks[rng.randrange(len(tasks))])
            turns += [(m["role"], m["content"]) for m in messages(item)]
            turns.append(("assistant", item.answer))
        ids = tokenizer(render(turns), return_tensors="pt").input_ids[:, :1000]
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        top_k = model.config.num_experts_per_tok
        chats.append(
            torch.stack([logits.topk(top_k, -1).indices for logits in output.router_logits])
        )
        seen += ids.shape[1]
    return chats


def lru_hit_rate(chosen: list[list[int]], slots: int) -> float:
    """Share of uses an LRU cache of one layer would have served."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = uses = 0
    for experts in chosen:
        for expert in experts:
            uses += 1
            if expert in cache:
                hits += 1
                cache.move_to_end(expert)
            else:
                cache[expert] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
    return hits / uses


def measure(chats: list[torch.Tensor], experts: int) -> dict:
    """Per layer: effective experts, smallest share, reuse of the previous token's experts, LRU."""
    layers, _, top_k = chats[0].shape
    rows = []
    for layer in range(layers):
        hot = [torch.zeros(chat.shape[1], experts).scatter_(1, chat[layer], 1.0) for chat in chats]
        shares = torch.cat(hot).mean(0) / top_k
        reuse = torch.cat([(h[1:] * h[:-1]).sum(1) / top_k for h in hot]).mean()
        stream = [token for chat in chats for token in chat[layer].tolist()]
        rows.append(
            {
                "layer": layer,
                "effective_experts": round(float(spread(shares)), 2),
                "smallest_share": round(float(shares.min()), 5),
                "largest_share": round(float(shares.max()), 4),
                "reuse_previous_token": round(float(reuse), 4),
                "lru_hit_rate_quarter": round(lru_hit_rate(stream, experts // 4), 4),
                "lru_hit_rate_half": round(lru_hit_rate(stream, experts // 2), 4),
            }
        )
    reuse = sum(row["reuse_previous_token"] for row in rows) / layers
    return {
        "experts": experts,
        "top_k": top_k,
        "tokens": sum(chat.shape[1] for chat in chats),
        "mean_reuse_previous_token": round(reuse, 4),
        "mean_reuse_over_chance": round(reuse / (top_k / experts), 3),
        "layers": rows,
    }


def main() -> None:
    """Measure a folder and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    print(json.dumps(measure(record(model, tokenizer), model.config.num_experts), indent=1))


if __name__ == "__main__":
    main()
