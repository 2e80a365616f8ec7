"""NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings of tokens while training.

The noise of a document of L real tokens lies within alpha / sqrt(L x D): packed or alone, it is the same.
PaddleNLP's scaling is alpha / sqrt(B x S) of the padded batch, without the width D; so it depends on how many
rows are computed together. The noise is added to what the embedding layer gives: families that scale
their embeddings inside that layer (gemma) get it after the scaling, as with the authors' code. It is a
function of (seed, row, place in the row), as all randomness here; padding gets none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from luthier.batch import Layout, current_layout
from luthier.config import AdapterConfig
from luthier.seeding import generator

_HANDLE = "luthier_noise"  # attribute of the embedding layer: what takes the noise off


def add_noise(model: Any, config: AdapterConfig, *, seed: int) -> None:
    """Add noise to the input embeddings of `model` in training mode, if `config.neftune_alpha` asks for it."""
    remove_noise(model)
    if config.neftune_alpha is not None:
        embedding = model.get_input_embeddings()
        hook = Noise(config.neftune_alpha, config.neftune_scaling == "paddlenlp", seed)
        vars(embedding)[_HANDLE] = embedding.register_forward_hook(hook)


def remove_noise(model: Any) -> None:
    """Take the noise off; nothing happens where there is none."""
    handle = vars(model.get_input_embeddings()).pop(_HANDLE, None)
    if handle is not None:
        handle.remove()


class Noise:
    """The hook of an embedding layer."""

    def __init__(self, alpha: float, whole_batch: bool, seed: int) -> None:
        self.alpha, self.whole_batch, self.seed = alpha, whole_batch, seed

    @torch.compiler.disable  # documents must not enter a compiled graph
    def __call__(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Embeddings [B, S, D] -> the same with noise."""
        if not embedding.training:
            return output
        layout = current_layout()
        if layout is None:  # there are no row numbers: each row is a document of its own
            noise = torch.empty(output.shape, device=output.device).uniform_(-1, 1)
            noise *= self.bound(output.shape[1], output.shape)
        else:
            noise = self.draw(layout, output)
        return output + noise.to(output.dtype)

    def draw(self, layout: Layout, output: Tensor) -> Tensor:
        """Noise like `output` [B, S, D], float32. One draw for each document: its values depend neither on the
        rows beside it nor on padding."""
        shape = torch.Size((*layout.document_ids.shape, output.shape[-1]))
        noise = torch.zeros(shape, device=output.device)
        if layout.share is not None:  # what was padded for context parallelism counts in no bound
            shape = torch.Size((len(output), layout.share.width, output.shape[-1]))
        rows = layout.rows or tuple(range(len(output)))
        for s in layout.segments:
            draw = generator(self.seed, "neftune", rows[s.row], s.start, device=output.device)
            bound = self.bound(s.stop - s.start, shape)
            noise[s.row, s.start : s.stop].uniform_(-bound, bound, generator=draw)
        return layout.here(noise)

    def bound(self, length: int, shape: torch.Size) -> float:
        """The noise of a document of `length` tokens lies between plus and minus this."""
        batch, size, width = shape
        return self.alpha / math.sqrt(batch * size if self.whole_batch else length * width)
