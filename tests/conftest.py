"""Shared fixtures: tiny random models, their folders, a tiny tokenizer, random batches.

The models are built in code from seeds. Weights are larger than a real initialisation's, and biases and
norms are random too, so that attention is far from uniform and every parameter matters to the result.
Each fixture returns a function; see `tiny_model`, `model_folder`, `tiny_tokenizer`, `random_batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import VOCAB, config_keys, model_type

from luthier.batch import IGNORE, PADDING, Batch
from luthier.seeding import generator

torch.set_num_threads(1)  # on tensors this small more threads only cost

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model_(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    attention: str = "luthier",
    **overrides: Any,
) -> Any:
    """A 2-layer random `PreTrainedModel` in eval mode, the same for the same arguments.

    `dropout` is the checkpoint's own (gpt2, opt and bloom have one). `attention` is the implementation's name
    in transformers; with "luthier" the kernel is chosen as `model.attention=auto` would. `overrides` are
    config keys.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import luthier.models.attention

    keys = {**config_keys(family, dropout), **overrides}
    config = AutoConfig.for_model(model_type(family), **keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some vectors (attention sinks) are drawn
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator(seed, name))
            # norms and biases stay near their initial 1 or 0; matrices are wide enough to matter
            p.data = ((p if p.ndim == 1 else 0.0) + 0.1 * noise).to(dtype)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # as trained: it decides who is an expert
                b.copy_(0.1 * torch.randn(b.shape, generator=generator(seed, name)))
    if attention == "luthier":
        luthier.models.attention.install(model, "auto")
    return model.eval()


@cache
def tiny_tokenizer_() -> Any:
    """A byte-level BPE fast tokenizer with a chat template: any text round-trips; 286 ids, pad 0, bos 1, eos 2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    merges = []
    for word in (
        "Ġthe",
        "Ġand",
        "Ġof",
        "ing",
        "Ġto",
        "Ġis",
        "er",
        "on",
        "Ġa",
        "Ġwhat",
        "Ġdoes",
        "re",
    ):
        left = word[0]
        for right in word[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
            left += right
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_batch_(
    vocab: int = VOCAB,
    lengths_per_row: list[list[int]] | None = None,
    supervised_share: float = 0.6,
    seed: int = 0,
    width: int | None = None,
) -> Batch:
    """A packed `Batch` of random tokens: one list of document lengths per row, the rest is padding.

    About `supervised_share` of the labels count, never a document's last; `width` pads rows further.
    """
    rows = lengths_per_row or [[5, 3], [8]]
    size = width or max(map(sum, rows))
    draw = generator(seed, "batch")
    shape = (len(rows), size)
    input_ids = torch.randint(3, vocab, shape, generator=draw)
    keep = torch.rand(shape, generator=draw) < supervised_share
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, PADDING)
    for i, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            stop = start + length
            positions[i, start:stop] = torch.arange(length)
            documents[i, start:stop] = number
            labels[i, start : stop - 1] = input_ids[i, start + 1 : stop]
            start = stop
        positions[i, start:] = torch.arange(size - start)
        input_ids[i, start:] = 0
    labels[~keep] = IGNORE
    return Batch(input_ids, labels, positions, documents, tuple(range(len(rows))))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family, dtype=torch.float32, *, seed=0, dropout=0.0, attention="luthier", **config_keys)`."""
    return tiny_model_


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[], Any]:
    """`tiny_tokenizer()`; do not change what it returns."""
    return tiny_tokenizer_


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., Batch]:
    """`random_batch(vocab, lengths_per_row=[[5, 3], [8]], supervised_share=0.6, seed=0, width=None)`."""
    return random_batch_


def relative_(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """||ours - reference|| / ||reference||: what "equal to 1e-x" means (rule 7 of the contract)."""
    a, b = ours.detach().double(), reference.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="session")
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """`relative(ours, reference)`."""
    return relative_


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(family)`: a Hugging Face folder with weights and tokenizer; read only, made once."""

    from luthier.models.load import save_model

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(f"model-{family}")
        save_model(tiny_model_(family), folder, tiny_tokenizer_())
        return folder

    return make


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest,
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """Model, data and an unused output, as `tiny_config` takes them; a module's `FOLDERS` names another family and
    numbers of rows."""
    from tiny_runs import write_data

    family, train, dev = getattr(request.module, "FOLDERS", ("llama", 24, 6))
    data = write_data(tmp_path_factory.mktemp("data"), train, dev)
    return model_folder(family), data, Path("unused")
