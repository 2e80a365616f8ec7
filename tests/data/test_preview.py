"""The preview shows what the arrays say, also when they are wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_tokenizers as tiny
import torch
from rich.console import Console

from luthier.batch import IGNORE, PADDING, Batch
from luthier.data.encode import Renderer
from luthier.data.formats import FORMATS
from luthier.data.preview import as_rich, as_text, documents

RENDERER = Renderer(tiny.byte_level(), "none")
ROWS = [{"src": "ask", "tgt": "say"}, {"src": ["[b]more", "on"], "tgt": ["end", "it"]}]


@pytest.fixture
def batch() -> Batch:
    """Two documents and three tokens of padding in one row, the seventh of its run."""
    examples = [RENDERER.encode(FORMATS["src_tgt"](row))[0] for row in ROWS]
    ids = np.concatenate([*(e.input_ids for e in examples), np.zeros(3)])
    labels = np.concatenate([*(e.labels for e in examples), np.full(3, IGNORE)])
    numbers = np.concatenate(
        [*(np.full(len(e.input_ids), i) for i, e in enumerate(examples)), np.full(3, PADDING)]
    )
    tensors = [torch.from_numpy(a.astype(np.int64))[None] for a in (ids, labels, ids, numbers)]
    return Batch(*tensors, rows=(7,))


def test_marks_and_counts(batch: Batch) -> None:
    text = as_text([batch], tiny.byte_level(), RENDERER.stop_ids)
    assert text.split("\n")[1:] == [
        "── row 7, document 0: 8 tokens, 4 trained, ends in a trained stop token",
        "<s>ask⟦say⟧⟦</s>⟧■",
        "── row 7, document 1: 17 tokens, 7 trained, ends in a trained stop token",
        "<s>[b]more⟦end⟧⟦</s>⟧■on⟦it⟧⟦</s>⟧■",
        "── row 7, padding: 3 tokens",
    ]


def test_colours(batch: Batch) -> None:
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        for text in as_rich([batch], tiny.byte_level(), RENDERER.stop_ids):
            console.print(text)
    shown = capture.get()
    assert "\x1b[1;32msay\x1b[0m" in shown  # trained
    assert "\x1b[2m<s>[b]more\x1b[0m" in shown  # context; brackets in the data are no markup


def test_wrong_labels_show(batch: Batch) -> None:
    late = torch.roll(batch.labels, -1, dims=1)
    first, *_ = documents([replace(batch, labels=late)], tiny.byte_level(), RENDERER.stop_ids)
    assert first.labels_amiss == 4 and not first.ends_in_stop  # type: ignore[union-attr]
    assert "wrong" in {kind for kind, _ in first.runs}  # type: ignore[union-attr]
    assert "4 labels amiss" in first.counts


def test_label_on_the_last_token_shows(batch: Batch) -> None:
    labels = batch.labels.clone()
    labels[0, 7] = 1
    text = as_text([replace(batch, labels=labels)], tiny.byte_level(), RENDERER.stop_ids)
    assert "document 0: 8 tokens, 4 trained, ends in a trained stop token, 1 labels amiss" in text


def test_untrained_end_shows(batch: Batch) -> None:
    labels = batch.labels.clone()
    labels[0, 6] = IGNORE
    text = as_text([replace(batch, labels=labels)], tiny.byte_level(), RENDERER.stop_ids)
    assert "3 trained, no trained stop token at its end" in text
    assert "<s>ask⟦say⟧</s>\n" in text
