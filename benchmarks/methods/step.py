"""One variant's optimiser step, timed in a process of its own: prints one line of JSON.

    python -m benchmarks.methods.step NAME MODEL SHAPE

NAME is a method of the table, `frozen` (forward and the gradient with respect to the embeddings' output, with no
adapter), or `peft` (PEFT's LoRA of the same rank on the same layers, in the same stage). SHAPE `1b` takes two
layers of Llama-3.2-1B's shape with random weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.methods.table import METHODS
from luthier.adapters import attach
from luthier.batch import IGNORE, Batch
from luthier.configfile import from_mapping
from luthier.models import attention
from luthier.models.stage import Stage
from luthier.train.loss import token_loss
from luthier.train.metrics import memory

LENGTHS = (230, 180, 140, 120, 110, 90, 80, 74)  # documents of one row of 1,024 tokens
STEPS, WARM = 5, 2
BIG: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}


def main() -> None:
    name, folder, shape = sys.argv[1:]
    torch.manual_seed(0)
    if shape == "1b":
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**BIG), dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.bfloat16)
    attention.install(model, "auto", train=True)
    stage = Stage(model.train())
    trained = prepare(stage, name)
    batch = make_batch(model.config.vocab_size)
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True) if trained else None
    times = []
    for _ in range(STEPS + WARM):
        begin = time.perf_counter()
        loss = token_loss(stage(batch), batch.labels, stage.head) / batch.num_supervised
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": statistics.median(times[WARM:]), "peak": memory().peak or 0}))


def prepare(stage: Stage, name: str) -> list[torch.nn.Parameter]:
    """Make `stage` the variant `name`; its trained parameters."""
    model = stage.model
    if name == "frozen":
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda layer, args, out: out.requires_grad_(True))
        return []
    if name == "peft":
        options = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        peft.inject_adapter_in_model(options, model)
        return [p for p in model.parameters() if p.requires_grad]
    tree: dict[str, Any] = {"model": {"path": "x"}, "data": {"path": "x"}, "output": "x"}
    attach(model, from_mapping(tree, METHODS[name]).config.adapter, seed=0)
    return [p for p in model.parameters() if p.requires_grad]


def make_batch(vocab: int) -> Batch:
    """One full row of documents; the second half of each is supervised."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (1, sum(LENGTHS)), generator=draw)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    lengths = torch.tensor(LENGTHS)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)[None]
    labels = ids.roll(-1, 1)
    last = lengths.cumsum(0) - 1
    labels[0, last] = IGNORE
    labels[positions < torch.repeat_interleave(lengths, lengths)[None] // 2] = IGNORE
    return Batch(ids, labels, positions, documents, (0,))


if __name__ == "__main__":
    main()
