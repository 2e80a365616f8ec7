"""What `luthier finetune` does, as prose; evaluate, predict and preview are `use.py`.

Every recipe takes a config (a path, a mapping, a `RunConfig` or what `read_config` gave), prints what a
user should see and returns it. The parts come from `assemble.py`; nothing is computed here. Merging and
converting, which need no config, are `exchange.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier.adapters.facts import check_base
from luthier.answers import Evaluator
from luthier.assemble import (
    Data,
    Text,
    build,
    check_training,
    copy_model,
    expected_steps,
    identity,
    joined,
    make_plan,
    make_updater,
    name_of,
    open_data,
    open_text,
)
from luthier.bases import storage_words
from luthier.batch import Layout
from luthier.built import Built
from luthier.config import RunConfig
from luthier.config_adapter import USUAL_RATES
from luthier.configfile import Resolved, from_mapping, to_yaml
from luthier.data.dataset import LazyDataset
from luthier.errors import Refused
from luthier.files import PARTIAL, check_writable, write_json, write_text
from luthier.interop.read import read_config
from luthier.models.load import resolve_device
from luthier.parallel.degrees import check_sharding, fit_batch, with_batch, without_effect
from luthier.parallel.world import World, note, restarted, speaks, tells
from luthier.positions import position_axes
from luthier.predicted import Prediction
from luthier.rehearsal import rehearse, wanted
from luthier.summary import facts_of
from luthier.train.bad_rows import keep_rows
from luthier.train.checkpoint import Checkpoints, Found, check_identity, find, read
from luthier.train.ending import newest_in
from luthier.train.gates import check_batch, check_isolation
from luthier.train.loop import Trainer
from luthier.train.metrics import FILE as METRICS
from luthier.train.metrics import Metrics, memory, read_metrics
from luthier.train.report import Facts, pair_samples, write_report
from luthier.train.saving import Saver
from luthier.train.schedules import make_schedule, warmup_steps
from luthier.train.sinks import check_sinks
from luthier.train.state import model_tensors
from luthier.train.watchdog import FOLDER as STACKS
from luthier.train.watchdog import LONG, Watchdog

Source = str | Path | Mapping[str, Any] | RunConfig | Resolved
MARKERS = ("config.json", "adapter_config.json")  # what makes a folder a model
BEFORE = "before.json"  # the evaluation before training, kept for a resumed run's report


def say(text: str = "") -> None:
    """A plain line for the user, from one process of the run."""
    if speaks():
        print(text, flush=True)


def resolve(source: Source, overrides: Sequence[str] = ()) -> Resolved:
    """Any form of config, checked."""
    match source:
        case Resolved():
            return source
        case RunConfig():
            return Resolved(source)
        case Mapping():
            return from_mapping(source, overrides)
        case _:
            return read_config([Path(source)], list(overrides))


# ---- finetune


def finetune(source: Source, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train by the config and leave the final model at the top of `output`. Returns the report's facts."""
    resolved = resolve(source, overrides)
    with joined(resolved.config) as world:
        for remark in resolved.remarks:
            say(f"note: {remark}")
        if world.size > 1:
            say(world.layout(resolved.config.parallel))
        return world.broadcast(run_on(resolved.config, world))


def run_on(config: RunConfig, world: World) -> dict[str, Any]:
    """`finetune` as one of the processes of `world`: all that can be refused before weights are read; the run."""
    recorded, config = config, fit_batch(config, world.data_size, world.sizes["pipeline"])
    check_sharding(config, world.sizes)
    if Path(config.model.path).resolve() == Path(config.output).resolve():
        raise Refused(
            f"output={config.output}", "it is the folder of the model itself", "name another output"
        )
    check_sinks(config.log.sinks)
    output = Path(config.output)
    found = world.lead(lambda: _start(config, output, world))
    found = Found(found["path"] and Path(found["path"]), tuple(found["remarks"]))
    if found.path is not None:
        saved = read(found.path).identity
        if recorded.train.accumulation is not None and config.batch != saved["train.batch"]:
            # the batch decides the result: on another number of data ranks each accumulates more or less
            told = f"train.batch stays {saved['train.batch']}, as the checkpoint has it"
            found = Found(found.path, (*found.remarks, told))
            same = with_batch(recorded, saved["train.batch"])
            config = fit_batch(same, world.data_size, world.sizes["pipeline"])
        check_identity(saved, identity(config))

    text = open_text(config)
    check_training(config, text, world.sizes)
    data = open_data(config, text, world=world)
    if config.evaluate.before and data.dev is None:
        raise Refused(
            "evaluate.before=true",
            "there are no evaluation rows",
            "give data.validation_path, or a dev part beside the training rows",
        )
    try:
        return _finetune(config, recorded, world, found, text, data)
    finally:
        data.loader.close()


