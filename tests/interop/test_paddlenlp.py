"""PaddleNLP's arguments: every one translated, accepted as inert, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from paddle_arguments import ARGUMENTS, SFT

from luthier.configfile import Resolved, show
from luthier.errors import Refused
from luthier.interop.paddlenlp_keys import JOBS, OFF
from luthier.interop.read import read_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, words: tuple[str, ...] = (), **arguments: Any) -> Resolved:
    path = folder / "arguments.json"
    path.write_text(json.dumps({**ARGUMENTS, **arguments}, indent=1))
    return read_config([path], words)


def translated(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Dotted keys that the arguments decide -> values."""
    resolved = read(folder, **arguments)
    tree = resolved.config.model_dump(mode="json")
    pairs = (key.partition(".") for key in resolved.origins)
    return {f"{s}{dot}{k}": tree[s][k] if dot else tree[s] for s, dot, k in pairs}


def refusal(folder: Path, *words: str, **arguments: Any) -> str:
    with pytest.raises(Refused) as caught:
        read(folder, words, **arguments)
    return str(caught.value)


# ---- whole files


def test_a_fine_tuning_file(here: Path) -> None:
    assert translated(here, **SFT) == {
        "model.path": "base",
        "model.dtype": "float16",
        "data.path": "./data",
        "data.packing": "sequential",
        "data.length": 512,
        "data.source_length": 256,
        "optim.lr": 3e-5,
        "optim.name": "adamw",
        "optim.schedule": "linear",
        "optim.warmup": 30,
        "train.epochs": 2,
        "train.micro_batch": 4,
        "train.accumulation": 3,
        "train.recompute": "layer",
        "evaluate.every": "epoch",
        "evaluate.micro_batch": 16,
        "output": "./out",
        "checkpoint.every": "epoch",
        "checkpoint.keep": 1,
        "checkpoint.best": "accuracy",
        "checkpoint.resume": "auto",
        "log.every": 5,
    }


def test_the_published_defaults_hold_and_are_marked(here: Path) -> None:
    resolved = read(here)
    config = resolved.config
    assert (config.train.epochs, config.lr, config.model.dtype) == (3.0, 5e-5, "float32")
    assert (config.batch, config.micro_batch, config.evaluate_micro_batch) == (8, 8, 8)
    assert (config.data.length, config.data.source_length, config.data.packing) == (
        2048,
        1024,
        "none",
    )
    assert (config.evaluate.every, config.checkpoint.every, config.checkpoint.best) == (
        "never",
    ) * 2 + ("none",)
    assert (config.checkpoint.keep, config.log.every) == (1_000_000, 500)
    text = show(resolved)
    assert "PaddleNLP's default of num_train_epochs by its document; by its code 1" in text
    assert "PaddleNLP's default of learning_rate by its document; by its code 2e-5" in text
    assert "PaddleNLP's default of save_strategy by its document; by its code steps" in text
    assert "PaddleNLP model_name_or_path (arguments.json:2)" in text


def test_a_lora_file(here: Path) -> None:
    found = translated(here, **SFT, lora=True, lora_rank=16, lora_path="old")
    assert (found["adapter.method"], found["adapter.rank"], found["adapter.path"]) == (
        "lora",
        16,
        "old",
    )
    config = read(here, **SFT, lora=True, lora_rank=16).config
    assert config.adapter.scale_alpha == 32 and config.adapter.targets == "all-linear"


# ---- single arguments

