"""Write the shipped folder: `python -m assets.training.publish --snapshot FILE --out FOLDER`.

Exports the weights, then evaluates and measures the exported files themselves, and writes
what came out to `report.json` and the model card. Nothing in either is typed by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch

from assets.training import evaluate, routing
from assets.training.recipe import PHASES
from assets.training.train import MODEL_SEED, Run, export

WEIGHTS = "model.safetensors"


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def phases_of(run: Run) -> list[dict]:
    """The stretches of training behind a snapshot, with what each one really saw."""
    rows = []
    for index, phase in enumerate(PHASES[: run.phase + 1]):
        tokens = phase.tokens if index < run.phase else run.tokens
        if tokens:
            rows.append(
                {
                    "name": phase.name,
                    "seed": phase.seed,
                    "tokens": tokens,
                    "planned_tokens": phase.tokens,
                    "corpus": phase.corpus,
                }
            )
    return rows


def build_report(folder: Path, run: Run, per_class: int) -> dict:
    """Evaluate and measure an exported folder."""
    model, tokenizer = evaluate.load(folder)
    outcomes = evaluate.ask_all(model, tokenizer, evaluate.questions(per_class))
    scores = evaluate.score(outcomes)
    for group, row in scores["classes"].items():
        row["outcomes"] = "".join(str(int(o.right)) for o in outcomes if o.group == group)
    probes = evaluate.ask_probes(model, tokenizer)
    return {
        "weights": {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            "model_seed": MODEL_SEED,
            "phases": phases_of(run),
            "tokens": sum(row["tokens"] for row in phases_of(run)),
            "wall_s": round(run.wall_s),
        },
        "evaluation": {
            "seed": evaluate.EVALUATION_SEED,
            "per_class": per_class,
            "decoding": "greedy, fp32 on the CPU",
            **scores,
            "probes": {"right": sum(fits for *_, fits in probes), "asked": len(probes)},
        },
        "routing": routing.measure(routing.record(model, tokenizer), model.config.num_experts),
    }


def model_card(report: dict) -> str:
    """The model card, written from the report."""
    scores, measured = report["evaluation"], report["routing"]
    rows = "\n".join(
        f"| {group} | {row['right']} of {row['asked']} | {row['right'] / row['asked']:.0%} |"
        for group, row in scores["classes"].items()
    )
    layers = "\n".join(
        f"| {row['layer']} | {row['effective_experts']} | {row['reuse_previous_token']} "
        f"| {row['lru_hit_rate_quarter']} | {row['smallest_share']} |"
        for row in measured["layers"]
    )
    return f"""# The built-in model of PreScope

A Qwen3-MoE of {report["parameters"] / 1e6:.1f} million parameters that the project trained itself,
from nothing, on chats its own program writes (`assets/training`). It is there so that the app
can be tried at once, without a download, with routers that really learnt something.

It explains the app and its panel, adds, subtracts and multiplies with written steps, converts
units, counts, compares, sorts short lists, remembers facts within a chat, and makes up little
stories. It knows nothing else, makes mistakes, and says so. Use it with temperature 0.

## Held-out questions

{scores["right"]} of {scores["asked"]} distinct questions ({scores["exact"]:.1%}) were answered
letter by letter as they should be (stories: mention what was asked for, and end). A hash of the
question's numbers, values or phrasing keeps these out of training; a held-out product of two
digits may still occur as a step of a longer sum. Of handwritten chats in other
words than the corpus uses, {scores["probes"]["right"]} of {scores["probes"]["asked"]} went well.

| class | right | share |
|---|---|---|
{rows}

## Routing on held-out chats

{measured["top_k"]} of {measured["experts"]} experts per token. Reuse is the share of a token's
experts that the previous token used too. The mean is
{measured["mean_reuse_previous_token"]:.3f}, {measured["mean_reuse_over_chance"]:.1f} times chance.

| layer | effective experts | reuse | LRU hit rate, a quarter of the experts | smallest share |
|---|---|---|---|---|
{layers}

## Made with

{report["training"]["tokens"]:,} tokens, {report["training"]["wall_s"] / 60:.0f} minutes on one
CPU thread. Seeds, phases, corpus editions and the sha256 of the weights are in `report.json`;
`assets/training/recipe.py` is the recipe.
"""


def main() -> None:
    """Export a snapshot, judge it, write it all down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=evaluate.PER_CLASS)
    parser.add_argument("--export-only", action="store_true", help="write the model, judge nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(args.snapshot.parent)
    run.load(args.snapshot)
    export(run.model, run.tokenizer, args.out)
    if args.export_only:
        return
    report = build_report(args.out, run, args.per_class)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "MODEL_CARD.md").write_text(model_card(report), encoding="utf-8")
    print(json.dumps(report["evaluation"] | {"routing": report["routing"]}, indent=1))


if __name__ == "__main__":
    main()