def make_watchdog(config: RunConfig, world: World) -> Watchdog:
    """Watches over the steps of this process."""
    limit = config.train.hang_timeout

    def tell(error: Exception) -> None:
        note(error)
        if tells(error):
            print(f"luthier: {error}", file=sys.stderr, flush=True)

    return Watchdog(
        Path(config.output) / STACKS,
        None if limit == "never" else limit,
        rank=world.rank,
        slack=LONG if config.train.compile else 1.0,
        tell=tell,
    )


def _start(config: RunConfig, output: Path, world: World) -> dict[str, Any]:
    """Where the run starts, as JSON. A run that its launcher started again goes on by itself."""
    resume = config.checkpoint.resume
    if world.attempt and (resume == "never" or newest_in(output)):
        resume = "auto"
    found = find(output, resume)
    check_writable(f"output={output}", output)
    return {"path": found.path and str(found.path), "remarks": list(found.remarks)}


def _finetune(
    config: RunConfig, recorded: RunConfig, world: World, found: Found, text: Text, data: Data
) -> dict[str, Any]:
    output = Path(config.output)
    remarks = [*found.remarks, *without_effect(config.parallel, world.sizes)]
    for dataset in (data.train, data.dev):
        if dataset is not None:
            ledger = dataset.sample if isinstance(dataset, LazyDataset) else dataset.ledger
            say(ledger.summary())
    if data.dev is None and config.evaluate.every != "never":
        remarks.append(
            "there are no evaluation rows: no evaluation, the last model is the final one"
        )
    family = text.model_config.model_type
    made, axes = 1 if text.renderer.positions is None else 2, position_axes(family)
    if made != axes:
        raise Refused(
            f"model.path={config.model.path}",
            f"config.json is of the family '{family}', whose positions have {axes} axes; the tokenizer makes {made}",
            "give a folder whose config.json, weights and tokenizer are of one model",
        )
    first = data.loader.peek()
    for batch in first:
        check_batch(batch, skips=config.data.pose != "off", axes=axes)

    if config.adapter.method == "reft" and config.adapter.positions != "all":
        lengths = [n for batch in first for n in Layout.of(batch).prompt_lengths]
        if world.max(max(lengths, default=0)) < 2:
            raise Refused(
                f"adapter.positions={config.adapter.positions}",
                "no document of the first step has a prompt of two tokens or more: nothing would be edited",
                "give rows with prompts, or adapter.positions=all",
            )
    before = memory(resolve_device(config.model.device)).now
    built = build(config, train=True, world=world)
    loaded = memory(built.device)
    if found.path is not None and built.adapter is not None:
        check_base(found.path, None, None, built.base_hash)
    remarks += built.remarks
    share = built.num_trained / max(built.num_base, 1)
    stored = storage_words(built.model)
    say(
        f"model: {built.base}, {name_of(built.dtype)} on {built.device}; "
        f"{stored + '; ' if stored else ''}"
        f"{built.num_trained:,} trained parameters ({share:.2%} of {built.num_base:,})"
    )
    sample = data.loader.sample().to(built.device)
    isolation = check_isolation(built.stage, sample, kernel=built.kernel, rounding=built.rounding)
    built.settle()
    checks: list[tuple[str, bool, str]] = [
        ("labels are the next tokens of their own documents", True, "first step's rows"),
        (
            "documents of a row do not see each other",
            True,
            f"{isolation.documents} documents compared bit by bit, attention {built.kernel}"
            if isolation.documents
            else "no row has two documents",
        ),
    ]
    updater = make_updater(config, built)
    plan = make_plan(config, data)
    total = expected_steps(config, data, plan)
    if 1 < warmup_steps(config.optim, total) >= total:
        remarks.append(f"optim.warmup takes all {total} steps: the peak rate is never reached")
    usual = USUAL_RATES.get(config.adapter.method)
    if config.optim.lr is None and usual is not None:
        remarks.append(
            f"optim.lr is {config.lr:g}, the default of adapters; {config.adapter.method} usually learns at about {usual:g}"
        )
    checkpoints = Checkpoints(
        output,
        keep=config.checkpoint.keep,
        identity=identity(config),
        world=world,
        background=config.checkpoint.background,
    )

    metrics = Metrics(
        output,
        config.log.sinks,
        config.log.progress,
        config.model_dump(mode="json"),
        silent=not world.is_main,
    )
    evaluator = None
    if data.dev is not None:
        evaluator = Evaluator(config, text, built, data.dev, output, metrics.activity)
    if wanted(config, built.device):
        batches = evaluator.batches if evaluator else ()
        say(rehearse(config, built, data.loader, updater, batches, checkpoints.saver))
    world.lead(lambda: _begin(output, to_yaml(recorded), fresh=found.path is None))

    trainer = Trainer(
        updater=updater,
        schedule=make_schedule(config.optim, config.lr, total),
        data=data.loader,
        plan=plan,
        metrics=metrics,
        checkpoints=checkpoints,
        copy_model=partial(copy_model, built, text),
        evaluate=evaluator if plan.evaluate_every != "never" else None,
        before=(lambda: _evaluate_before(output, evaluator, world))
        if evaluator and config.evaluate.before
        else None,
        facts={"trained_parameters": built.num_trained, "total_steps": plan.steps},
        remarks=remarks,
        evaluation_data="" if data.dev is None else data.dev.fingerprint,
        world=world,
        watchdog=make_watchdog(config, world),
        restart=restarted(),
        stop_unwritten=config.checkpoint.on_failure == "stop",
        compare=Prediction(
            config, world, built.device, before, lambda: checkpoints.saver.copied
        ).compare,
    )
    updater.on_nan, updater.max_nan_steps = config.train.on_nan, config.train.max_nan_steps
    updater.keep_rows = partial(keep_rows, output, world, data.loader.origin, text.tokenizer.decode)
    result = trainer.fit(found.path)
    if updater.gated:
        checks.append(
            ("every trained tensor had a gradient at the first step, no frozen one", True, "")
        )

    publish_final(checkpoints.saver, output, built, text, result.step)
    data.train.ledger.reconcile(data.train.ledger.num_rows)
    if (
        evaluator
        and config.evaluate.generate
        and result.evaluation
        and (result.final_step != result.step or not evaluator.records)
    ):
        evaluator.generate()
    facts = facts_of(config, built, data, result, loaded, plan)
    facts["checks"] = checks
    world.lead(lambda: _report(output, facts, data, evaluator, result.final_step))
    return dict(facts)


