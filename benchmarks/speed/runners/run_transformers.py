"""Plain transformers + PEFT, and bitsandbytes for quantised bases: a loop of ten lines over the very rows of the run.

The rows of a micro-batch are laid behind each other, so that nothing is padded; transformers derives the
borders of documents from positions that restart, and makes the mask of its `sdpa` from them. `options`:
`recompute`. Run as `python run_transformers.py JOB`.
"""

from __future__ import annotations

import sys
from typing import Any

import peft
import torch
import watch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    seen = watch.Watch(sys.argv[1])
    job = seen.job
    torch.manual_seed(job["seed"])
    dtype = getattr(torch, job["dtype"])
    quantised: dict[str, Any] = {}
    if job["quantize"]:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=job["quantize"], bnb_4bit_compute_dtype=dtype
        )
        quantised = {"quantization_config": config, "device_map": {"": job["device"]}}
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, **quantised)
    model.to(job["device"])
    if job["method"] == "lora":
        options = peft.LoraConfig(
            r=job["rank"],
            lora_alpha=job["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, options)
    if job["options"].get("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, job["lr"], weight_decay=0.0, fused=True)
    seen.loaded()
    for step in watch.steps(job):
        seen.begin()
        tokens, supervised = watch.counts(step)
        total = 0.0
        for i in range(0, len(step), job["micro_batch"]):
            batch = flat(step[i : i + job["micro_batch"]], job["device"])
            loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.end(total, tokens, tokens, supervised)


def flat(rows: list[dict[str, Any]], device: str) -> dict[str, torch.Tensor]:
    """One row [1, S] of all documents, their positions counted from 0 each."""
    ids = [i for row in rows for i in row["ids"]]
    labels = [i for row in rows for i in row["labels"]]
    positions = [torch.arange(n) for row in rows for n in row["lengths"]]
    return {
        "input_ids": torch.tensor([ids], device=device),
        "labels": torch.tensor([labels], device=device),
        "position_ids": torch.cat(positions)[None].to(device),
    }


if __name__ == "__main__":
    main()
