"""What keeps the experts of a mixture in use: the router's balance loss and its z-loss.

Balance (Fedus et al. 2021, arXiv:2101.03961, equations 4-6, summed over layers as transformers does):
E * sum_e f_e P_e, where f_e is the share of the real tokens of the whole optimiser step that are sent to
expert e and P_e the mean probability it is given. f_e is a count without gradient, of the step and not of the
micro-batch: so the cut into micro-batches changes nothing. z-loss (Zoph et al. 2022, arXiv:2202.08906,
equation 5): the mean of logsumexp(logits)^2. Padding takes no part. Who catches the logits is `models/routers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.batch import PADDING, Batch
from luthier.errors import Refused
from luthier.models.routers import router_facts, watch_routers

Join = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class RouterLoss:
    """`balance` and `z`: weights of the two losses. `top_k`: experts that a token is sent to. `num_routers`: of the
    whole model, of which a pipeline stage has some. `join` makes logits of a rank's own tokens those of its batch."""

    top_k: int
    balance: float
    z: float = 0.0
    num_routers: int | None = None
    join: Join | None = None

    def shares(self, logits: Sequence[Tensor], batch: Batch) -> Tensor:
        """How many of the batch's real tokens are sent to each expert, over all layers [E], float64."""
        real = _real(batch)
        width = logits[0].shape[-1] if logits else 0
        counts = torch.zeros(width, dtype=torch.float64, device=real.device)
        for layer in self._whole(logits, batch):
            chosen = layer[real].topk(self.top_k, dim=-1).indices.flatten()
            counts += torch.bincount(chosen, minlength=len(counts))
        return counts

    def loss(
        self, logits: Sequence[Tensor], batch: Batch, shares: Tensor, num_tokens: int
    ) -> Tensor:
        """The batch's part of the step's loss, a scalar. `logits`: of each layer [B*S, E]; `shares` [E] and
        `num_tokens`, the real ones, are those of the whole step."""
        real, rows = _real(batch), num_tokens * (self.num_routers or len(logits))
        if not logits:
            return torch.zeros((), device=real.device)
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        used = (shares / rows).to(wide)
        total = torch.zeros((), dtype=wide, device=real.device)
        for layer in self._whole(logits, batch):
            scores = layer[real].to(wide)  # [n, E]
            if self.balance:
                given = torch.softmax(scores, dim=-1).sum(0)  # [E]
                total = total + self.balance * len(used) * (used * given).sum()
            if self.z:
                total = total + self.z * torch.logsumexp(scores, dim=-1).square().sum()
        return total / rows

    def _whole(self, logits: Sequence[Tensor], batch: Batch) -> Sequence[Tensor]:
        return logits if self.join is None else [self.join(layer, batch) for layer in logits]


def router_loss(
    model: PreTrainedModel,
    asked: float | None,
    over_stages: Callable[[int], float] = float,
    join: Join | None = None,
) -> RouterLoss | None:
    """The loss of the model's routers, hooked; `asked` replaces the checkpoint's weight of the balance.

    `over_stages` adds up a number over the pipeline stages that have parts of the model. None where its weights are 0. Refused when it is asked of a model without such routers.
    """
    facts = router_facts(model.config)
    if facts is None and asked:
        raise Refused(
            f"train.router_loss={asked}",
            f"the family '{model.config.model_type}' has no router that is trained to balance its experts",
            "leave it out",
        )
    if facts is not None and asked is not None:
        facts["balance"] = asked
    if facts is None or not (facts["balance"] or facts["z"]):
        return None
    number = int(over_stages(watch_routers(model)))
    return RouterLoss(**facts, num_routers=number, join=join) if number else None


def _real(batch: Batch) -> Tensor:
    """[B*S] bool: tokens that are no padding."""
    return batch.document_ids.flatten() != PADDING
