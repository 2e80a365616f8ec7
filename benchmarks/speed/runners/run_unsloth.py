"""Unsloth's model in TRL's trainer, on the packed rows of the run; GPU only. Run as `python run_unsloth.py JOB`.

Written after Unsloth's documentation on a machine without a GPU, where it does not even import: not run yet.
"""

from __future__ import annotations

import sys

import unsloth  # isort: skip - it must come before what it changes
import run_trl
import torch
import watch
from trl import SFTConfig, SFTTrainer


def main() -> None:
    seen = watch.Watch(sys.argv[1])
    job = seen.job
    job["options"]["best"] = True
    callback = watch.watch_trainer(seen)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=job["model"],
        max_seq_length=job["length"],
        dtype=getattr(torch, job["dtype"]),
        load_in_4bit=bool(job["quantize"]),
        full_finetuning=job["method"] == "full",
    )
    if job["method"] == "lora":
        layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=job["rank"],
            lora_alpha=job["alpha"],
            lora_dropout=0,
            target_modules=list(layers),
            use_gradient_checkpointing=False,
            random_state=job["seed"],
        )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**run_trl.settings(job)),
        train_dataset=run_trl.dataset(job),
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