F32 = {"model.dtype": "float32"}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": True}, {**F32, "model.autocast": "bfloat16"}),  # O1 is the default
    ({"fp16": True, "fp16_opt_level": "O1"}, {**F32, "model.autocast": "float16"}),
    ({"fp16": True, "fp16_opt_level": "O0"}, {**F32, "model.autocast": None}),
    ({"fp16_opt_level": "O2"}, {**F32, "model.autocast": None}),
    ({"bf16": "true", "fp16_opt_level": "O2"}, {"model.dtype": "bfloat16", "model.autocast": None}),
    ({"bf16": 1, "fp16_opt_level": "O2", "bf16_full_eval": True}, {"model.dtype": "bfloat16"}),
    ({"device": "gpu:1"}, {"model.device": "cuda:1"}),
    ({"device": "cpu"}, {"model.device": "cpu"}),
    ({}, {"model.device": None}),
    ({"no_cuda": True}, {"model.device": "cpu"}),
    ({"continue_training": 0}, {"model.init": "random"}),
    ({"continue_training": True}, {"model.init": None}),
    ({"task_name": "school_math_0.25M", "dataset_name_or_path": "bellegroup"}, {"data.path": "bellegroup/school_math_0.25M"}),
    ({"zero_padding": True, "greedy_zero_padding": True}, {"data.packing": "greedy"}),
    ({"greedy_zero_padding": True}, {"data.packing": "none"}),
    ({"flash_mask": True}, {"data.packing": "sequential"}),
    ({"intokens": True}, {"data.packing": "sequential", "data.template": "none"}),
    ({"task_name_or_path": "./old"}, {"data.path": "./old", "data.template": "none"}),
    ({"chat_template": "none"}, {"data.template": "none"}),
    ({"chat_template": "base"}, {"data.template": None}),
    ({"autoregressive": True}, {"data.format": "text", "data.columns": {"text": "src"}}),
    ({"lazy": True, "max_steps": 7}, {"data.lazy": True, "train.steps": 7, "train.epochs": None}),
    ({"max_steps": -1, "num_train_epochs": 0.5}, {"train.epochs": 0.5, "train.steps": None}),
    ({"warmup_ratio": 0.1}, {"optim.warmup": 0.1}),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"optim.warmup": 5}),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, {"optim.schedule": "constant", "optim.warmup": 5}),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, {"optim.schedule": "constant", "optim.warmup": None}),
    ({"lr_scheduler_type": "cosine", "num_cycles": 1.5, "lr_end": 1e-6}, {"optim.cycles": 1.5, "optim.lr_end": None}),
    ({"lr_scheduler_type": "polynomial", "lr_end": 1e-6, "power": 2}, {"optim.lr_end": 1e-6, "optim.power": 2}),
    ({"decay_steps": 100}, {"optim.decay_steps": 100}),
    ({"decay_steps": 0}, {"optim.decay_steps": None}),
    ({"optim": "adamw_mini"}, {"optim.name": "adamw_mini"}),
    ({"adam_beta2": 0.95}, {"optim.betas": [0.9, 0.95]}),
    ({"adam_epsilon": 1e-6, "weight_decay": 0.1}, {"optim.eps": 1e-6, "optim.weight_decay": 0.1}),
    ({"max_grad_norm": -1}, {"optim.clip": 0}),
    ({"seed": 7}, {"train.seed": 7}),
    ({"recompute": True, "recompute_granularity": "core_attn"}, {"train.recompute": "selective"}),
    (
        {"recompute": True, "refined_recompute": "flash_attn:-1,mlp_row_ln:0"},
        {"train.recompute": "layer", "train.keep_attention": -1},
    ),
    ({"recompute": True, "refined_recompute": "flash_attn:2"}, {"train.keep_attention": 2}),
    ({"recompute": False, "refined_recompute": "flash_attn:2"}, {"train.keep_attention": None}),
    ({"recompute": False, "recompute_granularity": "full"}, {"train.recompute": None}),
    ({"do_eval": True}, {"evaluate.every": 500}),  # steps, by logging_steps
    ({"do_eval": True, "logging_steps": 20}, {"evaluate.every": 20}),
    ({"do_eval": True, "eval_steps": 30}, {"evaluate.every": 30}),
    ({"evaluation_strategy": "steps", "eval_step": 40}, {"evaluate.every": 40}),
    ({"max_evaluate_steps": 3, "per_device_eval_batch_size": 4}, {"evaluate.rows": 12}),
    (
        {"eval_with_do_generation": True, "top_p": 0.7, "top_k": 5, "save_generation_output": True},
        {"evaluate.generate": True, "evaluate.save": True, "evaluate.top_k": 5, "evaluate.top_p": 0.7, "evaluate.max_new_tokens": 2047},
    ),
    ({"save_strategy": "steps"}, {"checkpoint.every": 500}),
    ({"save_strategy": "steps", "save_step": 80}, {"checkpoint.every": 80}),
    ({"save_total_limit": 3}, {"checkpoint.keep": 3}),
    ({"overwrite_output_dir": True}, {"checkpoint.resume": "never"}),
    ({"resume_from_checkpoint": "out/checkpoint-5"}, {"checkpoint.resume": "out/checkpoint-5"}),
    ({"resume_from_checkpoint": "true", "overwrite_output_dir": True}, {"checkpoint.resume": "auto"}),
    ({"report_to": "none"}, {"log.sinks": []}),
    ({"report_to": ["wandb", "visualdl"]}, {"log.sinks": ["wandb", "tensorboard"]}),
    ({"rslora": True, "lora": True, "lora_rank": 16}, {"adapter.rslora": True, "adapter.alpha": 4.0}),
    ({"lora": True, "lora_plus_scale": 16}, {"adapter.lora_plus": 16.0}),
    ({"lora": True, "pissa": True, "rslora": True}, {"adapter.pissa": True, "adapter.alpha": 8.0}),
    ({"lora": True, "lora_use_mixer": True}, {"adapter.mixer": True}),
    ({"lora": True, "use_mora": True}, {"adapter.method": "mora", "adapter.form": "paddlenlp"}),
    (
        {"prefix_tuning": True, "num_prefix_tokens": 20, "prefix_path": "p"},
        {"adapter.method": "prefix", "adapter.form": "paddlenlp", "adapter.num_prefix_tokens": 20, "adapter.path": "p"},
    ),
    ({"prefix_tuning": True}, {"adapter.num_prefix_tokens": 128}),
    ({"vera": True, "vera_rank": 4}, {"adapter.method": "vera", "adapter.form": "paddlenlp", "adapter.rank": 4}),
    ({"lokr": True, "lokr_rank": 4}, {"adapter.method": "lokr", "adapter.form": "paddlenlp", "adapter.rank": 4}),
    ({"lokr": True, "lokr_dim": 4, "lokr_path": "k"}, {"adapter.path": "k"}),
    (
        {"reft": True, "layers": "0;3", "position": "f2+l4", "intervention_type": "TinyIntervention", "rank": 2},
        {"adapter.method": "reft", "adapter.form": "tiny", "adapter.layers": "0;3"}
        | {"adapter.positions": "f2+l4", "adapter.rank": 2, "adapter.tied": True},
    ),
    (
        {"reft": True, "intervention_type": "LoReftIntervention", "act_fn": "relu", "dropout": 0.1},
        {"adapter.form": "loreft", "adapter.positions": "f7", "adapter.act_fn": "relu", "adapter.dropout": 0.1},
    ),
    (
        {"neftune": True, "neftune_noise_alpha": 3},
        {"adapter.neftune_alpha": 3.0, "adapter.neftune_scaling": "paddlenlp"},
    ),
    ({"learning_rate": None}, {"optim.lr": 5e-5}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "want"), CASES, ids=lambda x: ",".join(map(str, x)))
