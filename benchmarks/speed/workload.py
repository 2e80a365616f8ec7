"""What is trained on: the run's config, its packed rows as files for the peers, its floating-point work.

The rows are those that `luthier finetune` takes, in its order, written with unshifted labels as others
expect them; beside them the conversations in the order in which these rows hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier.assemble import open_data, open_text
from luthier.batch import IGNORE, PADDING
from luthier.configfile import from_mapping
from luthier.data.dataset import Dataset

QUIET = (
    *("evaluate.every=never", "checkpoint.every=never", "checkpoint.best=none"),
    *("log.sinks=[]", "log.progress=none", "optim.schedule=constant"),
)
# a Llama of 1.2 billion parameters (the shape of Llama-3.2-1B), random weights
BILLION: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    **{"tie_word_embeddings": True, "max_position_embeddings": 8192},
}


@dataclass(frozen=True)
class Work:
    """Files and sizes of one job of the benchmark; `job` is what every runner reads."""

    job: dict[str, Any]
    tokens: list[int]  # real tokens of each step
    supervised: list[int]
    flops: float  # of an average step, without attention
    attention_flops: float


def make(folder: Path, kind: str, settings: dict[str, Any], overrides: tuple[str, ...]) -> Work:
    """Write config, rows and conversations of job `kind` (lora, full, qlora) into `folder`.

    `settings`: model, data, length, batch, micro_batch, steps, rank, lr, dtype, device, seed, threads, quantize.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lora = kind != "full"
    words = [
        *(f"model.dtype={settings['dtype']}", f"model.device={settings['device']}"),
        *(f"data.length={settings['length']}", f"train.batch={settings['batch']}"),
        *(f"train.micro_batch={settings['micro_batch']}", f"train.steps={settings['steps']}"),
        *(f"train.seed={settings['seed']}", f"optim.lr={settings['lr']}", *QUIET),
    ]
    if lora:
        words += ["adapter.method=lora", f"adapter.rank={settings['rank']}"]
    tree = {"model": {"path": settings["model"]}, "data": {"path": settings["data"]}}
    config = from_mapping({**tree, "output": str(folder / "out")}, [*words, *overrides]).config
    text = open_text(config)
    data = open_data(config, text)
    assert isinstance(data.train, Dataset)
    rows, documents = [], []
    sources = {data.train.example(i)[0].tobytes(): int(data.train.rows[i]) for i in range(len(data.train))}  # fmt: skip
    batches = data.loader.step_batches()
    for _, step in zip(range(settings["steps"]), batches, strict=False):
        rows += [row for batch in step for row in unpack(batch)]
    batches.close()
    data.loader.close()
    for row in rows:
        for ids in split(row["ids"], row["lengths"]):
            key = torch.tensor(ids, dtype=torch.int32).numpy().tobytes()
            messages = data.train.encoder.messages(sources[key])
            documents.append({"messages": [{"role": m.role, "content": m.text} for m in messages]})
    if settings["quantize"] and kind == "qlora":
        words.append(f"quantize.weights={settings['quantize']}")
    (folder / "run.json").write_text(json.dumps(tree), "utf-8")
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "documents.jsonl", documents)
    job = {
        **{key: settings[key] for key in ("model", "length", "batch", "micro_batch", "steps")},
        **{key: settings[key] for key in ("rank", "lr", "dtype", "device", "seed", "threads")},
        "alpha": 2 * settings["rank"],
        "method": "lora" if lora else "full",
        "quantize": settings["quantize"] if kind == "qlora" else None,
        "rows": str(folder / "rows.jsonl"),
        "documents": str(folder / "documents.jsonl"),
        "words": [str(folder / "run.json"), *words, *overrides],
    }
    size = settings["batch"]
    steps = [rows[i : i + size] for i in range(0, len(rows), size)]
    tokens = [sum(len(r["ids"]) for r in step) for step in steps]
    supervised = [sum(label != IGNORE for r in step for label in r["labels"]) for step in steps]
    mean = sum(tokens) / len(tokens), sum(supervised) / len(supervised)
    shape = Shape.of(text.model_config)
    if config.model.num_layers:
        shape = replace(shape, layers=config.model.num_layers)
    lengths = [n for row in rows for n in row["lengths"]]
    return Work(
        job,
        tokens,
        supervised,
        shape.flops(*mean, lora),
        shape.attention_flops(lengths) / len(steps),
    )


def unpack(batch: Any) -> Iterator[dict[str, list[int]]]:
    """The rows of a `Batch` without padding, with labels where others expect them."""
    for ids, labels, documents in zip(
        batch.input_ids, batch.labels, batch.document_ids, strict=True
    ):
        real = documents != PADDING
        counts = torch.bincount(documents[real]).tolist()
        shifted = torch.full_like(labels[real], IGNORE)
        shifted[1:] = labels[real][:-1]  # the last token of a document is never supervised
        yield {"ids": ids[real].tolist(), "labels": shifted.tolist(), "lengths": counts}


def split(ids: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """The documents of a row."""
    start = 0
    for n in lengths:
        yield ids[start : start + n]
        start += n


def write_lines(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped decoder that decide its work."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @staticmethod
    def of(config: Any) -> Shape:
        c = config.get_text_config()
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        sizes = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads
        return Shape(*sizes, kv_heads, head_dim, c.vocab_size)

    def products(self) -> list[tuple[str, int, int, int]]:
        """Name, inputs, outputs and number of the matrix products of a forward over all tokens."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("q", self.hidden, q, self.layers),
            ("k and v", self.hidden, kv, 2 * self.layers),
            ("o", q, self.hidden, self.layers),
            ("gate and up", self.hidden, self.inner, 2 * self.layers),
            ("down", self.inner, self.hidden, self.layers),
        ]

    def flops(self, tokens: float, supervised: float, frozen: bool) -> float:
        """Least work of a step without attention: forward and gradients, the head over supervised tokens.

        A frozen base needs two products of three, and so does its head.
        """
        weights = sum(i * o * n for _, i, o, n in self.products())
        per_weight = 4 if frozen else 6
        return per_weight * (weights * tokens + self.hidden * self.vocab * supervised)

    def attention_flops(self, lengths: list[int]) -> float:
        """Work of causal attention: two products forward, four backward (scores again not counted)."""
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return 12 * pairs * self.heads * self.head_dim * self.layers


def random_model(
    folder: Path, tokenizer: str, shape: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> str:
    """A folder with random weights of a Llama's `shape` and the tokenizer of another folder."""
    torch.manual_seed(seed)
    words = AutoTokenizer.from_pretrained(tokenizer)
    own = AutoConfig.from_pretrained(tokenizer)
    size = max(own.vocab_size, len(words))
    config = AutoConfig.for_model(
        "llama",
        **{"vocab_size": size, "bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id},
        **{"pad_token_id": own.pad_token_id, **shape},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