def _begin(output: Path, config: str, *, fresh: bool) -> None:
    """The first files of a run."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "config.yaml", config)
    if fresh:
        (output / BEFORE).unlink(missing_ok=True)


def _report(
    output: Path, facts: Facts, data: Data, evaluator: Evaluator | None, final_step: int
) -> None:
    """What a finished run leaves besides the model; completes `facts`."""
    ledgers = {d.split: d.ledger.to_dict() for d in (data.train, data.dev) if d is not None}
    write_json(output / "ledger.json", ledgers)
    before = {}
    if (output / BEFORE).is_file():
        before = json.loads((output / BEFORE).read_text("utf-8"))
    facts["before"] = before.get("values", {})
    if restarts := [r for r in read_metrics(output / METRICS) if r["kind"] == "restart"]:
        seconds = sum(r["recovery_seconds"] or 0 for r in restarts)
        told = f"{len(restarts)}, with {seconds:.0f} s from the failures to the next finished step"
        facts["more"] = {**facts.get("more", {}), "restarts": told}
    facts["samples"] = pair_samples(
        before.get("records", []), evaluator.records if evaluator else []
    )
    write_json(output / "report.json", dict(facts))
    report = write_report(output, facts)
    _say_result(output, facts, final_step, report)


def _evaluate_before(output: Path, evaluator: Evaluator, world: World) -> dict[str, float]:
    """The evaluation before the first step, kept for the report of a run that is resumed."""
    values = evaluator()
    world.lead(
        lambda: write_json(output / BEFORE, {"values": values, "records": evaluator.records})
    )
    evaluator.records = []
    return values


def publish_final(saver: Saver, output: Path, built: Built, text: Text, step: int) -> None:
    """Write the final model at the top of `output`, file by file; every rank its share.

    The config comes last: without it nobody takes the folder for a model.
    """
    made = output / f"{PARTIAL}final" / "model"
    live = {} if built.adapter else model_tensors(built.model)
    tensors = {f"weights/{name}": tensor for name, tensor in live.items()}
    saver.begin(made, step, partial(copy_model, built, text, built.world), tensors, None)
    saver.wait()
    built.world.lead(lambda: _move_final(made, output))


def _move_final(made: Path, output: Path) -> None:
    for name in MARKERS:
        (output / name).unlink(missing_ok=True)
    names = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (str(name) in MARKERS, name)):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(output / name)
    shutil.rmtree(made.parent)


def _say_result(output: Path, facts: Mapping[str, Any], step: int, report: Path) -> None:
    after, before = facts.get("after", {}), facts.get("before", {})
    for name, value in after.items():
        was = f"   (before: {before[name]:.4g})" if name in before else ""
        say(f"  {name:<12}{value:>12.4g}{was}")
    for sample in facts.get("samples", ()):
        say()
        for name in ("prompt", "reference", "before", "after"):
            if name in sample:
                text = " ".join(sample[name].split())
                say(f"  {name:<11}{text if len(text) <= 300 else text[:297] + '...'}")
    say(f"\nfinal model (step {step}): {output}\nreport: {report}")
