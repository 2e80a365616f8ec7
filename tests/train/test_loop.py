"""The loop: accumulation, skipped and broken steps, triggers, the best, signals, errors."""

import dataclasses

import pytest
import torch
from small_run import BATCH, Changed, Rows, everything, fit, rows_of, same, small_run

from luthier.batch import IGNORE, Batch
from luthier.errors import Failed
from luthier.files import damage
from luthier.models.stage import Stage
from luthier.train.master import LossScaler, MasterWeights
from luthier.train.metrics import StepReport, read_metrics
from luthier.train.plan import Pace, Plan
from luthier.train.step import Updater

CUTS = {"1 x 8": 8, "2 x 4": 4, "8 x 1": 1}
DOCUMENTS = [[5, 3], [8], [2, 6], [4, 4], [7], [3, 3, 2], [6], [8]]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def gradients(model, micro_batches) -> tuple[StepReport, dict[str, torch.Tensor]]:
    """One step, and its gradients as they were before the update."""
    seen = {}
    master = MasterWeights(list(model.named_parameters()), "float32")
    updater = Updater(
        stage=Stage(model),
        master=master,
        optimizer=torch.optim.SGD([{"params": master.parameters, "lr_scale": 1.0}], 0.1),
        clip=0.0,
        gate=lambda *, gradients, **_: seen.update(
            {n: g.clone() for n, g in gradients.items() if g is not None}
        ),
    )
    return updater.update(micro_batches, step=1, lr=0.1), seen


def one_document_a_row(batch: Batch) -> Batch:
    """The same documents, each in a row of its own behind padding."""
    parts = [(r, batch.document_ids[r] == d) for r in range(len(batch.rows)) for d in range(3)]
    parts = [(r, at) for r, at in parts if at.any()]
    made = {}
    empty = {"labels": IGNORE, "document_ids": -1, "input_ids": 0, "position_ids": 0}
    for name, value in empty.items():
        rows = torch.full((len(parts), 8), value)
        for i, (r, at) in enumerate(parts):
            found = getattr(batch, name)[r][at]
            rows[i, : len(found)] = 0 if name == "document_ids" else found
        made[name] = rows
    return Batch(**made, rows=tuple(range(len(parts))))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["2 x 4", "8 x 1", "one document a row", "3 documents a batch"])
def test_any_cut_of_a_step_gives_the_same_loss_and_gradients(tiny_model, random_batch, kind, dtype):
    whole = random_batch(lengths_per_row=DOCUMENTS, seed=3)
    # so that the micro-batches hold different numbers of supervised tokens
    whole.labels[:3] = torch.where(torch.arange(8) < 6, IGNORE, whole.labels[:3])
    if kind in CUTS:
        parts = [
            rows_of(whole, list(range(i, i + CUTS[kind])), [0] * CUTS[kind])
            for i in range(0, 8, CUTS[kind])
        ]
    else:
        alone = one_document_a_row(whole)
        n = len(alone.rows) if kind == "one document a row" else 3
        parts = [
            rows_of(
                alone,
                list(range(len(alone.rows)))[i : i + n],
                list(range(len(alone.rows)))[i : i + n],
            )
            for i in range(0, len(alone.rows), n)
        ]
    report, expected = gradients(tiny_model("llama", dtype), [whole])
    other, found = gradients(tiny_model("llama", dtype), parts)
    assert other.num_supervised == report.num_supervised > 0
    assert other.num_tokens == report.num_tokens == sum(map(sum, DOCUMENTS))
    assert abs(other.loss - report.loss) <= TOLERANCE[dtype] * report.loss
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= TOLERANCE[dtype], (name, float(error))


def test_the_loss_is_the_mean_over_the_tokens_of_the_whole_step(tiny_model, random_batch):
    model = tiny_model("llama")
    batch = random_batch(lengths_per_row=[[6], [6]], seed=1)
    batch.labels[0, 1:] = IGNORE  # one supervised token against several
    logits = model(input_ids=batch.input_ids).logits.detach()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
    )
    report, _ = gradients(model, [rows_of(batch, [0], [0]), rows_of(batch, [1], [1])])
    expected = float(losses.sum() / (batch.labels != IGNORE).sum())
    assert report.loss == pytest.approx(expected, rel=1e-5)


