"""AdamW with one second moment per block of parameters instead of one per parameter.

After Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (arXiv 2406.16793, algorithm 1 and
its partition for transformers): a block is a head of the query or key projection, an output row of any
other matrix, a token's row of the embedding or output head, or a whole vector. Which tensor has how many
blocks is said by `optim.py`. The step is AdamW's, with bias correction and decoupled decay, and with
the first moment that already contains this step's gradient. State is tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class AdamWMini(Optimizer):
    """AdamW whose second moment is averaged over each of `blocks[p]` equal slices of dim 0 of p."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        blocks: Mapping[Parameter, int],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.blocks = dict(blocks)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["block_avg_sq"] = p.new_zeros(self.blocks[p], dtype=_wide(p))
                state["step"] += 1
                step = int(state["step"])
                mean, square = state["exp_avg"], state["block_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                rows = p.grad.reshape(len(square), -1).to(square.dtype)  # [blocks, block size]
                square.lerp_(rows.square().mean(1), 1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                rate = group["lr"] / (1 - beta1**step) / root  # [blocks]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = mean.reshape(len(square), -1) * rate[:, None]
                p.sub_(update.reshape(p.shape).to(p.dtype))


def _wide(p: Tensor) -> torch.dtype:
    """Moments of few values cost nothing in full precision."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
