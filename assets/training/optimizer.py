"""Muon for the matrices, expert stacks included, and AdamW for everything else."""

from __future__ import annotations

import torch

_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
)
"""Coefficients of an odd polynomial per step; each step pulls the singular values closer to one."""


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Push all singular values of each matrix in a stack close to one."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the update has the size AdamW's would have."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                moving = state["momentum"]
                moving.lerp_(param.grad, 1 - group["momentum"])
                ahead = param.grad.lerp(moving, group["momentum"])
                rows, columns = param.shape[-2:]
                if param.ndim == 3 and rows < columns:
                    # gate and up lie on top of each other in one stack
                    update = orthogonalize(ahead.unflatten(1, (2, rows // 2))).flatten(1, 2)
                    rows //= 2
                else:
                    update = orthogonalize(ahead)
                scale = 0.2 * max(rows, columns) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Matrices of attention and experts to Muon; embeddings, routers and norms to AdamW."""
    matrices, plain, small = [], [], []
    for name, param in model.named_parameters():
        if param.ndim < 2:
            small.append(param)
        elif "embed" not in name and "mlp.gate.weight" not in name:
            matrices.append(param)
        else:
            plain.append(param)
    groups = [
        {"params": plain, "weight_decay": 0.05},
        {"params": small, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    return [adam, Muon(matrices, rate)]
