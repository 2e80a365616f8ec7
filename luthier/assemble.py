"""Config -> parts that fit together, in the one order that matters.

Cheap refusals come first (devices, packages, folders, tokenizer, data), then the weights. What is done with
the parts is told by the recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from luthier.adapters import (
    ADAPTERS,
    adapter_parameters,
    adapters_of,
    add_noise,
    attach,
    lr_scales,
    plan_of,
    retract,
    whole_parameters,
)
from luthier.adapters.continuing import take_options
from luthier.adapters.facts import check_made_alike, read_adapter_config
from luthier.adapters.store import load_adapter
from luthier.bases import quantization_of, refuse_training
from luthier.batch import Batch
from luthier.built import Built as Built
from luthier.built import copy_model as copy_model
from luthier.built import cut, cut_stages, cut_tensor, plan_stages, reading_ways, share_tokens
from luthier.built import name_of as name_of
from luthier.config import MINIMISED, RunConfig
from luthier.data.corpus import Corpus
from luthier.data.dataset import Dataset, LazyDataset
from luthier.data.loader import CorpusBatches, Loader, evaluation_batches
from luthier.data.prepare import prepare
from luthier.errors import Refused
from luthier.models.across import check_heads
from luthier.models.attention import check_kernel, why_torch
from luthier.models.cuts import cuts_of
from luthier.models.dropout import seed_dropout
from luthier.models.families import untested
from luthier.models.fast import fasten
from luthier.models.folder import find_folder, fingerprint, weight_files
from luthier.models.load import (
    blueprint,
    build_model,
    check_family,
    resolve_device,
)
from luthier.models.partial import places_of
from luthier.models.recompute import check_kept, compile_layers, set_recompute
from luthier.models.stage import Stage, check_stage
from luthier.parallel.degrees import check_stages
from luthier.parallel.pipeline import check_trained
from luthier.parallel.world import World
from luthier.positions import num_positions
from luthier.text import Text as Text
from luthier.text import open_text as open_text
from luthier.train.gates import check_first_gradients
from luthier.train.master import LossScaler, MasterWeights
from luthier.train.optim import make_optimizer
from luthier.train.plan import Plan
from luthier.train.router import router_loss
from luthier.train.step import Updater

Progress = Callable[[str, int, int | None], None]  # what, done, of


# ---- processes


@contextmanager
def joined(config: RunConfig) -> Iterator[World]:
    """The run's processes, all with this config, for as long as they work together."""
    device = resolve_device(config.model.device)
    world = World.start(config.parallel, device.type, flat(config))
    yield world  # after an error the others are not there to take leave of
    world.close()


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> plain value."""
    dump = config.model_dump(mode="json")
    sections = {name: part for name, part in dump.items() if isinstance(part, dict)}
    own = {name: value for name, value in dump.items() if name not in sections}
    return own | {f"{s}.{k}": v for s, part in sections.items() for k, v in part.items()}


# ---- model


def check_training(config: RunConfig, text: Text, sizes: Mapping[str, int]) -> None:
    """Refuse what the model's folder and config tell before rows are tokenised and weights are read: a missing
    or broken shard, a kernel that does not fit the device, targets, rank, layers that the mesh cannot share."""
    tensor, stages = sizes["tensor"], sizes["pipeline"]
    code = config.model.trust_remote_code
    check_family(text.model_config)
    refuse_training(config, config.adapter.path)
    if config.model.init == "pretrained":
        weight_files(find_folder(config.model.path, code=code))
    check_kernel(config.model.attention, resolve_device(config.model.device), train=True)
    if config.parallel.context_method == "heads":
        heads = text.model_config.get_text_config().num_attention_heads // tensor
        check_heads(heads, sizes["context"])
    model: Any = None if code else blueprint(text.model_config, config.model.path)
    if config.adapter.path is not None:
        read_adapter_config(Path(config.adapter.path))
    if model is None or (
        config.adapter.method == "none" and not config.quantize.on and tensor == stages == 1
    ):
        return
    if stages > 1:
        layers = model.get_submodule(places_of(model).layers)
        check_stages(config.parallel, stages, config.model.num_layers or len(layers))
    if (quantization := quantization_of(config.quantize, None, model=config.model)) is not None:
        quantization.convert(model)
    if tensor > 1:
        cuts_of(model, tensor)
    if config.adapter.method == "none":
        return
    if config.adapter.path is None:
        plan_of(model, config.adapter)
        limit = num_positions(text.model_config)
        method = ADAPTERS[config.adapter.method]
        method.check_length(config.adapter, config.data.reach, limit)


def build(
    config: RunConfig,
    *,
    train: bool,
    path: str | None = None,
    adapter: str | None = None,
    world: World | None = None,
) -> Built:
    """The model of the config, for training or for use; trained, it is cut over the shard axis of `world`.

    `path` replaces model.path (a run's own result, say), `adapter` adapter.path. Raises Refused for what
    does not fit, before or while reading, with nothing written.
    """
    chosen = config.model
    if path is not None and path != chosen.path:  # a trained folder is whole as it is
        chosen = chosen.model_copy(
            update={"path": path, "init": "pretrained", "num_layers": None, "rope_scaling": None}
            | {"misfits": "refuse"}
        )
    device = resolve_device(chosen.device)
    adapter = adapter or config.adapter.path
    adapting = config.adapter.method != "none"
    if train and adapter is not None and not adapting:
        raise Refused(
            f"adapter.path={adapter} with adapter.method=none",
            "full fine-tuning trains no adapter",
            "give adapter.method=lora to go on with that adapter, or merge it into the base first",
        )
    if adapter is not None:
        check_made_alike(Path(adapter), chosen.num_layers, chosen.rope_scaling)
    new = config.adapter if train else None
    quantization = quantization_of(config.quantize, adapter, new, config.train.seed, model=chosen)
    stages = plan_stages(config.parallel, world or World(), None if adapter else new)
    how: dict[str, Any] = {"quantization": quantization, "leave_out": stages and stages.leave_out}
    how["ways"] = reading_ways(config, world or World(), train=train)
    model = build_model(chosen, seed=config.train.seed, train=train, **how)
    built = Built(
        model, Stage(model), device, chosen.path, num_layers=chosen.num_layers, init=chosen.init
    )
    built.remarks += fasten(model) if train else []
    built.world = world or World()
    built.scaling = chosen.rope_scaling
    built.quantize = config.quantize.model_dump(mode="json", exclude_defaults=True)
    if chosen.init == "pretrained" and (adapter or (train and adapting)):
        built.base_hash = fingerprint(chosen.path)
    if adapter is not None:
        loaded = load_adapter(
            model,
            adapter,
            trainable=train,
            seed=config.train.seed,
            base_name=chosen.path,
            base_hash=built.base_hash,
        )
        built.adapter = loaded.config
        if train:
            asked = config.adapter
            built.adapter, remarks = take_options(model, asked, loaded.config, adapter)
            built.remarks += remarks
        built.remarks += loaded.remarks
    elif train and adapting:
        attach(model, config.adapter, seed=config.train.seed)
        built.adapter = config.adapter
    elif train:
        model.requires_grad_(True)
    if built.adapter is not None:
        method, limit = ADAPTERS[built.adapter.method], num_positions(model.config)
        method.check_length(built.adapter, config.data.reach, limit)
    built.stage.autocast = None if chosen.autocast == "none" else getattr(torch, chosen.autocast)
    if built.world.sizes["tensor"] > 1:
        cut_tensor(built, config.parallel, stages, tell=train)
    if stages is not None:
        cut_stages(built, stages)
    if train and built.world.sharded:
        cut(built, config.parallel)
    if built.world.sizes["context"] > 1:
        share_tokens(built, config.parallel.context_method)
    check_stage(built.stage)
    built.remarks += [*getattr(model, "misfits", []), *untested(model.config.model_type)]
    built.settle()
    if train:
        add_noise(model, config.adapter, seed=config.train.seed)
        seed_dropout(model, config.train.seed, built.tokens)
        check_kept(config.train.keep_attention, built.kernel)
        set_recompute(built.stage, config.train.recompute, config.train.keep_attention)
        built.remarks += why_torch(built.kernel, built.device, built.dtype)
        if config.train.compile:
            compile_layers(built.stage)
        model.train()
    return built


# ---- data


@dataclass
class Data:
    """The rows of a run: training through a loader, evaluation in memory or (pretraining) mapped."""

    train: Dataset | LazyDataset | Corpus
    loader: Loader
    dev: Dataset | Corpus | None


def open_data(
    config: RunConfig, text: Text, progress: Progress | None = None, world: World | None = None
) -> Data:
    """Encode and pack the rows of a run, of which the loader gives out this rank's; refuses data that cannot
    teach anything."""
    world = world or World()

    def tell(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else partial(progress, what)

    train = prepare(config, text.renderer, "train", tell("reading training rows"))
    if train is None:
        raise Refused(
            f"training data at data.path={config.data.path}",
            "it has no training part",
            "give a folder with train.json or train/*.json, or a file",
        )
    dev = None
    if config.evaluate.every != "never" or config.evaluate.before:
        found = prepare(config, text.renderer, "dev", tell("reading evaluation rows"))
        dev = None if isinstance(found, LazyDataset) else found
    loader = Loader(
        train,
        batch=config.batch,
        micro_batch=config.micro_batch,
        pad_id=text.pad_id,
        seed=config.train.seed,
        length=config.data.length,
        packing=config.data.packing,
        rank=world.data_rank,
        ranks=world.data_size,
    )
    return Data(train, loader, dev)


def evaluation_rows(
    config: RunConfig, text: Text, dev: Dataset | Corpus
) -> Sequence[Batch] | CorpusBatches:
    """Batches of the evaluation rows, packed as training is."""
    if isinstance(dev, Corpus):
        return CorpusBatches(dev, config.evaluate_micro_batch, text.pad_id, config.evaluate.rows)
    return list(
        evaluation_batches(
            dev,
            micro_batch=config.evaluate_micro_batch,
            pad_id=text.pad_id,
            length=config.data.length,
            packing=config.data.packing,
        )
    )


# ---- training


def make_plan(config: RunConfig, data: Data) -> Plan:
    """Length and rhythm of the run."""
    steps, tokens = config.train.steps, None
    if steps is None:
        tokens = config.train.tokens
        if tokens is None:
            steps = data.loader.steps_in(config.train.epochs)
    best = config.checkpoint.best if data.dev and config.evaluate.every != "never" else "none"
    return Plan(
        steps=steps,
        tokens=tokens,
        evaluate_every=config.evaluate.every if data.dev else "never",
        save_every=config.checkpoint.every,
        log_every=config.log.every,
        best=best,
        minimise=best in MINIMISED,
    )


def expected_steps(config: RunConfig, data: Data, plan: Plan) -> int:
    """Steps that the schedule is laid over: those of the plan, or an estimate from `train.tokens`.

    The estimate takes an average step of the first epoch.
    """
    if plan.steps is not None:
        return plan.steps
    return max(1, math.ceil((config.train.tokens or 0) / data.loader.tokens_per_step))


def make_updater(config: RunConfig, built: Built) -> Updater:
    """Gradients, clipping, loss scaling and the optimiser over what is trained."""
    check_trained(len(built.trained), built.world)
    master = MasterWeights(built.trained, config.model.master_dtype)
    names = dict(master.named)
    scales = {name: scale for name, scale in lr_scales(built.model).items() if name in names}
    optimizer = make_optimizer(
        master.named,
        config.optim,
        config.lr,
        scales,
        head_dim=built.head_dim,
        idle=built.stage.share is not None,
    )
    half = torch.float16 in (built.dtype, built.stage.autocast)
    # from what was asked for, not from requires_grad: the gate compares the two
    every: dict[str, Parameter] = dict(built.model.named_parameters())
    if built.adapter is not None:
        every = {**adapter_parameters(built.model), **whole_parameters(built.model)}
        optimizer.register_step_post_hook(lambda *_: retract(built.model))
    expected = set(every)
    excused = {
        f"{adapter.path}.{name}"
        for adapter in adapters_of(built.model).values()
        for name in adapter.zero_at_start | adapter.may_idle
    }
    return Updater(
        stage=built.stage,
        master=master,
        optimizer=optimizer,
        scaler=LossScaler(half),
        clip=config.optim.clip,
        gate=partial(check_first_gradients, built.model, expected, excused),
        device=built.device,
        router=router_loss(
            built.model, config.train.router_loss, built.world.over_stages, built.join
        ),
        world=built.world,
        pipeline=built.pipeline(config.parallel),
        split=built.context and built.context.split,
    )


def names(text: str) -> set[str]:
    return set(text.split())


IDENTITY = {
    "model": names("""
        path dtype autocast master_dtype num_layers init rope_scaling tokenizer
        """),
    "data": names("""
        path format columns template length source_length overlong packing lazy
        validation_share pose pose_window split borders blanks supervise
        """),
    "adapter": None,
    "quantize": None,
    "train": {"router_loss"},
    "optim": None,
}


def identity(config: RunConfig) -> dict[str, Any]:
    """What may not differ when a run is resumed (rule 2 of the contract), as plain values."""
    dump = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, keys in IDENTITY.items():
        for key, value in dump[section].items():
            if keys is None or key in keys:
                found[f"{section}.{key}"] = value
    return found | {
        "optim.lr": config.lr,
        "train.batch": config.batch,
        "train.seed": config.train.seed,
        "train.mode": config.train.mode,
    }
