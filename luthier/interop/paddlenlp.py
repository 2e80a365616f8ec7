"""PaddleNLP's fine-tuning arguments -> our config, as their published document means them.

Every argument is translated here, or accepted because it cannot change a result (listed once), or was
refused by `paddlenlp_arguments.py`. The document's defaults hold for what is not given. `read.py`
recognises the files and merges them with overrides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.config import METRICS
from luthier.configfile import Layer
from luthier.errors import Refused, suggest
from luthier.interop import paddlenlp_pretrain as pretrain
from luthier.interop.paddlenlp_arguments import FALSE, TRUE, Arguments, check
from luthier.interop.paddlenlp_layout import layout
from luthier.interop.paddlenlp_lengths import lengths
from luthier.interop.paddlenlp_methods import adapter, quantize

KEEP_ALL = 1_000_000  # checkpoint.keep for a file without save_total_limit


@dataclass
class Translation:
    """What has been translated so far."""

    arguments: Arguments
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, *names: str) -> None:
        """Set our `key`; of the arguments `names` that decide it, the first one given is its origin."""
        self.values[key] = value
        given = [name for name in names if name in self.arguments]
        self.origins[key] = self.arguments.origin((given or names)[0])

    def copy(self, key: str, name: str) -> None:
        """Set our `key` to an argument as it is, if it was given."""
        if name in self.arguments:
            self.put(key, self.arguments[name], name)


def translate(
    given: Mapping[str, Any], origins: Mapping[str, str], processes: int = 1
) -> tuple[Layer, list[str]]:
    """Our keys for PaddleNLP's arguments (plain values or words), and remarks. Raises `Refused`.

    In one process the file's parallel settings are off (rule 3 of the contract).
    """
    arguments, remarks = check(given, origins)
    t = Translation(arguments, remarks=remarks)
    if pretrain.is_pretraining(arguments):
        parts = (_model, pretrain.model, pretrain.data, lengths, adapter, quantize, _optim, _course)
    else:
        parts = (_model, _data, lengths, adapter, quantize, _optim, _course)
    parts += (_evaluation, _checkpoints, _log)
    parts += (pretrain.rest,) if pretrain.is_pretraining(arguments) else ()
    for part in parts:
        part(t, arguments)
    layout(t, arguments, processes)
    return Layer(t.values, t.origins), t.remarks


def jobs(given: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Our commands for what `do_train`, `do_eval` and `do_predict` ask for, in their order."""
    arguments, _ = check(given, origins)
    found = [] if arguments["do_train"] is False else ["finetune"]
    if not found and (arguments["do_eval"] or arguments["evaluation_strategy"] != "no"):
        found.append("evaluate")
    if pretrain.is_pretraining(arguments):
        return found  # its do_predict is a loss, no answers
    return found + ["predict"] * arguments["do_predict"]


def _choice(t: Translation, name: str, known: Mapping[str, Any]) -> Any:
    """One of an argument's words, translated."""
    value = str(t.arguments[name])
    if value not in known:
        raise Refused(f"{name}={value}", f"known here: {', '.join(known)}", suggest(value, known))
    return known[value]


def _model(t: Translation, a: Arguments) -> None:
    t.copy("model.path", "model_name_or_path")
    if a["bf16"] and a["fp16"]:
        raise Refused("bf16=true and fp16=true", "they exclude each other", "keep one")
    half = "bfloat16" if a["bf16"] else "float16" if a["fp16"] else None
    level = _choice(t, "fp16_opt_level", {"O0": 0, "O1": 1, "O2": 2})
    pure = half is not None and level == 2
    # O2: half-precision weights with float32 masters; O1: autocast over float32 weights
    t.put("model.dtype", half if pure else "float32", "bf16", "fp16", "fp16_opt_level")
    if half is not None and level == 1:
        t.put("model.autocast", half, "fp16_opt_level", "bf16", "fp16")
    for name, kind in (("bf16_full_eval", "bfloat16"), ("fp16_full_eval", "float16")):
        if a[name] and not (pure and half == kind):
            raise Refused(
                f"{name}=true",
                "evaluation runs in the precision of training",
                f"leave it out, or train with {name[:4]}=true and fp16_opt_level=O2",
            )
    if a["no_cuda"]:
        t.put("model.device", "cpu", "no_cuda")
    elif "device" in a:
        kind, _, index = a["device"].partition(":")
        device = _choice_of_device(kind)
        t.put("model.device", f"{device}:{index}" if index else device, "device")
    if not a["continue_training"]:
        t.put("model.init", "random", "continue_training")
    for name, fields in DROPOUT.items():
        if name in a:
            _check_dropout(t, name, fields)


