"""Train the predictor of expert activation: `python -m assets.training.predictor_train`.

Learns from training chats read through the shipped model and from answers it generated itself;
reports on held-out chats, which nothing here learns from. Losses as in an independent replication
of LLaPor: focal outside, and what measured best elsewhere; `--help` lists what can be varied.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional

from assets.training.corpus import digest
from assets.training.evaluate import load
from assets.training.predictor_data import (
    Routing,
    answered_chats,
    held_out_chats,
    joined,
    read_chats,
    training_chats,
)
from assets.training.predictor_net import Network, Rows, Sizes, layer_groups, rows_of
from assets.training.predictor_publish import judged_slots, means, split, views_of, write

CHAT_SEED = 9001
VALIDATION_ROWS = 20_000
GENERATED_SHARE = 0.15
BATCH = 1024


def loss_of(scores: list[torch.Tensor], chosen: torch.Tensor, kinds: list[str]) -> torch.Tensor:
    """The sum over places of their loss; `kinds` names that of each place."""
    total = torch.zeros(())
    for place, (out, kind) in enumerate(zip(scores, kinds, strict=True)):
        wanted = torch.zeros_like(out).scatter_(2, chosen[:, place : place + out.shape[1]], 1.0)
        each = functional.binary_cross_entropy_with_logits(out, wanted, reduction="none")
        if kind.startswith("focal"):
            each = each * (1 - torch.exp(-each)) ** 2 * 3
        if kind.endswith("weighted"):
            share = wanted.mean(0, keepdim=True).clamp(min=1e-3)
            each = each * (wanted * (share.mean() / share).sqrt().clamp(max=3) + (1 - wanted))
        total = total + each.mean()
    return total


def train(
    network: Network,
    rows: Rows,
    kinds: list[str],
    epochs: int,
    rate: float,
    batch: int = BATCH,
) -> None:
    """Learn from `rows` for some epochs."""
    count = len(rows.tokens)
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for _ in range(epochs):
        order = torch.randperm(count)
        for begin in range(0, count - batch + 1, batch):
            picked = rows.pick(order[begin : begin + batch])
            loss = loss_of(network(picked, forgetting=True), picked.chosen, kinds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def routers_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Router weights (layers, experts, hidden) and the gains of the norms before them."""
    layers = model.model.layers
    routers = torch.stack([layer.mlp.gate.weight.detach() for layer in layers])
    gains = torch.stack([layer.post_attention_layernorm.weight.detach() for layer in layers])
    return routers, gains


def record(model, tokenizer, rows: int, cache: Path | None) -> tuple[Routing, Routing]:
    """Training rows and held-out rows; kept in `cache` between runs if given."""
    if cache is not None and cache.exists():
        kept = torch.load(cache, weights_only=True)
        return Routing(**kept["train"]), Routing(**kept["held_out"])
    generated = answered_chats(model, tokenizer, CHAT_SEED + 1)
    own = read_chats(model, tokenizer, generated, int(rows * GENERATED_SHARE))
    taught = read_chats(model, tokenizer, training_chats(CHAT_SEED), rows - len(own))
    train_rows = joined([own, taught])
    held_out = read_chats(model, tokenizer, held_out_chats(), 12_000)
    if cache is not None:
        torch.save({"train": vars(train_rows), "held_out": vars(held_out)}, cache)
    return train_rows, held_out


def main() -> None:
    """Record, train and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("assets/default_model"))
    parser.add_argument("--cache", type=Path, help="keep the recording here between runs")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--compressed", type=int, default=Sizes.compressed)
    parser.add_argument("--inner", type=int, default=Sizes.inner)
    parser.add_argument("--half-life", type=float, default=Sizes.half_life_tokens)
    parser.add_argument("--loss", nargs=4, default=["plain", "focal", "focal", "focal"])
    parser.add_argument("--no-middle", action="store_true", help="every head shallow")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the best one ships")
    parser.add_argument("--out", type=Path, help="write the files that ship into this folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    routers, gains = routers_of(model)
    data, held_out = record(model, tokenizer, args.rows, args.cache)
    top_k, experts = data.chosen.shape[2], routers.shape[1]
    groups, figures = layer_groups(data, experts)
    print(json.dumps({"groups": groups, "figures": figures}))
    if args.no_middle:
        groups = ["near input" for _ in groups]
    sizes = Sizes(args.compressed, args.inner, half_life_tokens=args.half_life)
    losses = dict(zip(("tokens", "near input", "middle", "near output"), args.loss, strict=True))
    kinds = [losses[name] for name in ("tokens", *groups)]
    learnt, kept = split(data.rows(0, args.rows), VALIDATION_ROWS)
    rows, validation, unseen = (
        rows_of(d, experts, args.half_life) for d in (learnt, kept, held_out)
    )
    views = views_of(routers, gains, top_k)
    embedding = model.get_input_embeddings().weight.detach()
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        network = Network(data, routers, gains, len(tokenizer), groups, sizes)
        began_s = time.perf_counter()
        train(network, rows, kinds, args.epochs, args.rate)
        heads = network.heads(top_k)
        judged = {
            name: judged_slots(heads, views, embedding, some)
            for name, some in (("validation", validation), ("held_out", unseen))
        }
        figures_of_run = {"seed": seed, **{name: means(slots) for name, slots in judged.items()}}
        figures_of_run["held_out_slots"] = [
            [s.layer, s.distance, round(s.shadow.learned.recall, 4)] for s in judged["held_out"]
        ]
        runs.append((means(judged["validation"])["learned"]["1"], seed, network, figures_of_run))
        print(f"{time.perf_counter() - began_s:.0f} s, {heads.bytes_per_token()} bytes per token")
        print(json.dumps(figures_of_run), flush=True)
    if args.out is not None:
        _, seed, network, _ = max(runs, key=lambda run: run[0])
        training = {
            "chat_seed": CHAT_SEED,
            "corpus": digest(),
            "tokens": len(learnt),
            "generated_share": GENERATED_SHARE,
            "epochs": args.epochs,
            "groups": groups,
            "group_statistics": figures,
            "losses": dict(zip(("tokens", *groups), kinds, strict=False)),
            "seed": seed,
            "seeds": [run[3] for run in runs],
        }
        write(args.out, network, views, embedding, validation, unseen, training)


if __name__ == "__main__":
    main()
