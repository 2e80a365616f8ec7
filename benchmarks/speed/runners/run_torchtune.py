"""torchtune's single-device recipes (LoRA, full) on the very rows of the run. Run as `python run_torchtune.py JOB`.

The recipe, model, loss and mask of packed rows are torchtune's; this file gives it rows as its PackedDataset would, and
a logger. Only models of Llama's shape. `options`: `compile`.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import watch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

seen = watch.Watch(sys.argv[1])


class Rows(Dataset):
    """Packed rows as PackedDataset gives them, padded to the run's length where a batch has several."""

    def __init__(self, tokenizer: Any, packed: bool) -> None:
        self.rows = watch.rows(seen.job)
        self.width = seen.job["length"] if seen.job["micro_batch"] > 1 else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        rest = max(self.width - len(row["ids"]), 0)
        lengths = [*row["lengths"], rest] if rest else row["lengths"]
        return {
            "tokens": torch.tensor(row["ids"] + [0] * rest),
            "labels": torch.tensor(row["labels"] + [-100] * rest),
            "input_pos": torch.cat([torch.arange(n) for n in lengths]),
            "seq_lens": torch.tensor(lengths),
        }


class NoTokenizer:
    """The rows are tokenised already."""

    pad_id = 0


class Logger:
    """Ends the watched step where the recipe logs it."""

    def __init__(self) -> None:
        self.steps = watch.steps(seen.job)

    def log_config(self, config: Any) -> None:
        """Nothing to keep."""

    def log_dict(self, values: dict[str, Any], step: int) -> None:
        tokens, supervised = watch.counts(self.steps[step - 1])
        slots = seen.job["length"] * len(self.steps[step - 1])
        slots = slots if seen.job["micro_batch"] > 1 else tokens
        seen.end(float(values["loss"]), tokens, slots, supervised)


def main() -> None:
    sys.modules["runner"] = sys.modules["__main__"]
    job = seen.job
    lora = job["method"] == "lora"
    name = "LoRAFinetuneRecipeSingleDevice" if lora else "FullFinetuneRecipeSingleDevice"
    recipe = recipes("lora" if lora else "full")[name]
    cfg = OmegaConf.create(settings(job, lora))
    run = recipe(cfg=cfg)
    run.setup(cfg=cfg)
    seen.loaded()
    step, accumulation = run._loss_step, job["batch"] // job["micro_batch"]
    calls = 0

    def loss_step(batch: Any) -> Any:
        nonlocal calls
        if calls % accumulation == 0:
            seen.begin()
        calls += 1
        return step(batch)

    run._loss_step = loss_step
    run.train()


def recipes(kind: str) -> dict[str, Any]:
    """The names of a recipe's file: torchtune installs the files, but not as a package."""
    found = importlib.util.find_spec("torchtune")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parents[1] / "recipes"
    return runpy.run_path(str(folder / f"{kind}_finetune_single_device.py"))


def settings(job: dict[str, Any], lora: bool) -> dict[str, Any]:
    """The recipe's config: its published one for a 1B model, with the run's values."""
    shape = json.loads((Path(job["model"]) / "config.json").read_text("utf-8"))
    rope = shape.get("rope_parameters") or {"rope_theta": shape.get("rope_theta", 10000.0)}
    model = {
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": max(job["length"], 2048),
        "rope_base": int(rope["rope_theta"]),
        "norm_eps": shape["rms_norm_eps"],
        "scale_factor": 1,
        "tie_word_embeddings": shape["tie_word_embeddings"],
    }
    names = "torchtune.models.llama3_2."
    if lora:
        model |= {
            "_component_": names + "lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": job["rank"],
            "lora_alpha": job["alpha"],
            "lora_dropout": 0.0,
        }
    else:
        model |= {"_component_": names + "llama3_2"}
    return {
        "output_dir": job["work"],
        "model": model,
        "tokenizer": {"_component_": "runner.NoTokenizer"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job["model"],
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": job["work"],
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": lora,
        "dataset": {"_component_": "runner.Rows", "packed": True},
        "seed": job["seed"],
        "shuffle": False,
        "batch_size": job["micro_batch"],
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": job["lr"],
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        }
        if lora
        else None,
        "optimizer_in_bwd": False,
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": job["steps"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
        "clip_grad_norm": 1.0,
        "compile": job["options"].get("compile", False),
        "metric_logger": {"_component_": "runner.Logger"},
        "log_every_n_steps": 1,
        "device": job["device"],
        "dtype": {"bfloat16": "bf16", "float32": "fp32"}[job["dtype"]],
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


if __name__ == "__main__":
    main()