def _choice_of_device(kind: str) -> str:
    devices = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}
    if kind not in devices:
        raise Refused(
            f"device={kind}", "known here: gpu, cpu", "leave it out to take what is there"
        )
    return devices[kind]


DROPOUT = {  # PaddleNLP's argument -> the rates in config.json that it would set
    "hidden_dropout_prob": ("hidden_dropout_prob hidden_dropout dropout resid_pdrop embd_pdrop"),
    "attention_probs_dropout_prob": ("attention_probs_dropout_prob attention_dropout attn_pdrop"),
}


def _check_dropout(t: Translation, name: str, fields: str) -> None:
    """The model's own config decides its dropout: accept the argument only where both agree."""
    wanted = t.arguments[name]
    config = _json_object(Path(str(t.arguments["model_name_or_path"])) / "config.json")
    if config is None:
        t.remarks.append(f"{name}={wanted:g} is not applied: the model's own config.json decides")
        return
    other = {f: config[f] for f in fields.split() if config.get(f, wanted) != wanted}
    if other:
        raise Refused(
            f"{name}={wanted:g}",
            f"the model's config.json has {', '.join(f'{f}={v}' for f, v in other.items())}, and that decides",
            f"change it there, or leave {name} out",
        )


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _data(t: Translation, a: Arguments) -> None:
    if ignored := [n for n in ("max_seq_length", "tokenizer_name_or_path") if n in a]:
        t.remarks.append(f"not read by run_finetune.py: {', '.join(ignored)}")
    if "dataset_name_or_path" in a:
        path = a["dataset_name_or_path"]
        # a task names a part of a built-in data set; a folder of files has none
        task = "" if a["task_name"] is None or Path(path).exists() else f"/{a['task_name']}"
        t.put("data.path", f"{path}{task}", "dataset_name_or_path")
    packing = "none"
    if a["zero_padding"] or a["flash_mask"]:
        packing = "greedy" if a["greedy_zero_padding"] else "sequential"
    t.put("data.packing", packing, "zero_padding", "flash_mask")
    t.put("data.length", a["max_length"], "max_length")
    t.put("data.source_length", a["src_length"], "src_length")
    t.copy("data.lazy", "lazy")
    if a["autoregressive"]:
        t.put("data.format", "text", "autoregressive")
        t.put("data.columns", {"text": "src"}, "autoregressive")
    _template(t, a)


def _template(t: Translation, a: Arguments) -> None:
    given, model = a["chat_template"], a["model_name_or_path"]
    if given is None and a.legacy:
        t.values["data.template"] = "none"
        t.origins["data.template"] = "PaddleNLP's default before 3.0 (the file has 2.6's names)"
    elif given is None or given == model:
        own = Path(str(model)) / "chat_template.json"
        if "conversation" in (_json_object(own) or {}):  # PaddleNLP's file, not transformers'
            t.put("data.template", str(own), "chat_template")
    elif given == "none":
        t.put("data.template", "none", "chat_template")
    else:
        file = Path(given) / "chat_template.json" if Path(given).is_dir() else Path(given)
        if not file.is_file():
            raise Refused(
                f"chat_template={given}",
                f"there is no file {file}",
                "give none, a file or its folder",
            )
        t.put("data.template", str(file), "chat_template")