def test_a_step_without_supervised_tokens_updates_nothing_and_is_reported(tmp_path):
    def change(index: int, batch: Batch) -> Batch:
        if index not in (1, 2):
            return batch
        return dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE))

    trainer = small_run(tmp_path, data=Changed(change), steps=2, evaluate_every="never")
    before = []
    schedule = trainer.schedule

    def remember(step):
        before.append(everything(trainer))
        return schedule(step)

    trainer.schedule = remember
    result = trainer.fit()
    assert result.step == 2 and result.loss is None
    assert same(before[1], everything(trainer))
    assert not same(before[0], before[1])
    records = read_metrics(tmp_path / "metrics.jsonl")
    logged = [r for r in records if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in logged] == [0, 1]
    assert logged[1]["loss"] is None
    remarks = [r["text"] for r in records if r["kind"] == "remark"]
    assert any("step 2 has no supervised token" in text for text in remarks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_stops_before_any_update_and_names_the_row_and_the_weight(tmp_path, dtype):
    """A token that only row 3 of the run holds, whose embedding is NaN."""
    data = Rows()
    data.all.input_ids[data.order(0)[3], 0] = 319
    trainer = small_run(tmp_path, data=data, evaluate_every="never", dtype=dtype)
    with torch.no_grad():
        trainer.updater.stage.model.get_parameter("model.embed_tokens.weight")[319] = torch.nan
    before = everything(trainer)
    with pytest.raises(Failed, match=r"step 1 over rows 3\. .*embed_tokens"):
        trainer.fit()
    after = everything(trainer)
    assert all(torch.equal(t.nan_to_num(), after[n].nan_to_num()) for n, t in before.items())
    assert not (tmp_path / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_its_parameter(tmp_path):
    trainer = small_run(tmp_path, evaluate_every="never")
    before = everything(trainer)
    norm = trainer.updater.stage.model.get_parameter("model.norm.weight")
    norm.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(Failed, match=r"step 1 over rows 0, 1, 2, 3\. .*gradient of model.norm"):
        trainer.fit()
    assert same(before, everything(trainer))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """NaN that no loss shows, in a token that never occurs."""
    trainer = small_run(tmp_path, steps=2, every=2, evaluate_every="never")
    with torch.no_grad():
        trainer.updater.stage.model.get_parameter("model.embed_tokens.weight")[1] = torch.inf
    with pytest.raises(Failed, match=r"saving step 2.*embed_tokens"):
        trainer.fit()
    assert not list(tmp_path.glob("checkpoints/*"))


def test_float16_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    trainer = small_run(tmp_path, dtype=torch.float16, steps=6, evaluate_every="never", lr=1e-3)
    trainer.updater.scaler = LossScaler(True, start=2.0**19)
    initial = everything(trainer)
    trainer.fit()
    logged = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    skipped = [r["skipped_steps"] for r in logged]
    assert 0 < sum(skipped) < 6 and skipped == sorted(skipped, reverse=True)
    assert trainer.updater.scaler.scale == 2.0 ** (19 - sum(skipped))
    assert all(r["loss"] is not None for r in logged)
    assert not same({n: everything(trainer)[n] for n in initial}, initial)


def test_clipping_bounds_the_norm_of_the_whole_gradient(tmp_path):
    """With plain descent at rate 1, the step is the clipped gradient."""
    trainer = small_run(tmp_path)
    named = trainer.updater.master.named
    trainer.updater.optimizer = torch.optim.SGD(
        [{"params": [p for _, p in named], "lr_scale": 1.0}], lr=1.0
    )
    trainer.updater.clip = 0.5
    before = {n: p.detach().clone() for n, p in named}
    report = trainer.updater.update(next(Rows().step_batches()), step=1, lr=1.0)
    moved = torch.stack([(p.detach() - before[n]).norm() for n, p in named]).norm()
    assert report.grad_norm > 1.0
    assert float(moved) == pytest.approx(0.5, rel=1e-4)


# ---- when things happen


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7]),
        (3, [3, 6, 7]),
        ("epoch", [3, 6, 7]),
        ("end", [7]),
        ("never", []),
    ],
)
def test_triggers(tmp_path, every, expected):
    # 3 steps an epoch; the last step always counts
    fit(tmp_path, every=every, evaluate_every=every, best="none", keep=9)
    records = read_metrics(tmp_path / "metrics.jsonl")
    for kind in ("evaluate", "checkpoint"):
        assert [r["step"] for r in records if r["kind"] == kind] == expected
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("checkpoints/*")) == expected


def test_a_run_ends_after_so_many_real_tokens(tmp_path):
    _, result = fit(tmp_path, steps=None, tokens=100, evaluate_every="never")
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert result.num_tokens >= 100 > records[-2]["tokens"]
    assert records[-1]["progress"] == 1.0 > records[-2]["progress"]


