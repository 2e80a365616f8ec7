"""What the first step of a run must show: that what is to be trained is trained."""

import pytest
import torch
from small_run import Changed, everything, same, small_run

from luthier.batch import IGNORE, Batch
from luthier.errors import Failed
from luthier.train.gates import check_first_gradients
from luthier.train.loop import Trainer


def test_the_gate_runs_once_before_the_first_update_and_can_stop_the_run(tmp_path):
    trainer = small_run(tmp_path / "a", steps=3, evaluate_every="never")
    before, calls = everything(trainer), []

    def gate(*, gradients, step, zeros) -> None:
        nonzero = all(g.any() for g in gradients.values())
        calls.append((step, zeros, nonzero and same(before, everything(trainer))))

    trainer.updater.gate = gate
    trainer.fit()
    assert calls == [(1, True, True)] and trainer.updater.gated

    trainer = small_run(tmp_path / "b", steps=3, evaluate_every="never")

    def refuse(**_) -> None:
        raise Failed("checking the gradients")

    trainer.updater.gate = refuse
    with pytest.raises(Failed, match="checking the gradients"):
        trainer.fit()
    assert same(before, everything(trainer)) and not trainer.updater.gated


def two_tokens(batch: Batch) -> Batch:
    """The first two tokens of each row, as a document."""
    return Batch(
        batch.input_ids[:, :2],
        torch.stack([batch.input_ids[:, 1], torch.full_like(batch.input_ids[:, 1], IGNORE)], dim=1),
        batch.position_ids[:, :2],
        torch.zeros_like(batch.document_ids[:, :2]),
        batch.rows,
    )


@pytest.mark.parametrize("method", ["none", "lora"])
def test_documents_of_two_tokens_do_not_stop_a_run(tmp_path, method):
    """Query and key get no gradient from them; the gate waits for a step that tells, and is real there."""

    def gated(folder: str, faulty: bool) -> Trainer:
        # a run of three steps may begin with a step of two-token documents only
        data = Changed(lambda at, batch: batch if at == 1 else two_tokens(batch))
        trainer = small_run(
            tmp_path / folder, steps=3, evaluate_every="never", method=method, data=data
        )
        model = trainer.updater.stage.model
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        query = next(n for n in names if "q_proj" in n and "lora_A" not in n)
        calls = []

        def gate(*, gradients, step, zeros) -> None:
            calls.append((step, zeros))
            if step == 1:
                assert not gradients[query].any()
            if faulty:
                gradients = {**gradients, query: torch.zeros_like(gradients[query])}
            at_zero = [n for n in names if "lora_A" in n]
            check_first_gradients(
                model, names, at_zero, gradients=gradients, step=step, zeros=zeros
            )

        trainer.updater.gate = gate
        trainer.calls = calls  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    trainer = gated("right", faulty=False)
    trainer.fit()
    assert trainer.calls == [(1, False), (2, True)]  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.updater.gated
    trainer = gated("wrong", faulty=True)
    with pytest.raises(
        Failed, match=r"gradients of step 2\. trained but its gradient is zero.*q_proj"
    ):
        trainer.fit()
    assert not trainer.updater.gated


def test_a_loss_that_depends_on_nothing_trained_stops_the_run(tmp_path):
    trainer = small_run(tmp_path, method="lora", steps=2, evaluate_every="never")
    for name, module in trainer.updater.stage.model.named_modules():
        if name.endswith("_proj"):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module.__dict__.pop("forward", None)
    with pytest.raises(Failed, match="the loss does not depend on any trained tensor"):
        trainer.fit()