def _optim(t: Translation, a: Arguments) -> None:
    t.put("optim.lr", a["learning_rate"], "learning_rate")
    known = {"adamw": "adamw", "adamw_mini": "adamw_mini", "adafactor": "adafactor"}
    t.put("optim.name", _choice(t, "optim", known), "optim")
    if "adam_beta1" in a or "adam_beta2" in a:
        t.put("optim.betas", [a["adam_beta1"], a["adam_beta2"]], "adam_beta1", "adam_beta2")
    t.copy("optim.eps", "adam_epsilon")
    t.copy("optim.weight_decay", "weight_decay")
    if "max_grad_norm" in a:
        t.put("optim.clip", max(a["max_grad_norm"], 0.0), "max_grad_norm")
    if "input_dir" in a and pretrain.schedule(t, a):
        return
    schedules = {
        name: name
        for name in ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
    }
    schedule = _choice(t, "lr_scheduler_type", schedules)
    t.put("optim.schedule", schedule.removesuffix("_with_warmup"), "lr_scheduler_type")
    if schedule == "cosine":
        t.copy("optim.cycles", "num_cycles")
    if schedule == "polynomial":
        t.copy("optim.lr_end", "lr_end")
        t.copy("optim.power", "power")
    if a["decay_steps"] > 0 and not schedule.startswith("constant"):
        t.put("optim.decay_steps", a["decay_steps"], "decay_steps")
    warmup = "warmup_steps" if a["warmup_steps"] > 0 else "warmup_ratio"
    if schedule == "constant" and a[warmup]:
        t.remarks.append(
            f"{warmup} is not used: lr_scheduler_type=constant has no warm-up in PaddleNLP; "
            "constant_with_warmup has"
        )
    elif warmup == "warmup_ratio" and not 0 <= a[warmup] < 1:
        raise Refused(
            f"warmup_ratio={a[warmup]:g}", "expected a share below 1", "give warmup_steps"
        )
    elif a[warmup]:
        t.put("optim.warmup", a[warmup], warmup)


def _course(t: Translation, a: Arguments) -> None:
    if a["max_steps"] > 0:
        t.put("train.steps", a["max_steps"], "max_steps")
    else:
        t.put("train.epochs", a["num_train_epochs"], "num_train_epochs")
    t.put("train.micro_batch", a["per_device_train_batch_size"], "per_device_train_batch_size")
    t.put("train.accumulation", a["gradient_accumulation_steps"], "gradient_accumulation_steps")
    t.copy("train.seed", "seed")
    if a["recompute"]:
        parts = {"full": "layer", "full_attn": "selective", "core_attn": "selective"}
        how = _choice(t, "recompute_granularity", parts)
        t.put("train.recompute", how, "recompute_granularity", "recompute")
        if how == "layer":
            _refined(t, str(a["refined_recompute"]))
    if a["do_train"] is False:
        t.remarks.append(
            "do_train is false: luthier evaluate or predict does what the file asks for"
        )
    if a["do_predict"] and "input_dir" not in a:
        t.remarks.append("do_predict is true: run luthier predict with this file afterwards")


# operations that PaddleNLP leaves out of refined_recompute, with a warning, without tensor parallelism
_COLUMNS = ("attention_column_ln", "attention_row_ln", "mlp_column_ln", "mlp_row_ln")


def _refined(t: Translation, text: str) -> None:
    """`flash_attn:n` as `train.keep_attention`; products of cut layers are told, not kept."""
    for word in filter(None, (part.strip() for part in text.split(","))):
        op, _, number = word.partition(":")
        number = number.strip()
        if op not in (*_COLUMNS, "flash_attn") or not number.removeprefix("-").isdigit():
            raise Refused(
                f"refined_recompute={text}",
                f"'{word}' is not of the form operation:layers with one of flash_attn, {', '.join(_COLUMNS)}",
                'give "flash_attn:-1", or leave it out',
            )
        if op == "flash_attn":
            t.put("train.keep_attention", max(-1, int(number)), "refined_recompute")
        elif int(number):
            t.remarks.append(
                f"refined_recompute: {op} is recomputed with its layer; train.recompute=selective keeps "
                "the products of all layers"
            )


def _every(t: Translation, a: Arguments, strategy: str, steps: int) -> int | str:
    return _choice(t, strategy, {"no": "never", "epoch": "epoch", "steps": steps})


