"""Sliding windows: the same numbers as one table of the whole document, at the cost of the window."""

from __future__ import annotations

import pytest
import torch

from luthier.batch import Layout, PrefixKeys
from luthier.models import kernels, windows
from luthier.models.kernels import Scores
from luthier.seeding import generator

LENGTHS = [[700, 30, 257], [400]]


def tensors(batch, heads=4, groups=2, prefix=5, dtype=torch.float64):
    rows, width = batch.input_ids.shape
    draw = generator(0, "windows")
    shapes = [(rows, n, width, 8) for n in (heads, groups, groups)] + [(prefix, groups, 8)] * 2
    return [torch.randn(s, generator=draw, dtype=dtype).requires_grad_() for s in shapes]


def run(kernel, layout, options, inputs, virtual):
    q, k, v, keys, values = inputs
    prefix = None if virtual is None else PrefixKeys(keys, values, virtual)
    out = kernel(q, k, v, layout, Scores(0.3, prefix=prefix, **options))
    used = inputs if prefix else inputs[:3]
    return [out, *torch.autograd.grad(out.sin().sum(), used)]


@pytest.mark.parametrize("virtual", [None, True, False], ids=["alone", "virtual", "prefix"])
@pytest.mark.parametrize("window", [1, 100, 129, 300])
@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_blocks_are_the_whole_table(kernel, window, virtual, random_batch, relative, monkeypatch):
    """Outputs and all gradients, in float64, for windows below, at and above a block."""
    batch = random_batch(lengths_per_row=LENGTHS)
    inputs = tensors(batch)
    options = {"window": window} | ({"softcap": 2.0} if kernel == "math" else {})
    found = []
    for limit in (None, 10**6):
        if limit is not None:
            monkeypatch.setattr(windows, "whole", lambda layout, scores: 10**6)
        layout = Layout.of(batch)
        found.append(run(kernels.KERNELS[kernel], layout, options, inputs, virtual))
    for ours, reference in zip(*found, strict=True):
        # with a window of 1 and no prefix nothing depends on queries and keys
        scale = max(float(reference.detach().norm()), 1.0)
        assert float((ours - reference).detach().norm()) < 1e-12 * scale


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_a_window_costs_its_width(kernel, random_batch, monkeypatch):
    """Scores that are computed for one document: twice the length, twice as many, not four times. No table
    is larger than its short neighbour's."""
    seen = []
    for name in ("math_products", "sdpa_products"):
        products = getattr(kernels, name)

        def count(*args, products=products, **kwargs):
            q, k = [a for a in args if isinstance(a, torch.Tensor)][:2]
            seen.append(len(q) * len(k))
            return products(*args, **kwargs)

        monkeypatch.setattr(kernels, name, count)
    spent = {}
    for length in (2048, 4096):
        batch = random_batch(lengths_per_row=[[length, 90]])
        layout, (q, k, v, *_) = Layout.of(batch), tensors(batch, dtype=torch.float32)
        seen.clear()
        kernels.KERNELS[kernel](q, k, v, layout, Scores(0.3, window=64)).sum().backward()
        spent[length] = sum(seen)
        assert all(entry[1].numel() <= 90 * 90 for entry in layout.cache.values())
    assert spent[4096] < 2.1 * spent[2048] < 4096 * 2048


def test_a_wide_window_is_no_window(random_batch, relative):
    batch = random_batch(lengths_per_row=LENGTHS)
    q, k, v, *_ = tensors(batch)
    outs = [kernels.sdpa(q, k, v, Layout.of(batch), Scores(0.3, window=w)) for w in (None, 700)]
    assert relative(*outs) < 1e-12