def test_a_plan_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="steps or tokens"):
        Plan()


def test_time_left():
    pace, plan = Pace(), Plan(steps=10)
    assert pace.seconds_left(plan, 0, 0) is None
    for seconds in (1.0, 3.0):
        pace.add(seconds, 50)
    assert pace.seconds_left(plan, 2, 100) == 16.0
    assert pace.seconds_left(Plan(tokens=200), 2, 100) == 4.0


def test_logging_every_n_steps_gives_means_over_tokens(tmp_path):
    fit(tmp_path / "each", steps=6, evaluate_every="never", every="never")
    fit(tmp_path / "third", steps=6, evaluate_every="never", every="never", log_every=3)
    each, third = (
        [r for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "train"]
        for n in ("each", "third")
    )
    assert [r["step"] for r in third] == [3, 6]
    counts = [len(Rows().all.rows)] and [
        sum(b.num_supervised for b in step)
        for _, step in zip(range(3), Rows().step_batches(), strict=False)
    ]
    expected = sum(n * r["loss"] for n, r in zip(counts, each, strict=False)) / sum(counts)
    assert third[0]["loss"] == pytest.approx(expected, rel=1e-12)
    assert third[1]["tokens"] == each[5]["tokens"]


# ---- the best


def scores(*values: float):
    """An evaluation that gives these losses one after the other."""
    left = list(values)
    return lambda: {"loss": left.pop(0), "accuracy": 0.5}


def test_the_best_checkpoint_survives_and_becomes_the_final_model(tmp_path):
    trainer, result = fit(
        tmp_path, evaluate=scores(3.0, 1.0, 2.0, 2.5, 2.2, 1.0, 4.0), evaluate_every=1, keep=1
    )
    # step 2 has the smallest loss; step 6 only equals it
    assert result.final_step == 2 and result.evaluation == {"loss": 1.0, "accuracy": 0.5}
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step-2", "step-7"]
    expected, _ = fit(tmp_path / "two", steps=2, evaluate_every="never", resume="never")
    weights = dict(expected.updater.stage.model.named_parameters())
    for name, parameter in trainer.updater.stage.model.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert any("the final model is that of step-2, the best by loss" in r for r in result.remarks)


def test_a_new_best_is_saved_when_no_saving_was_due(tmp_path):
    _, result = fit(tmp_path, evaluate=scores(3.0, 1.0, 2.0, 2.5), evaluate_every=2, every="end")
    assert result.final_step == 4
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == [
        "step-2",
        "step-4",
        "step-7",
    ] or (sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step-4", "step-7"])


@pytest.mark.parametrize(
    ("options", "final"),
    [
        ({"best": "none"}, 7),
        ({"minimise": False}, 4),
        ({"every": "never"}, 7),
        ({"evaluate_every": "never"}, 7),
    ],
)
def test_which_weights_are_final(tmp_path, options, final):
    options = {"evaluate": scores(1.0, 5.0, 2.0, 2.0), "evaluate_every": 2} | options
    _, result = fit(tmp_path, **options)
    assert result.final_step == final
    if options.get("every") == "never":
        assert any("kept no weights" in r for r in result.remarks)
        assert not (tmp_path / "checkpoints").exists()


def test_nan_is_never_the_best(tmp_path):
    _, result = fit(
        tmp_path, evaluate=scores(float("nan"), 2.0, float("nan")), steps=3, evaluate_every=1
    )
    assert result.final_step == 2


def test_a_best_checkpoint_that_was_damaged_is_not_taken(tmp_path):
    def evaluate():
        value = values.pop(0)
        if not values:
            (tmp_path / "checkpoints/step-1/model.safetensors").write_bytes(b"x")
        return {"loss": value}

    values = [1.0, 2.0, 3.0]
    with pytest.raises(Failed, match=r"step-1.*as the final model"):
        fit(tmp_path, evaluate=evaluate, steps=3, evaluate_every=1)
    assert damage(tmp_path / "checkpoints/step-3") is None


def test_the_model_is_in_training_mode_while_training(tmp_path):
    trainer = small_run(tmp_path, steps=1, evaluate_every="never", every="never")
    modes = []
    schedule = trainer.schedule
    trainer.schedule = lambda t: (modes.append(trainer.updater.stage.model.training), schedule(t))[
        1
    ]
    trainer.fit()
    assert modes == [True] and BATCH == 4