def _evaluation(t: Translation, a: Arguments) -> None:
    steps = a["eval_steps"] or a["logging_steps"]
    every = _every(t, a, "evaluation_strategy", steps)
    if every == "never" and a["do_eval"]:  # PaddleNLP takes do_eval alone as a strategy by steps
        t.put("evaluate.every", steps, "do_eval")
    else:
        t.put("evaluate.every", every, "evaluation_strategy")
    t.put("evaluate.micro_batch", a["per_device_eval_batch_size"], "per_device_eval_batch_size")
    if a["max_evaluate_steps"] > 0:
        rows = a["max_evaluate_steps"] * a["per_device_eval_batch_size"]
        t.put("evaluate.rows", rows, "max_evaluate_steps")
    if a["eval_with_do_generation"]:
        t.put("evaluate.generate", True, "eval_with_do_generation")
        t.copy("evaluate.save", "save_generation_output")
        # PaddleNLP generates until prompt and answer together have max_length tokens
        t.put("evaluate.max_new_tokens", max(a["max_length"] - 1, 1), "max_length")
    t.copy("evaluate.top_k", "top_k")
    t.copy("evaluate.top_p", "top_p")


def _checkpoints(t: Translation, a: Arguments) -> None:
    if "output_dir" in a:
        t.put("output", a["output_dir"], "output_dir")
    best = a["load_best_model_at_end"] and t.values["evaluate.every"] != "never"
    every = _every(t, a, "save_strategy", a["save_steps"])
    if best and every == "never":
        if "save_strategy" in a:
            raise Refused(
                "load_best_model_at_end=true and save_strategy=no",
                "without checkpoints there is no best one to load",
                "give save_strategy=epoch, or load_best_model_at_end=false",
            )
        t.put("checkpoint.every", t.values["evaluate.every"], "load_best_model_at_end")
    else:
        t.put("checkpoint.every", every, "save_strategy")
    limit = a["save_total_limit"]
    t.put("checkpoint.keep", limit if limit and limit > 0 else KEEP_ALL, "save_total_limit")
    if best:
        t.put("checkpoint.best", _best(t, a), "metric_for_best_model", "load_best_model_at_end")
    else:
        t.put("checkpoint.best", "none", "load_best_model_at_end")
    resume = str(a["resume_from_checkpoint"] or "")
    if resume and resume.lower() not in TRUE | FALSE:
        t.put("checkpoint.resume", resume, "resume_from_checkpoint")
    elif a["overwrite_output_dir"] and resume.lower() not in TRUE:
        t.put("checkpoint.resume", "never", "overwrite_output_dir")
        t.remarks.append(
            "overwrite_output_dir: a folder that holds another run is refused, not overwritten; remove it first"
        )
    else:  # a run in output_dir is taken up, unless told otherwise
        t.put("checkpoint.resume", "auto", "resume_from_checkpoint", "overwrite_output_dir")


def _best(t: Translation, a: Arguments) -> str:
    """Name of the metric that decides, without PaddleNLP's prefix `eval_`."""
    given = str(a["metric_for_best_model"] or "loss")
    spelt = given.removeprefix("eval_").lower()
    name = {"ppl": "perplexity", "accuarcy": "accuracy"}.get(spelt, spelt)  # so in 2.6's document
    if name not in METRICS:
        raise Refused(
            f"metric_for_best_model={given}", f"known: {', '.join(METRICS)}", suggest(name, METRICS)
        )
    greater = name not in ("loss", "perplexity")
    if a["greater_is_better"] not in (None, greater):
        raise Refused(
            f"greater_is_better={str(not greater).lower()} for {name}",
            f"the best {name} is the {'largest' if greater else 'smallest'}",
            "leave greater_is_better out",
        )
    return name


def _log(t: Translation, a: Arguments) -> None:
    t.put("log.every", a["logging_steps"], "logging_steps")
    if a["logging_strategy"] != "steps":
        t.remarks.append(
            f"logging_strategy={a['logging_strategy']}: logged by logging_steps all the same"
        )
    if "report_to" in a:
        known = {
            "tensorboard": "tensorboard",
            "visualdl": "tensorboard",
            "wandb": "wandb",
            "swanlab": "swanlab",
        }
        names = [name for item in a["report_to"] for name in item.split(",") if name]
        names = ["tensorboard", "wandb"] if names == ["all"] else [n for n in names if n != "none"]
        if unknown := [name for name in names if name not in known]:
            raise Refused(f"report_to={unknown[0]}", f"known here: {', '.join(known)}, none")
        t.put("log.sinks", list(dict.fromkeys(known[name] for name in names)), "report_to")
        if "visualdl" in names:
            t.remarks.append("report_to=visualdl: TensorBoard files are written in its place")
