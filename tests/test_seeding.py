"""Randomness is a function of (seed, name, row), never of how rows are grouped."""

import pytest
import torch

from luthier import seeding


def test_derive_depends_on_every_part_and_on_their_borders():
    base = seeding.derive(1, "a", 2)
    others = [seeding.derive(2, "a", 2), seeding.derive(1, "b", 2), seeding.derive(1, "a", 3)]
    assert base not in others
    assert seeding.derive(1, "ab", "c") != seeding.derive(1, "a", "bc")
    assert base == 9066666090510628820  # the same on every machine and version


def test_dropout_mask_belongs_to_the_row():
    x = torch.ones(4, 6, 32)
    whole = seeding.dropout(x, 0.3, seed=7, name="q", rows=(10, 11, 12, 13))
    parts = [seeding.dropout(x[i : i + 1], 0.3, seed=7, name="q", rows=(10 + i,)) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    other = seeding.dropout(x, 0.3, seed=7, name="k", rows=(10, 11, 12, 13))
    assert not torch.equal(whole, other)
    assert whole.mean() == pytest.approx(
        1.0, abs=0.1
    )  # inverted: the mean is kept (768 draws, 4 sigma)


def test_dropout_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="2 row numbers for 4 rows"):
        seeding.dropout(torch.ones(4, 2), 0.5, seed=0, name="x", rows=(1, 2))
