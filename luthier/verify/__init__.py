"""`luthier verify CHECK run.yaml`: what a user can prove on their own model and data before a run.

`data`: every row trains exactly its answers, after the prompts that prediction gives. `packing`: documents
of a row do not see each other and compute what each computes alone. `loss`: the trainer's loss and
gradients are those of plain transformers, however rows are packed and cut into micro-batches. `layout`: a
step in several processes is that step in one. `resume`: a run that is killed goes on as if it had not been. Each check
prints figures, writes nothing, and raises Failed when it does not hold. Imported without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.configfile import Resolved

Check = Callable[..., dict[str, Any]]  # of a config and, for `resume`, a number of processes


def _data(resolved: Resolved) -> dict[str, Any]:
    from luthier.verify.data import verify_data

    return verify_data(resolved)


def _packing(resolved: Resolved) -> dict[str, Any]:
    from luthier.verify.packing import verify_packing

    return verify_packing(resolved)


def _loss(resolved: Resolved) -> dict[str, Any]:
    from luthier.verify.loss import verify_loss

    return verify_loss(resolved)


def _layout(resolved: Resolved) -> dict[str, Any]:
    from luthier.verify.layout import verify_layout

    return verify_layout(resolved)


def _resume(resolved: Resolved, processes: int = 1) -> dict[str, Any]:
    from luthier.verify.resume import verify_resume

    return verify_resume(resolved, processes=processes)


CHECKS: dict[str, Check] = {
    "data": _data,
    "packing": _packing,
    "loss": _loss,
    "layout": _layout,
    "resume": _resume,
}
