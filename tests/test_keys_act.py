"""Every key of the config does something: changing it changes the plan, the result or the files of a run.

Each row names a key, a value and a probe, which is run with and without that value; what the probe sees has
to differ. A probe is deterministic (tested), so that nothing but the key can be the reason. The table has a
row for every key.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_model_, tiny_tokenizer_
from tiny_runs import resolved, rows_, tiny_config, write_data, write_rows

import luthier.built
import luthier.train.step
from luthier.assemble import build, evaluation_rows, make_plan, open_data, open_text
from luthier.config import RunConfig
from luthier.configkeys import KEYS
from luthier.data.corpus import Corpus
from luthier.errors import LuthierError, Unwritten
from luthier.models.load import save_model
from luthier.parallel import world as processes
from luthier.parallel.collectives import Axis
from luthier.parallel.degrees import mesh_sizes
from luthier.recipes import finetune, make_watchdog
from luthier.train.checkpoint import Checkpoints
from luthier.train.metrics import read_metrics
from luthier.train.saving import Saver
from luthier.train.schedules import make_schedule
from luthier.use import predict
from tests.zoo_folders import zoo_folder

Tree = dict[str, Any]
Probe = Callable[[Tree], Any]


# ---- probes: what a config leads to


def trained(tree: Tree) -> str:
    """The final weights of the whole run, bit for bit."""
    output = finished(tree)
    weights = sorted(output.glob("*.safetensors"))
    assert weights
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def files(tree: Tree) -> list[str]:
    """All files that a run leaves, but for the names that hold a time."""
    output = finished(tree)
    paths = (path.relative_to(output).parts for path in output.rglob("*"))
    return sorted({"/".join(parts[:2]) for parts in paths})


def records(tree: Tree) -> list[Any]:
    """Kind, step and names of the records of metrics.jsonl."""
    found = read_metrics(finished(tree) / "metrics.jsonl")
    return [(r["kind"], r["step"], sorted(r)) for r in found]


def place(tree: Tree) -> str:
    finetune(tree)
    return next(path.parent.name for path in Path(tree["output"]).parent.glob("*/report.html"))


def going_on(tree: Tree) -> str:
    """A second run into the same folder, two steps longer."""
    finetune({**tree, "checkpoint": {"every": 1}})
    return outcome(lambda: finetune({**tree, "train": {**tree["train"], "steps": 5}}))


def passed_over(tree: Tree) -> str:
    """The first two steps have gradients that are not finite."""
    clip, steps = luthier.train.step.clip_gradients, count()

    def infinite(*args: Any) -> float:
        norm = clip(*args)
        return norm if next(steps) > 1 else float("inf")

    with patch.object(luthier.train.step, "clip_gradients", infinite):
        return outcome(lambda: finetune(tree)["steps"])


def watched(tree: Tree) -> float | None:
    return make_watchdog(RunConfig.model_validate(tree), processes.World()).seconds


def full_disk(tree: Tree) -> str:
    """The first checkpoint cannot be written."""
    save, calls = Checkpoints.save, count()

    def full(*args: Any, **more: Any) -> Path:
        if not next(calls):
            raise Unwritten("writing step-1", "No space left")
        return save(*args, **more)

    with patch.object(Checkpoints, "save", full):
        return outcome(lambda: finetune(tree)["steps"])


def shown(tree: Tree) -> bool:
    """Whether a run writes lines of progress."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        finetune(tree)
    return "step 3/3" in told.getvalue()


