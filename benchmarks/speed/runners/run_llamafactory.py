"""LLaMA-Factory at its best for one process: packing, a bf16 base, no checkpointing. Run as `python run_llamafactory.py JOB`.

It reads the run's conversations in the order in which the packed rows hold them and packs them itself, so its
rows are its own. `options`: `neat`, its packing that keeps documents apart.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import transformers  # noqa: F401 - before what follows, so that it sees that there is none
import watch

if importlib.util.find_spec("torchaudio") is None:
    # it imports torchaudio whatever it trains; a CPU build of torch has none that loads, and text needs none
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from llamafactory.train.tuner import run_exp


def main() -> None:
    seen = watch.Watch(sys.argv[1])
    job = seen.job
    callback = watch.watch_trainer(seen)
    folder = Path(job["work"]) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    documents = [{"messages": messages} for messages in watch.conversations(job)]
    (folder / "rows.json").write_text(json.dumps(documents), "utf-8")
    names = {"role_tag": "role", "content_tag": "content"}
    names |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    about = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
    }
    info = {"rows": {**about, "tags": names}}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    args: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "lora" if job["method"] == "lora" else "full",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": job["options"].get("template", "smollm2"),
        "cutoff_len": job["length"],
        "packing": True,
        "neat_packing": job["options"].get("neat", False),
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "output_dir": str(Path(job["work"]) / "out"),
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "max_steps": job["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": job["dtype"] == "bfloat16",
        "pure_bf16": False,
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "optim": "adamw_torch_fused",
        "seed": job["seed"],
        "use_cpu": job["device"] == "cpu",
    }
    if job["method"] == "lora":
        args |= {"lora_rank": job["rank"], "lora_alpha": job["alpha"], "lora_target": "all"}
    else:
        # its bf16 alone is autocast over float32 weights; this is the faster way
        args |= {"pure_bf16": True, "bf16": False}
    run_exp(args, callbacks=[callback])


if __name__ == "__main__":
    main()
