"""Random numbers as pure functions of (seed, name, index), never of rank, batch cut or call order.

Everything random in a run (order of rows, dropout, initial values of new tensors) takes its generator
from here. That is why accumulation, resuming and any layout see the same numbers, and why a checkpoint
holds no generator state.
"""

from __future__ import annotations

import hashlib

import torch

from luthier.parts import Piece


def derive(seed: int, *names: object) -> int:
    """A 63-bit integer that depends on every argument; equal on every machine."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` whose stream depends on (seed, names) alone."""
    made = torch.Generator(device=device)
    made.manual_seed(derive(seed, *names))
    return made


def dropout(
    x: torch.Tensor,
    p: float,
    *,
    seed: int,
    name: str,
    rows: tuple[int, ...],
    part: Piece | None = None,
) -> torch.Tensor:
    """Inverted dropout of x [B, ...] whose mask depends on (seed, name, serial number of the row).

    The same row drops the same units in any micro-batch, after a resume and when recomputed. `rows` are
    the B serial numbers of `Batch.rows`; they must match x's first axis. `part`: what of the mask is x's, where x
    is cut among tensor-parallel ranks (`dim` from the end) or context-parallel ones.
    """
    if p == 0.0:
        return x
    if len(rows) != x.shape[0]:
        raise ValueError(f"dropout '{name}': {len(rows)} row numbers for {x.shape[0]} rows")
    shape = x.shape if part is None else part.whole_shape(x.shape)
    keep = kept(shape, p, seed=seed, name=name, rows=rows, device=x.device)
    keep = keep if part is None else part.of(keep)
    return x * keep / (1 - p)


def kept(
    shape: tuple[int, ...],
    p: float,
    *,
    seed: int,
    name: str,
    rows: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """The mask [B, ...] of what `dropout` keeps."""
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        keep[i].bernoulli_(1 - p, generator=generator(seed, "dropout", name, row, device=device))
    return keep