def rehearsed(tree: Tree) -> bool:
    """Whether a run tells that it rehearsed its largest step."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        finetune(tree)
    return "rehearsed in" in told.getvalue()


def model(tree: Tree) -> Any:
    """The model, ready to be trained."""

    def make() -> Any:
        built = build(config_of(tree), train=True)
        layer: Any = built.model.model.layers[0]
        return (
            str(built.model.dtype),
            built.kernel,
            str(built.device),
            built.num_base,
            built.stage.recompute,
            built.stage.keep_attention,
            layer._compiled_call_impl is not None,
        )

    return outcome(make)


def reading(tree: Tree) -> Any:
    """Tokenizer and config of the model folder."""
    return outcome(lambda: type(open_text(config_of(tree)).model_config).__name__)


def data(tree: Tree) -> Any:
    """Rows, tokens and cuts of a step, and what was held out."""

    def make() -> Any:
        config = config_of(tree)
        text = open_text(config)
        found = open_data(config, text)
        try:
            step = [batch.input_ids.tolist() for batch in found.loader.peek()]
            lazy = getattr(getattr(found.train, "workers", None), "number", None)
            dev = (
                found.dev.num_rows
                if isinstance(found.dev, Corpus)
                else found.dev and len(found.dev)
            )
            batches = [] if found.dev is None else evaluation_rows(config, text, found.dev)
            sizes = [tuple(batch.input_ids.shape) for batch in batches]
            plan = make_plan(config, found)
            return step, lazy, dev, sizes, plan, found.train.ledger.num_supervised
        finally:
            found.loader.close()

    return outcome(make)


def schedule(tree: Tree) -> Any:
    """Learning rates of twelve steps of a run of ten."""

    def make() -> list[float]:
        config = config_of(tree)
        rate = make_schedule(config.optim, config.lr, 10)
        return [rate(step) for step in range(12)]

    return outcome(make)


def answers(tree: Tree) -> Any:
    """Predictions, and where they are written."""
    found = predict(tree)
    return found, [p.name for p in Path(tree["output"]).parent.rglob("*.jsonl") if p.is_file()]


def kept(tree: Tree) -> list[str]:
    """Token files in the run's own folder."""
    data(tree)
    return [path.name for path in Path(tree["output"]).rglob("*.idx")]


def cut(tree: Tree) -> Any:
    """The mesh of four processes; what is done with its stages, `tests/parallel` compares."""
    config = config_of(tree).parallel
    return outcome(lambda: (mesh_sizes(config, 4), config.stage, config.offload))


def by_tokens(tree: Tree) -> bool:
    """Whether tensor parallelism shares out the tokens between the layers; what that does, `tests/parallel` compares."""
    config = config_of(tree)
    made = build(config, train=True)
    names = ("cut_layers", "cut_branches", "cut_vocabulary", "by_heads", "split_sequence")
    with contextlib.ExitStack() as stack:
        done = {name: stack.enter_context(patch.object(luthier.built, name)) for name in names}
        stack.enter_context(patch.object(luthier.built, "same_stage", contextlib.nullcontext))
        stack.enter_context(patch.object(Axis, "of", return_value=Axis(None, 0, 2)))
        luthier.built.cut_tensor(made, config.parallel, None)
    return done["split_sequence"].called


def background(tree: Tree) -> list[bool]:
    """How a run saves."""
    init, found = Saver.__init__, []

    def note(self: Saver, world: Any = None, *, background: bool = True) -> None:
        found.append(background)
        init(self, world, background=background)

    with patch.object(Saver, "__init__", note):
        finetune(tree)
    return found


def accepted(tree: Tree) -> str:
    return outcome(lambda: resolved(tree).config.train.mode)


# ---- the table


@dataclass(frozen=True)
class Row:
    """`key` = `value` changes what `probe` sees of the config with `base` (section__key -> value)."""

    key: str
    value: Any
    probe: Probe
    base: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


FULL = {"adapter__method": None, "adapter__rank": None}
NO_RANK = {"adapter__rank": None}
PREFIX = {"adapter__method": "prefix", "adapter__num_prefix_tokens": 2, **NO_RANK}
SAMPLING = {"evaluate__top_k": 0, "evaluate__max_new_tokens": 6}
GREEDY = {"evaluate__max_new_tokens": 6}
LAZY = {"data__lazy": True, "evaluate__every": "never"}
WRITING = {"evaluate__generate": True, "evaluate__max_new_tokens": 4, "evaluate__rows": 2}
# of equal values the first one stays best
EQUAL = {
    "checkpoint__best": "accuracy",
    "evaluate__every": 1,
    "checkpoint__every": 1,
    "optim__lr": 1e-6,
}
NF4 = {"quantize__weights": "nf4"}
PRETRAIN = {
    **FULL,
    "train__mode": "pretrain",
    "data__path": "TWO_FORMATS",
    "data__format": "text",
    "data__length": 32,
}
COOLDOWN = {"optim__schedule": "cooldown", "optim__warmup": 2, "optim__decay_steps": 4}

