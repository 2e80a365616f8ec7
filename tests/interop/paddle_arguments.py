"""PaddleNLP arguments that the tests of this folder start from."""

from __future__ import annotations

from typing import Any

ARGUMENTS: dict[str, Any] = {
    "model_name_or_path": "base",
    "dataset_name_or_path": "./data",
    "output_dir": "./out",
}
SFT: dict[str, Any] = {
    **ARGUMENTS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 2,
    "learning_rate": 3e-05,
    "warmup_steps": 30,
    "logging_steps": 5,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "src_length": 256,
    "max_length": 512,
    "fp16": True,
    "fp16_opt_level": "O2",
    "do_train": True,
    "do_eval": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "recompute": True,
    "save_total_limit": 1,
    "zero_padding": True,
}
