"""One variant's optimiser step, timed in a process of its own: prints one line of JSON.

    python -m benchmarks.methods.step NAME MODEL SHAPE

NAME is a method of the table, `frozen` (forward and the gradient with respect to the embeddings' output, with no
adapter), `peft` (PEFT's LoRA of the same rank on the same layers, in the same stage), or `peft, plain
transformers` (with transformers' own forward and loss over the same packed row). SHAPE `1b` takes two
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
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.methods.table import METHODS
from luthier.adapters import attach
from luthier.batch import IGNORE, Batch
from luthier.configfile import from_mapping
from luthier.models import attention
from luthier.models.stage import Stage
from luthier.train.loss import token_loss
from luthier.train.metrics import memory

LENGTHS = (140, 110, 90, 70, 50, 30, 14, 8)  # documents of one row of 512 tokens
PEFT = ("peft", "peft, plain transformers")
STEPS, WARM = 5, 1
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
    if name == PEFT[1]:
        model.set_attn_implementation("sdpa")
    else:
        attention.install(model, "auto", train=True)
    stage = Stage(model.train())
    trained = prepare(stage, name)
    batch = make_batch(model.config.vocab_size)
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True) if trained else None
    times = []
    for _ in range(STEPS + WARM):
        begin = time.perf_counter()
        loss = plain_loss(model, batch) if name == PEFT[1] else stage_loss(stage, batch)
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": statistics.median(times[WARM:]), "peak": memory().peak or 0}))


def stage_loss(stage: Stage, batch: Batch) -> Tensor:
    """Luthier's: attention per document, the head over supervised tokens only."""
    return token_loss(stage(batch), batch.labels, stage.head) / batch.num_supervised


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """transformers' own: sdpa with the packed row's mask, all logits, its loss."""
    labels = batch.input_ids.clone()
    labels[:, 1:][batch.labels[:, :-1] == IGNORE] = IGNORE
    labels[:, 0] = IGNORE
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        labels=labels,
        use_cache=False,
    )
    return out.loss


def prepare(stage: Stage, name: str) -> list[torch.nn.Parameter]:
    """Make `stage` the variant `name`; its trained parameters."""
    model = stage.model
    if name == "frozen":
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda layer, args, out: out.requires_grad_(True))
        return []
    if name in PEFT:
        options = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        wrapped: Any = model
        peft.get_peft_model(wrapped, options)  # it changes the model in place
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
