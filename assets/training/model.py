"""The shape of the built-in model, and the balance of its routers."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from assets.training.tokens import MAX_TOKENS

TARGET_SPREAD = 0.72
"""Effective experts per layer that training steers to, as a share of all experts."""

STARVING_SHARE = 0.15
"""An expert used less than this share of an even load gets an extra pull, so that none dies."""


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """A Qwen3-MoE of about eight million parameters."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.03,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        router_aux_loss_coef=0.001,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """A fresh model in fp32."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(build_config(tokenizer))
    model.set_experts_implementation("grouped_mm")
    return model


def spread(shares: torch.Tensor) -> torch.Tensor:
    """Effective number of experts, 2^entropy, of shares along the last dimension."""
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.exp2(-(shares * (shares + 1e-12).log2()).sum(-1))


class BalanceControl:
    """One small balance loss per layer, pushing either way towards the wanted spread.

    Too strong a balance loss makes routing uniform and no cache can help; none at all may
    let experts die. The coefficient follows the distance of a layer's running spread from
    the target, so a layer inside the band is hardly touched.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.experts, self.top_k = experts, top_k
        self.shares = torch.full((layers, experts), 1.0 / experts)

    def loss(self, router_logits: tuple[torch.Tensor, ...], real: torch.Tensor) -> torch.Tensor:
        """The weighted balance loss of one batch; also moves the running shares."""
        total = torch.zeros(())
        effective = spread(self.shares) / self.experts
        for layer, logits in enumerate(router_logits):
            chances = logits.float()[real.flatten()].softmax(-1)
            chosen = chances.topk(self.top_k, -1).indices.flatten()
            used = torch.bincount(chosen, minlength=self.experts) / len(chosen)
            self.shares[layer].mul_(0.98).add_(used, alpha=0.02)
            push = 0.03 * (TARGET_SPREAD - float(effective[layer]))
            push = min(max(push, -0.004), 0.01)
            # The running shares set the strength: one batch alone is chats of one length.
            mean = chances.mean(0)
            total = total + push * self.experts * (used * mean).sum()
            starving = self.shares[layer] < STARVING_SHARE / self.experts
            total = total - 0.01 * mean[starving].log().sum() / self.experts
        return total

    def describe(self) -> str:
        """Effective experts of each layer, for the log."""
        return " ".join(f"{value:.1f}" for value in spread(self.shares).tolist())


def learning_rate(progress: float, step: int, warmup: int, peak: float, decay_from: float) -> float:
    """Warm up by steps, hold, then fall in a straight line to a fiftieth."""
    rate = peak * min(1.0, (step + 1) / warmup)
    if progress > decay_from:
        rate *= max(0.02, 1 - (progress - decay_from) / (1 - decay_from))
    return rate
