"""The configuration: a tree of frozen pydantic models, the single list of what a user may ask for.

Each key is documented here (the reference page and the JSON schema are made from it). This file holds
names, types, defaults and the checks that need nothing but the config itself; `configfile.py` reads
files and overrides. It imports neither torch nor transformers, so that `luthier show` is instant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.config_adapter import GENERAL as GENERAL
from luthier.config_adapter import AdapterConfig as AdapterConfig
from luthier.config_data import DataConfig as DataConfig
from luthier.config_data import DataPart as DataPart
from luthier.config_optim import SCHEDULES as SCHEDULES
from luthier.config_optim import OptimConfig, Positive, Section
from luthier.config_parallel import ParallelConfig
from luthier.config_quantize import QuantizeConfig as QuantizeConfig
from luthier.config_rope import RopeScaling as RopeScaling

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Every = Annotated[int, Field(ge=1)] | Literal["epoch", "end", "never"]

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
MINIMISED = {"loss", "perplexity"}  # metrics of which the smallest is best
METRICS = ("loss", "perplexity", "accuracy", "bleu4", "rouge1", "rouge2", "rougel")
GENERATED = {"bleu4", "rouge1", "rouge2", "rougel"}  # metrics that need evaluate.generate


class ModelConfig(Section):
    path: str = Field(description="Model to start from: a Hugging Face folder, or a hub name.")
    dtype: Dtype = Field(
        "auto",
        description="Type of the weights and of computation. `auto` is the checkpoint's, or bfloat16 "
        "where the device computes fast in it. Short forms (bf16, fp16, fp32) are accepted.",
    )
    master_dtype: Literal["float32", "none"] = Field(
        "float32",
        description="Keep a float32 copy of half-precision weights that are trained, or not.",
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field(
        "none",
        description="Compute matrix products in this type over weights kept in `dtype` (the suites' O1; "
        "their O2 is half-precision `dtype` with a float32 master copy).",
    )
    attention: Literal["auto", "math", "sdpa", "native", "flex", "varlen", "flash"] = Field(
        "auto",
        description="Attention kernel. `auto`: `flex` on GPU; on CPU `native` (C++, bfloat16) where it can be built, else "
        "`sdpa` per document. `varlen` and "
        "`flash` need a GPU, so does training with `flex`; `flash` also needs the package flash-attn.",
    )
    device: str = Field(
        "auto", description="`auto` (GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."
    )
    tokenizer: str | None = Field(
        None, description="Folder or hub name of the tokenizer. Default: the model's own."
    )
    num_layers: Positive | None = Field(
        None, description="Build only the first n layers of the checkpoint. Default: all."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Read the weights, or start from random ones of the same shape."
    )
    misfits: Literal["refuse", "accept"] = Field(
        "refuse",
        description="What to do with a checkpoint whose tensors do not fit its config.json. `accept`: those that are missing "
        "or of another shape start from random values, unexpected ones are left out, and a note names them; for full "
        "fine-tuning of a base that is not quantised.",
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Stretch rotary positions to longer documents: {type: linear, ntk, dynamic, yarn, llama3 or "
        "yarn_paddlenlp, factor: 4}, or `model.rope_scaling.factor=4` on the command line. It is written into the "
        "saved model's config.json. Refused for families without rotary positions.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for authors you trust."
    )

    @field_validator("dtype", "autocast", mode="before")
    @classmethod
    def _short_dtype(cls, value: Any) -> Any:
        return DTYPE_NAMES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _autocast(self) -> ModelConfig:
        if self.autocast != "none" and self.dtype != "float32":
            raise ValueError(
                f"model.autocast={self.autocast} computes with float32 weights in {self.autocast} and "
                f"needs model.dtype=float32, not {self.dtype}"
            )
        return self


class TrainConfig(Section):
    mode: Literal["sft", "pretrain"] = Field(
        "sft",
        description="`sft`: fine-tuning on prompts with answers, or texts of one row each. `pretrain`: text or token files laid end to end in rows of data.length tokens; with model.init=random from scratch.",
    )
    steps: Positive | None = Field(
        None, description="Optimiser steps; wins over tokens and epochs."
    )
    epochs: Annotated[float, Field(gt=0)] = Field(3, description="Passes over the data.")
    tokens: Positive | None = Field(
        None, description="Stop after this many real tokens; wins over epochs."
    )
    batch: Positive = Field(
        8, description="Rows per optimiser step over all devices; it alone decides the result."
    )
    micro_batch: Positive | None = Field(
        None, description="Rows per device and forward. Default: the whole batch on one device."
    )
    accumulation: Positive | None = Field(
        None,
        description="Given instead of `batch`: batch = micro_batch x accumulation x data ranks.",
    )
    recompute: Literal["none", "layer", "selective"] = Field(
        "none",
        description="Trade time for memory: keep only each layer's input (`layer`), or also the results of "
        "its matrix products (`selective`).",
    )
    keep_attention: Annotated[int, Field(ge=-1)] = Field(
        0,
        description="With `recompute: layer`: the first n layers keep what attention gives, too; -1 = all of them.",
    )
    compile: bool = Field(False, description="Compile the layers with torch.compile.")
    rehearse: Literal["auto"] | bool = Field(
        "auto",
        description="Before the first step, compute the largest step and evaluation batch and copy what a save copies, "
        "so that what does not fit in memory is refused then; nothing else comes of it. `auto`: on a GPU.",
    )
    router_loss: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Mixtures of experts: weight of the loss that balances the experts. Default: "
        "`router_aux_loss_coef` of config.json where its `output_router_logits` is true, else 0.",
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is NaN or infinite ends the run (`stop`) or updates nothing "
        "(`skip`). Its rows are written to `output`/not_finite either way.",
    )
    max_nan_steps: Positive = Field(
        10,
        description="With on_nan=skip: so many such steps in a row are passed over, one more ends the run.",
    )
    hang_timeout: Annotated[float, Field(gt=0)] | Literal["never"] = Field(
        1800.0,
        description="Seconds without a finished step after which the stack of every process is written to "
        "`output`/stacks and the run ends. The first step, evaluations and saving have six times as long, and any step ten "
        "times the slowest one so far.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        42, description="Order of rows, dropout, initial values."
    )

    @model_validator(mode="after")
    def _kept(self) -> TrainConfig:
        if self.keep_attention and self.recompute != "layer":
            raise ValueError(
                f"train.keep_attention={self.keep_attention} says what train.recompute=layer keeps, and "
                f"train.recompute is {self.recompute}; give train.recompute=layer, or leave it out"
            )
        if self.keep_attention and self.compile:
            raise ValueError(
                "train.keep_attention cannot see into the layers that train.compile compiles; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _batch(self) -> TrainConfig:
        if self.accumulation is not None:
            if "batch" in self.model_fields_set:
                raise ValueError(
                    "train.batch and train.accumulation were both given: batch = micro_batch x accumulation; give one"
                )
            if self.micro_batch is None:
                raise ValueError("train.accumulation needs train.micro_batch")
        elif self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"train.batch={self.batch} is no multiple of train.micro_batch={self.micro_batch}; "
                f"{_nearest_divisor(self.batch, self.micro_batch)} would divide it"
            )
        return self


def _nearest_divisor(n: int, near: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))


class EvaluateConfig(Section):
    every: Every = Field(
        "epoch", description="Evaluate every n steps, each `epoch`, at the `end`, or `never`."
    )
    before: bool = Field(False, description="Also evaluate before the first step, to compare with.")
    generate: bool = Field(
        False, description="Also generate answers and score them with BLEU-4 and ROUGE."
    )
    rows: Positive | None = Field(
        None, description="Use only the first n evaluation rows. Default: all."
    )
    micro_batch: Positive | None = Field(
        None, description="Rows per forward. Default: train.micro_batch."
    )
    max_new_tokens: Positive = Field(256, description="Longest generated answer.")
    top_k: Annotated[int, Field(ge=0)] = Field(
        1, description="Sample among the k likeliest tokens; 1 = greedy, 0 = all."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample among the tokens that hold this probability mass."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Softens (> 1) or sharpens (< 1) the distribution; 0 = greedy."
    )
    save: bool = Field(
        False, description="Write generated_output.json at each evaluation that generates."
    )


class PredictConfig(Section):
    input: str | None = Field(
        None,
        description="File of rows to answer. Default: the test, dev or validation part of the data.",
    )
    output: str | None = Field(
        None, description="File to write. Default: predictions.jsonl in `output`."
    )


class CheckpointConfig(Section):
    every: Every = Field(
        "epoch", description="Save every n steps, each `epoch`, at the `end`, or `never`."
    )
    keep: Positive = Field(2, description="Keep the newest n checkpoints, and the best.")
    best: Literal[
        "loss", "perplexity", "accuracy", "bleu4", "rouge1", "rouge2", "rougel", "none"
    ] = Field(
        "loss",
        description="Metric of the best model, which becomes the final one; `none`: the last model is the final one.",
    )
    resume: str = Field(
        "never",
        description="`never`, `auto` (newest whole checkpoint in `output`, or a fresh start), or a checkpoint folder.",
    )
    background: bool = Field(
        True,
        description="Write checkpoints while the training goes on, from a copy in memory; off saves that memory.",
    )

    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="A checkpoint that cannot be written (disk full, read-only) is told and left out (`continue`), or "
        "ends the run (`stop`). The last one of a run is tried again a few times, then the run fails.",
    )


class LogConfig(Section):
    every: Positive = Field(1, description="Log every n steps.")
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = Field(
        ("tensorboard",), description="Where metrics go besides the console and metrics.jsonl."
    )
    progress: Literal["auto", "rich", "plain", "none"] = Field(
        "auto",
        description="`rich` live progress, `plain` lines, or nothing. `auto`: rich on a terminal.",
    )


class RunConfig(Section):
    """Everything one run is. Sections are documented in docs/reference/config.md."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig.model_validate({})
    quantize: QuantizeConfig = QuantizeConfig.model_validate({})
    optim: OptimConfig = OptimConfig.model_validate({})
    train: TrainConfig = TrainConfig.model_validate({})
    evaluate: EvaluateConfig = EvaluateConfig.model_validate({})
    predict: PredictConfig = PredictConfig.model_validate({})
    checkpoint: CheckpointConfig = CheckpointConfig.model_validate({})
    parallel: ParallelConfig = ParallelConfig.model_validate({})
    log: LogConfig = LogConfig.model_validate({})
    output: str = Field(
        description="Folder of the run; refused if it holds another run and resume is `never`."
    )

    @model_validator(mode="after")
    def _across(self) -> RunConfig:
        if self.checkpoint.best in GENERATED and not self.evaluate.generate:
            raise ValueError(f"checkpoint.best={self.checkpoint.best} needs evaluate.generate=true")
        if self.data.lazy and self.train.steps is None and self.train.tokens is None:
            raise ValueError(
                "data.lazy=true needs train.steps or train.tokens: the number of rows is not known beforehand"
            )
        self._check_mode()
        if self.data.lazy and self.data.validation_share and self.train.mode == "sft":
            raise ValueError(
                "data.validation_share cannot be taken from lazy data; give data.validation_path"
            )
        whole = self.adapter.method == "none" and self.adapter.path is None
        if self.model.misfits == "accept" and not (whole and not self.quantize.on):
            raise ValueError(
                "model.misfits=accept is for full fine-tuning of a base that is not quantised: what starts from random "
                "values has to be trained, and saved with the model. Train such a model whole first"
            )
        if whole:
            for name in self.adapter.changed().keys() - GENERAL:
                raise ValueError(
                    f"adapter.{name} has no meaning for adapter.method=none; add adapter.method=lora"
                )
        return self

    def _check_mode(self) -> None:
        """Refuse what has no meaning in the mode of the run."""
        data, pretraining = self.data, self.train.mode == "pretrain"
        own = {"split", "borders", "cache"}
        others = {"packing", "overlong", "source_length", "template", "supervise"}
        for key in sorted((others if pretraining else own) & data.model_fields_set):
            if getattr(data, key) != type(data).model_fields[key].default:
                raise ValueError(
                    f"data.{key} has no meaning for train.mode={self.train.mode}"
                    + ("" if pretraining else "; add train.mode=pretrain")
                )
        if not pretraining:
            return
        formats = {data.format} | {p.format for p in data.path if isinstance(p, DataPart)}
        if other := formats - {"auto", "text"}:
            raise ValueError(
                f"data.format={min(other)} with train.mode=pretrain, which learns text; "
                "name the field of the text with data.columns.text"
            )
        if data.pose == "paddlenlp":
            raise ValueError(
                "data.pose=paddlenlp takes two chunks of one text, and a row of train.mode=pretrain is cut out of "
                "many; use data.pose=paper"
            )
        for key in ("validation_share", "validation_path"):
            if data.split is not None and getattr(data, key):
                raise ValueError(f"data.split and data.{key} exclude each other; give one")
        if self.evaluate.generate:
            raise ValueError(
                "evaluate.generate=true with train.mode=pretrain: texts have no answers to compare"
            )

    @property
    def lr(self) -> float:
        """Peak learning rate with its default filled in."""
        if self.optim.lr is not None:
            return self.optim.lr
        return 5e-5 if self.adapter.method == "none" else 3e-4

    @property
    def batch(self) -> int:
        """Rows per optimiser step on one data rank's world; accumulation resolved."""
        if self.train.accumulation is not None:
            return self.train.accumulation * (self.train.micro_batch or 1)
        return self.train.batch

    @property
    def micro_batch(self) -> int:
        """Rows per forward in training."""
        return self.train.micro_batch or self.batch

    @property
    def evaluate_micro_batch(self) -> int:
        return self.evaluate.micro_batch or self.micro_batch