def test_arguments(here: Path, arguments: dict[str, Any], want: dict[str, Any]) -> None:
    found = translated(here, **arguments)
    assert {key: found.get(key) for key in want} == want


@pytest.mark.parametrize(
    ("metric", "want"),
    [
        (None, "loss"),
        ("eval_loss", "loss"),
        ("ppl", "perplexity"),
        ("accuarcy", "accuracy"),
        ("eval_bleu4", "bleu4"),
    ],
)
def test_the_best_model(here: Path, metric: str | None, want: str) -> None:
    arguments = {"evaluation_strategy": "epoch", "load_best_model_at_end": True}
    generate = {"eval_with_do_generation": want == "bleu4"}
    found = translated(here, **arguments, **generate, metric_for_best_model=metric)
    assert found["checkpoint.best"] == want
    assert found["checkpoint.every"] == "epoch"  # not given: as often as evaluated
    assert translated(here, load_best_model_at_end=True)["checkpoint.best"] == "none"
    assert translated(here, metric_for_best_model="no")["checkpoint.best"] == "none"


def test_templates_of_paddlenlp(here: Path) -> None:
    theirs = json.dumps({"system": "s", "conversation": ["{{user}}", "{{bot}}"], "query": "q"})
    for name in ("base", "other"):
        (here / name).mkdir()
        (here / name / "chat_template.json").write_text(theirs)
    assert translated(here)["data.template"] == "base/chat_template.json"
    assert translated(here, chat_template="other")["data.template"] == "other/chat_template.json"
    file = "other/chat_template.json"
    assert translated(here, chat_template=file)["data.template"] == file
    assert "there is no file" in refusal(here, chat_template="missing.json")
    (here / "base" / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    assert "data.template" not in translated(here)  # transformers reads its own


def test_dropout_is_the_models_own(here: Path) -> None:
    assert "not applied" in read(here, hidden_dropout_prob=0).remarks[0]
    (here / "base").mkdir()
    (here / "base" / "config.json").write_text('{"resid_pdrop": 0.1, "attn_pdrop": 0.0}')
    assert read(here, attention_probs_dropout_prob=0, hidden_dropout_prob=0.1).remarks == []
    assert "resid_pdrop=0.1" in refusal(here, hidden_dropout_prob=0)


def test_a_local_folder_has_no_task(here: Path) -> None:
    (here / "data").mkdir()
    assert translated(here, task_name="x")["data.path"] == "./data"


# ---- refusals

ON: dict[str, Any] = {bool: True, float: 4.0, str: "nf4", int: 3, list: ["a"]}


@pytest.mark.parametrize("name", OFF)
def test_methods_are_refused_only_when_switched_on(here: Path, name: str) -> None:
    switch = OFF[name]
    read(here, **{name: switch.off})
    found = refusal(here, **{name: ON[switch.kind]})
    assert name in found and switch.why in found and switch.do in found


@pytest.mark.parametrize("name", sorted({name for _, names in JOBS for name in names}))
def test_arguments_of_other_jobs_are_refused_by_name(here: Path, name: str) -> None:
    job = next(job for job, names in JOBS if name in names)
    found = refusal(here, **{name: "x"})
    assert name in found and job in found


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"lora_rang": 4}, ["lora_rang=4 (arguments.json:5)", "did you mean 'lora_rank'?"]),
        ({"lora": "maybe"}, ["lora=maybe", "expected true or false"]),
        ({"lora": 2}, ["expected true or false"]),
        ({"max_length": "long"}, ["max_length=long", "expected a whole number"]),
        ({"max_length": 1.5}, ["expected a whole number"]),
        ({"max_length": True}, ["expected a whole number"]),
        ({"learning_rate": [1, 2]}, ["expected a number"]),
        ({"learning_rate": 1000}, ["optim.lr=1000", "PaddleNLP learning_rate (arguments.json:5)"]),
        ({"lora": True, "lora_rank": 0}, ["adapter.rank=0", "at least 1"]),
        ({"bf16": True, "fp16": True}, ["exclude each other"]),
        ({"fp16": True, "fp16_opt_level": "O3"}, ["fp16_opt_level=O3", "O0, O1, O2"]),
        ({"bf16": True, "bf16_full_eval": True}, ["bf16_full_eval=true"]),
        ({"device": "npu"}, ["device=npu", "gpu, cpu"]),
        ({"optim": "adamw_custom"}, ["optim=adamw_custom", "adamw_mini"]),
        ({"lr_scheduler_type": "cosin"}, ["did you mean 'cosine'?"]),
        ({"warmup_ratio": 1.0}, ["warmup_ratio=1", "warmup_steps"]),
        ({"evaluation_strategy": "daily"}, ["known here: no, epoch, steps"]),
        ({"lazy": True}, ["needs train.steps"]),
        ({"report_to": "comet"}, ["report_to=comet"]),
        (
            {"load_best_model_at_end": True, "evaluation_strategy": "epoch", "save_strategy": "no"},
            ["without checkpoints"],
        ),
        (
            {"load_best_model_at_end": True, "do_eval": True, "metric_for_best_model": "beauty"},
            ["metric_for_best_model=beauty", "bleu4"],
        ),
        (
            {"load_best_model_at_end": True, "do_eval": True, "greater_is_better": True},
            ["the best loss is the smallest"],
        ),
        (
            {"do_gptq": True, "do_awq": True, "x": 1},
            ["3 errors", "GPTQ", "AWQ", "x=1"],
        ),
        (
            {"weight_quantize_algo": "llm.int8"},
            ["weight_quantize_algo=llm.int8", "weight_only_int8"],
        ),
        (
            {"weight_quantize_algo": "nf4", "weight_double_quant": True}
            | {"weight_double_quant_block_size": 128},
            ["weight_double_quant_block_size=128", "256"],
        ),
        ({"vera": True, "lora": True}, ["lora=true and vera=true", "keep one"]),
        ({"lora": True, "use_mora": True, "pissa": True}, ["use_mora=true with pissa"]),
        ({"reft": True, "intervention_type": "Loreft"}, ["intervention_type=Loreft", "TinyInter"]),
        ({"reft": True, "position": "first"}, ["adapter.positions=first", "PaddleNLP position"]),
        ({"dataset_name_or_path": None}, ["data.path is needed"]),
    ],
)
def test_messages(here: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    found = refusal(here, **arguments)
    assert all(part in found for part in parts), found


# ---- what is said once


def test_inert_arguments_are_listed_once(here: Path) -> None:
    given = {"unified_checkpoint": True, "disable_tqdm": True, "use_flash_attention": False}
    assert read(here, **given).remarks == [
        "without effect on the result here: disable_tqdm, unified_checkpoint"
    ]


def test_parallel_settings_are_off_in_one_process(here: Path) -> None:
    given = {"tensor_parallel_degree": 4, "sharding": "stage2", "pipeline_parallel_degree": 1}
    resolved = read(here, **given, sequence_parallel=0, sharding_parallel_degree=-1)
    assert resolved.remarks == [
        "one process: the parallel settings are off (tensor_parallel_degree=4, sharding=stage2)"
    ] or resolved.remarks == [
        "one process: the parallel settings are off (sharding=stage2, tensor_parallel_degree=4)"
    ]
    assert resolved.config.batch == 8


def test_an_old_name_wins_over_the_current_one(here: Path) -> None:
    resolved = read(here, intokens=True, zero_padding=False)
    assert resolved.config.data.packing == "sequential"
    assert resolved.remarks == ["intokens=true wins over zero_padding=false"]