TABLE = [
    Row("model.path", "OTHER_MODEL", trained),
    Row("model.dtype", "bfloat16", model),
    Row("model.master_dtype", "none", trained, {**FULL, "model__dtype": "bfloat16"}),
    Row("model.autocast", "bfloat16", trained),
    Row("model.attention", "math", model),
    Row("model.device", "cuda:63", model),
    Row("model.tokenizer", "OTHER_WORDS", data),
    Row("model.num_layers", 1, model),
    Row("model.init", "random", trained),
    Row("model.misfits", "accept", model, {**FULL, "model__path": "MISFIT"}),
    Row("model.trust_remote_code", True, reading, {"model__path": "REMOTE"}),
    Row("model.rope_scaling", {"type": "linear", "factor": 2}, trained),
    Row("data.path", "OTHER_DATA", trained),
    Row("data.validation_path", "OTHER_DATA/train.json", data),
    Row("data.format", "text", data, {"data__path": "TWO_FORMATS"}),
    Row("data.columns", {"src": "q", "tgt": "a"}, data, {"data__path": "RENAMED"}),
    Row("data.template", "none", data),
    Row("data.supervise", "turns", data, {"model__path": "QWEN", "data__length": 256}),
    Row("data.blanks", "rest", data, {"model__path": "GLM", "data__path": "TEXTS"}),
    Row("data.length", 64, data),
    Row("data.source_length", 4, data, {"data__template": "none"}),
    Row("data.overlong", "drop", data, {"data__length": 64}),
    Row("data.packing", "none", data),
    Row("data.lazy", True, data, {"evaluate__every": "never"}),
    Row("data.workers", 1, data, LAZY),
    Row("data.pose", "paper", data, {"data__pose_window": 250}),
    Row("data.pose_window", 200, trained, {"data__pose": "paper", "data__pose_window": 250}),
    Row("data.validation_share", 0.4, data, {"data__path": "DATA/train.json"}),
    Row("data.split", "60,40,0", data, PRETRAIN),
    Row("data.borders", "ignore", trained, PRETRAIN),
    Row("data.cache", "OUT/tokens", kept, PRETRAIN),
    Row("adapter.method", None, files, {"adapter__rank": None}),
    Row("adapter.path", "ADAPTER", trained),
    Row("adapter.rank", 3, trained),
    Row("adapter.alpha", 1.0, trained),
    Row("adapter.dropout", 0.3, trained),
    Row("adapter.targets", "q_proj", trained),
    Row("adapter.form", "type1", trained, {"adapter__method": "mora"}),
    Row("adapter.layers", "0", trained),
    Row("adapter.rank_pattern", {"q_proj": 3}, trained),
    Row("adapter.alpha_pattern", {"q_proj": 1.0}, trained),
    Row("adapter.modules_to_save", ["norm"], trained),
    Row("adapter.rslora", True, trained),
    Row("adapter.lora_plus", 16.0, trained),
    Row("adapter.pissa", True, trained),
    Row("adapter.dora", True, trained),
    Row("adapter.mixer", True, trained),
    Row("adapter.factor", 4, trained, {"adapter__method": "lokr"}),
    Row("adapter.decompose_both", True, trained, {"adapter__method": "lokr"}),
    Row("adapter.d_initial", 0.5, trained, {"adapter__method": "vera"}),
    Row("adapter.projection_seed", 7, trained, {"adapter__method": "vera"}),
    Row("adapter.save_projection", True, trained, {"adapter__method": "vera"}),
    Row("adapter.positions", "f1", trained, {"adapter__method": "reft"}),
    Row("adapter.tied", True, trained, {"adapter__method": "reft"}),
    Row("adapter.act_fn", "relu", trained, {"adapter__method": "reft"}),
    Row("adapter.add_bias", False, trained, {"adapter__method": "reft"}),
    Row("adapter.num_prefix_tokens", 3, trained, PREFIX),
    Row("adapter.prefix_projection", True, trained, PREFIX),
    Row("adapter.projection_size", 8, trained, {**PREFIX, "adapter__prefix_projection": True}),
    Row("adapter.feedforward", ["up_proj"], trained, {"adapter__method": "ia3", **NO_RANK}),
    Row("adapter.neftune_alpha", 5.0, trained),
    Row("adapter.neftune_scaling", "paddlenlp", trained, {"adapter__neftune_alpha": 5.0}),
    Row("quantize.weights", "int4", trained),
    Row("quantize.block_size", 32, trained, NF4),
    Row("quantize.double_quant", True, trained, NF4),
    Row("quantize.modules", ["q_proj"], trained, NF4),
    Row("optim.name", "sgd", trained),
    Row("optim.lr", 1e-3, trained),
    Row("optim.betas", [0.5, 0.9], trained),
    Row("optim.eps", 1e-2, trained),
    Row("optim.weight_decay", 0.5, trained),
    Row("optim.clip", 0.01, trained, {"optim__name": "sgd"}),
    Row("optim.schedule", "cosine", schedule),
    Row("optim.warmup", 3, schedule),
    Row("optim.warmup_start", 1e-5, schedule, {"optim__warmup": 3}),
    Row("optim.lr_end", 1e-5, schedule),
    Row("optim.decay_steps", 5, schedule),
    Row("optim.decay_start", 5, schedule, {"optim__schedule": "wsd", "optim__decay_start": 2}),
    Row("optim.cycles", 2.0, schedule, {"optim__schedule": "cosine"}),
    Row("optim.power", 2.0, schedule, {"optim__schedule": "polynomial"}),
    Row("optim.keep_steps", 2, schedule, COOLDOWN),
    Row("optim.final_steps", 2, schedule, {**COOLDOWN, "optim__lr_final": 1e-6}),
    Row("optim.lr_final", 1e-6, schedule, COOLDOWN),
    Row("optim.period", 5, schedule, {"optim__schedule": "anneal", "optim__period": 3}),
    Row(
        "optim.period_factor",
        2,
        schedule,
        {"optim__schedule": "anneal_restarts", "optim__period": 3},
    ),
    Row("train.mode", "sft", data, PRETRAIN),
    Row("train.steps", 2, trained),
    Row("train.epochs", 1, data, {"train__steps": None}),
    Row("train.tokens", 500, data, {"train__steps": None}),
    Row("train.batch", 2, trained),
    Row("train.micro_batch", 2, data),
    Row("train.accumulation", 3, data, {"train__batch": None, "train__micro_batch": 2}),
    Row("train.recompute", "layer", model),
    Row(
        "train.keep_attention", 1, model, {"train__recompute": "layer", "model__attention": "sdpa"}
    ),
    Row("train.compile", True, model),
    Row("train.on_nan", "skip", passed_over),
    Row("train.max_nan_steps", 1, passed_over, {"train__on_nan": "skip"}),
    Row("train.hang_timeout", 5.0, watched),
    Row("train.seed", 1, trained),
    Row("train.rehearse", True, rehearsed),
    Row("train.router_loss", 1.0, trained, {"model__path": "MIXTRAL"}),
    Row("evaluate.every", 1, records),
    Row("evaluate.before", True, records),
    Row("evaluate.generate", True, records, {"evaluate__max_new_tokens": 4, "evaluate__rows": 2}),
    Row("evaluate.rows", 2, data),
    Row("evaluate.micro_batch", 1, data),
    Row("evaluate.max_new_tokens", 3, answers, GREEDY),
    Row("evaluate.top_k", 0, answers, GREEDY),
    Row("evaluate.top_p", 0.1, answers, SAMPLING),
    Row("evaluate.temperature", 0.1, answers, SAMPLING),
    Row("evaluate.save", True, files, WRITING),
    Row("predict.input", "OTHER_DATA/train.json", answers, GREEDY),
    Row("predict.output", "OUT/else.jsonl", answers, GREEDY),
    Row("checkpoint.every", 1, files),
    Row("checkpoint.keep", 1, files, {"checkpoint__every": 1, "checkpoint__best": "none"}),
    Row("checkpoint.best", "none", trained, EQUAL),
    Row("checkpoint.background", False, background),
    Row("checkpoint.resume", "auto", going_on),
    Row("checkpoint.on_failure", "stop", full_disk, {"checkpoint__every": 1}),
    Row("parallel.replicate", 2, cut),
    Row("parallel.shard", 3, cut),
    Row("parallel.stage", 3, cut),
    Row("parallel.offload", True, cut),
    *(Row(f"parallel.{axis}", 2, cut) for axis in ("tensor", "context", "pipeline")),
    Row("parallel.sequence", False, by_tokens),
    Row("parallel.context_method", "ring", cut),
    Row("parallel.virtual_stages", 2, cut),
    Row("parallel.schedule", "interleaved", cut),
    Row("log.every", 2, records),
    Row("log.sinks", ["tensorboard"], files),
    Row("log.progress", "plain", shown),
    Row("output", "OUT/another", place),
]


