"""What a layout derives from document ids, against a slow restatement of the definition."""

import pytest
import torch

from luthier.batch import IGNORE, PADDING, Batch, Layout, Segment, current_layout, layout_scope


def layout(rows):
    ids = torch.tensor(rows)
    return Layout(ids, torch.zeros_like(ids))


def test_segments_leave_padding_out():
    found = layout([[0, 0, 0, 1, 1, PADDING], [0, 0, 0, 0, 0, 0]]).segments
    assert found == (Segment(0, 0, 3), Segment(0, 3, 5), Segment(1, 0, 6))


def test_cumulative_lengths_cover_every_token_and_never_join_rows():
    bounds, longest = layout([[0, 0, 1, 1], [1, 1, 1, PADDING]]).cumulative_lengths
    assert bounds.tolist() == [0, 2, 4, 7, 8]
    assert longest == 3


@pytest.mark.parametrize("seed", range(5))
def test_flashmask_bounds_by_their_definition(seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (6,), generator=draw).tolist()
    row = [i for i, n in enumerate(lengths) for _ in range(n)] + [PADDING] * 3
    bounds = layout([row]).flashmask_bounds[0].tolist()
    for column, document in enumerate(row):
        same = [i for i, other in enumerate(row) if other == document]
        assert bounds[column] == (0 if document == PADDING else same[-1] + 1)


def test_batch_counts():
    ids = torch.tensor([[0, 0, PADDING]])
    batch = Batch(ids, torch.tensor([[5, IGNORE, IGNORE]]), ids, ids)
    assert (batch.num_supervised, batch.num_real_tokens) == (1, 2)


def test_layout_scope_nests_and_ends():
    outer, inner = layout([[0]]), layout([[1]])
    assert current_layout() is None
    with layout_scope(outer):
        with layout_scope(inner):
            assert current_layout() is inner
        assert current_layout() is outer
    assert current_layout() is None
