"""TRL's SFTTrainer with PEFT: at its default setting, or at its best. Run as `python run_trl.py JOB`.

`default`: a base in float32 with bf16 autocast, gradient checkpointing, 8 padded conversations a batch, all as
SFTConfig has it; only length, steps, rate and rank are the run's. `best`: a bf16 base, no checkpointing, fused AdamW, and
the packed rows of the run through its padding-free collator. `options`: `best`, `autocast`, `liger`, `compile`.
"""

from __future__ import annotations

import sys
from typing import Any

import datasets
import peft
import watch
from trl import SFTConfig, SFTTrainer


def main() -> None:
    seen = watch.Watch(sys.argv[1])
    job = seen.job
    callback = watch.watch_trainer(seen)
    adapter = None
    if job["method"] == "lora":
        adapter = peft.LoraConfig(
            r=job["rank"],
            lora_alpha=job["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    extra = {"model_init_kwargs": {"dtype": job["dtype"]}} if job["options"]["best"] else {}
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(**settings(job), **extra),
        train_dataset=dataset(job),
        peft_config=adapter,
        callbacks=[callback],
    )
    trainer.train()


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig, but for how the model is read."""
    options = job["options"]
    found: dict[str, Any] = {
        "output_dir": job["work"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "max_length": job["length"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": job["seed"],
        "use_cpu": job["device"] == "cpu",
        "train_sampling_strategy": "sequential",
    }
    if not options["best"]:
        return found
    return found | {
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
        "gradient_checkpointing": False,
        "bf16": options.get("autocast", False),
        "optim": "adamw_torch_fused",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "padding_free": True,
        "max_length": None,  # the rows have their length
        "torch_compile": options.get("compile", False),
        "use_liger_kernel": options.get("liger", False),
    }


def dataset(job: dict[str, Any]) -> Any:
    """The run's packed rows, or its conversations, for TRL to render and pad."""
    if job["options"]["best"]:
        packed = watch.rows(job)
        columns: dict[str, list[Any]] = {
            "input_ids": [row["ids"] for row in packed],
            "labels": [row["labels"] for row in packed],
            "seq_lengths": [row["lengths"] for row in packed],
        }
    else:
        documents = watch.conversations(job)
        columns = {
            "prompt": [messages[:-1] for messages in documents],
            "completion": [messages[-1:] for messages in documents],
        }
    return datasets.Dataset.from_dict(columns)


if __name__ == "__main__":
    main()