def test_every_key_is_in_the_table() -> None:
    assert sorted(row.key for row in TABLE) == sorted(KEYS)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method:DeprecationWarning"
)  # torch.compile's own
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_key_acts(row: Row, world: World) -> None:
    base = world.tree(row.base)
    assert world.see(row.probe, base) != world.see(
        row.probe, world.tree({**row.base, row.key.replace(".", "__"): row.value})
    )


PROBES = {row.probe: row for row in TABLE}


@pytest.mark.parametrize("row", PROBES.values(), ids=lambda row: row.probe.__name__)
def test_a_probe_sees_the_same_twice(row: Row, world: World) -> None:
    tree = world.tree(row.base)
    assert world.see(row.probe, tree) == world.fresh(row.probe, tree)


# ---- the world that the probes look at


class World:
    """Folders that values of the table name in capitals; remembers what was seen."""

    def __init__(self, root: Path, model_folder: Path) -> None:
        self.root, self.number, self.seen = root, count(), {}
        self.names = {
            "DATA": write_data(root / "data"),
            "OTHER_DATA": write_rows(root / "other" / "train.json", rows_(9)[::-1]).parent,
            "MODEL": model_folder,
            "OTHER_MODEL": root / "model",
            "REMOTE": root / "remote",
            "TWO_FORMATS": root / "two.json",
            "RENAMED": root / "renamed.json",
            "ADAPTER": root / "adapter",
            "QWEN": zoo_folder("qwen", root / "qwen"),
            "GLM": zoo_folder("glm_legacy", root / "glm"),
            "TEXTS": write_rows(root / "texts.json", [{"text": "the box. seven apples"}] * 9),
            "OTHER_WORDS": root / "words",
            "MIXTRAL": root / "mixtral",
            "MISFIT": root / "misfit",
        }
        words = copy.deepcopy(tiny_tokenizer_())
        words.eos_token = "<|user|>"
        words.save_pretrained(root / "words")
        save_model(tiny_model_("mixtral"), root / "mixtral", tiny_tokenizer_())
        save_model(tiny_model_("llama"), root / "misfit", tiny_tokenizer_())
        more = json.loads((root / "misfit" / "config.json").read_text())
        more |= {"num_hidden_layers": more["num_hidden_layers"] + 1}  # a layer without tensors
        (root / "misfit" / "config.json").write_text(json.dumps(more))
        save_model(tiny_model_("llama", seed=1), root / "model", tiny_tokenizer_())
        save_model(tiny_model_("llama"), root / "remote", tiny_tokenizer_())
        remote = json.loads((root / "remote" / "config.json").read_text())
        names = {"AutoConfig": "far.FarConfig", "AutoModelForCausalLM": "far.Far"}
        remote |= {"model_type": "far", "auto_map": names}
        (root / "remote" / "config.json").write_text(json.dumps(remote))
        (root / "remote" / "far.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
            "class FarConfig(LlamaConfig):\n    model_type = 'far'\n\n\n"
            "class Far(LlamaForCausalLM):\n    config_class = FarConfig\n"
        )
        pairs = [(f"number {i}", f"{i} and the {i + 1}") for i in range(12)]
        both = [{"src": q, "tgt": a, "text": f"{q} {a}"} for q, a in pairs]
        write_rows(root / "two.json", both)
        write_rows(root / "renamed.json", [{"q": q, "a": a} for q, a in pairs])
        finetune(tiny_config(model_folder, self.names["DATA"], root / "adapter", optim__lr=0.01))

    def tree(self, keys: dict[str, Any]) -> Tree:
        """The config with these keys; OUT and the world's names in values become paths."""
        filled = {name: self._filled(value) for name, value in keys.items()}
        output = Path(filled.pop("output", "OUT"))
        return tiny_config(self.names["MODEL"], self.names["DATA"], output, **filled)

    def see(self, probe: Probe, tree: Tree) -> Any:
        """What the probe sees; a config is looked at once."""
        key = (probe.__name__, json.dumps(tree, sort_keys=True))
        if key not in self.seen:
            self.seen[key] = self.fresh(probe, tree)
        return self.seen[key]

    def fresh(self, probe: Probe, tree: Tree) -> Any:
        folder = self.root / f"run-{next(self.number)}"
        text = json.dumps(tree).replace('"OUT', f'"{folder}/out')
        with contextlib.redirect_stdout(io.StringIO()):
            return plain(probe(json.loads(text)), folder)

    def _filled(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        first, slash, rest = value.partition("/")
        return f"{self.names[first]}{slash}{rest}" if first in self.names else value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        modules = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        patch.syspath_prepend(str(modules))
        patch.setenv("XDG_CACHE_HOME", str(modules))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield World(tmp_path_factory.mktemp("world"), model_folder("llama"))
        torch.set_num_threads(threads)


def config_of(tree: Tree) -> RunConfig:
    return resolved(tree).config


def finished(tree: Tree) -> Path:
    finetune(tree)
    return Path(tree["output"])


def outcome(make: Callable[[], Any]) -> Any:
    """What `make` gives, or why it is refused."""
    try:
        return make()
    except LuthierError as error:
        return f"{type(error).__name__}: {error}"


def plain(value: Any, folder: Path) -> str:
    """As text, without the run's own folder."""
    return repr(value).replace(str(folder), "RUN")
