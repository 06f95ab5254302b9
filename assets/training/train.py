"""Train the built-in model: `python -m assets.training.train --work FOLDER`.

Runs the phases of `recipe.py` one after another. Schedules count tokens, never time, and a
snapshot holds everything, so a run that was interrupted goes on exactly as it would have.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, Qwen3MoeForCausalLM

from assets.training.corpus import digest
from assets.training.model import BalanceControl, build_model, learning_rate
from assets.training.optimizer import build_optimizers
from assets.training.recipe import PHASES, Phase
from assets.training.tokens import MAX_TOKENS, Batch, build_tokenizer, load_tokenizer, pool_batches

MODEL_SEED = 11


class Run:
    """A model under training with its optimizers, balance and position in the recipe."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "tokenizer" / "tokenizer.json").exists():
            build_tokenizer().save_pretrained(work / "tokenizer")
        self.tokenizer = load_tokenizer(work / "tokenizer")
        self.model = build_model(self.tokenizer, MODEL_SEED)
        config = self.model.config
        self.balance = BalanceControl(
            config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
        )
        self.optimizers = build_optimizers(self.model, PHASES[0].peak_rate)
        self.phase, self.pool, self.tokens, self.step, self.wall_s = 0, 0, 0, 0, 0.0

    def save(self, name: str) -> None:
        """Write a snapshot to go on from; the file appears only when it is complete."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "shares": self.balance.shares,
            "position": (self.phase, self.pool, self.tokens, self.step, self.wall_s),
        }
        partial = self.work / f"{name}.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / f"{name}.pt")

    def load(self, path: Path) -> None:
        """Go on from a snapshot."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.balance.shares.copy_(state["shares"])
        self.phase, self.pool, self.tokens, self.step, self.wall_s = state["position"]

    def learn(self, batch: Batch, rate: float) -> float:
        """One step; returns the loss on assistant tokens."""
        output = self.model.model(
            input_ids=batch.tokens[:, :-1], use_cache=False, output_router_logits=True
        )
        weights = batch.weights[:, 1:]
        wanted = weights > 0
        logits = self.model.lm_head(output.last_hidden_state[wanted])
        each = functional.cross_entropy(logits, batch.tokens[:, 1:][wanted], reduction="none")
        weight = weights[wanted]
        answers = weight == 1.0
        loss = (each * weight).sum() / answers.sum().clamp(min=1)
        total = loss + self.balance.loss(output.router_logits, batch.real[:, :-1])
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return float(each.detach()[answers].mean())

    def run_phase(self, phase: Phase, snapshot_every: int, stop_at: int | None) -> bool:
        """Train to the end of a phase; False when stopped before it."""
        if self.tokens >= phase.tokens:
            return True
        if digest() != phase.corpus:
            raise SystemExit(
                f"Phase {phase.name} was made with corpus edition {phase.corpus}, this is "
                f"{digest()}. Run it from the commit that names its edition in recipe.py first."
            )
        self.model.train()
        losses: list[float] = []
        next_snapshot = (self.tokens // snapshot_every + 1) * snapshot_every
        while self.tokens < phase.tokens:
            started = time.perf_counter()
            for batch in pool_batches(
                self.tokenizer,
                phase.seed,
                self.pool,
                phase.batch_tokens,
                phase.user_weight,
                phase.copy_share,
            ):
                progress = min(1.0, self.tokens / (phase.schedule_tokens or phase.tokens))
                rate = learning_rate(
                    progress, self.step, phase.warmup_steps, phase.peak_rate, phase.decay_from
                )
                losses.append(self.learn(batch, rate))
                self.tokens += batch.token_count
                self.step += 1
            self.pool += 1
            self.wall_s += time.perf_counter() - started
            print(
                f"{phase.name} pool {self.pool} step {self.step} tokens {self.tokens / 1e6:.3f}M "
                f"wall {self.wall_s:.0f}s loss {sum(losses) / len(losses):.4f} rate {rate:.5f} "
                f"effective experts {self.balance.describe()}",
                flush=True,
            )
            losses.clear()
            if self.tokens >= next_snapshot:
                self.save("latest")
                self.save(f"{phase.name}-{self.tokens // 100_000:04d}")
                next_snapshot += snapshot_every
            if stop_at is not None and self.tokens >= stop_at:
                return False
        return True


def export(model: Qwen3MoeForCausalLM, tokenizer, folder: Path) -> None:
    """Write the model as bf16 in plain Hugging Face files that any loader understands."""
    folder.mkdir(parents=True, exist_ok=True)
    half = Qwen3MoeForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "model_max_length": MAX_TOKENS,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Parse flags and run the recipe from where it stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for snapshots and log")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--snapshot-every", type=int, default=1_000_000, metavar="TOKENS")
    parser.add_argument("--stop-at", type=int, metavar="TOKENS", help="stop early (for trials)")
    parser.add_argument("--export", type=Path, help="write the finished model here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.work)
    if (args.work / "latest.pt").exists():
        run.load(args.work / "latest.pt")
    while run.phase < len(PHASES):
        phase = PHASES[run.phase]
        if not run.run_phase(phase, args.snapshot_every, args.stop_at):
            return
        run.save(f"{phase.name}-end")
        run.phase, run.pool, run.tokens, run.step = run.phase + 1, 0, 0, 0
        run.save("latest")
    if args.export:
        export(run.model, run.tokenizer, args.export)
    print(json.dumps({"phases": len(PHASES), "wall_s": round(run.wall_s)}))


if __name__ == "__main__":
    main()
