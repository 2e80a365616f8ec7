"""PaddleNLP's packing, its packed fields and its collation, from numbers computed by its own code.

Flows without `greedy` are our `sequential`. The iterable ones and the old InTokens keep samples longer than
a row (or crash on them), which is a defect of theirs: there ours must give what their map flow gives.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_cases import ROOT, absent

from luthier.batch import Layout
from luthier.data.loader import collate
from luthier.data.packing import Method, pack, stream

FOLDER = ROOT / "data"
KEEPS_OVERLONG = ("iterable", "intokens_map", "intokens_iterable")


def cases(name: str) -> list[Any]:
    path = FOLDER / name
    if not path.is_file():
        return [absent(path)]
    found = json.loads(path.read_text("utf-8"))["cases"]
    return [
        pytest.param(
            case, id=f"{i}-{case['flow']}-{case.get('record_kind', len(case.get('lengths', ())))}"
        )
        for i, case in enumerate(found)
    ]


def method_of(flow: str) -> Method:
    return "greedy" if flow.endswith("greedy") else "sequential"


def rows_of(flow: str, lengths: list[int], length: int) -> list[list[int]]:
    """Streamed where theirs streams, packed at once where theirs does."""
    if "iterable" not in flow:
        return pack(lengths, length, method_of(flow))
    buffers = stream(range(len(lengths)), length, method_of(flow), lengths.__getitem__)
    return [row for buffer in buffers for row in buffer]


@pytest.mark.parametrize("case", cases("packing_groups.json"))
def test_groups(case: dict[str, Any]) -> None:
    flow, lengths, length = case["flow"], case["lengths"], case["max_length"]
    ours = rows_of(flow, lengths, length)
    if flow in KEEPS_OVERLONG and any(n > length for n in lengths):
        twins = [param.values[0] for param in cases("packing_groups.json")]
        for twin in twins:
            if (twin["flow"], twin["lengths"], twin["max_length"]) == ("map", lengths, length):
                assert ours == twin["packs"]
        pytest.skip(f"{flow} keeps samples longer than a row: ours gives what their map flow gives")
    assert ours == case["packs"]


@pytest.mark.parametrize("case", cases("packing_fields.json"))
def test_fields(case: dict[str, Any]) -> None:
    records, length = case["records"], case["max_length"]
    lengths = [len(record["input_ids"]) for record in records]
    if case["flow"] in KEEPS_OVERLONG and any(n > length for n in lengths):
        pytest.skip(f"{case['flow']} keeps samples longer than a row")
    rows = rows_of(case["flow"], lengths, length)
    assert len(rows) == len(case["packs"])
    for row, packed in zip(rows, case["packs"], strict=True):
        batch = collate_unchecked([[records[i] for i in row]])
        assert batch.input_ids[0].tolist() == packed["input_ids"]
        assert batch.labels[0].tolist() == packed["labels"]
        if "position_ids" in packed:
            assert batch.position_ids[0].tolist() == packed["position_ids"]
        bounds = Layout.of(batch).flashmask_bounds[0]
        if "attn_mask_startend_row_indices" in packed:
            assert bounds.tolist() == packed["attn_mask_startend_row_indices"]
        if "attention_mask_rows" in packed:
            assert mask_rows(batch)[0] == packed["attention_mask_rows"]


@pytest.mark.parametrize("case", cases("collation.json"))
def test_collation(case: dict[str, Any]) -> None:
    records, length, theirs = case["records"], case["max_length"], case["batch"]
    lengths = [len(record["input_ids"]) for record in records]
    rows = rows_of(case["flow"], lengths, length)
    batch = collate_unchecked([[records[i] for i in row] for row in rows], case["pad_id"])
    width = batch.input_ids.shape[1]  # ours is the longest row; theirs may be padded further
    fill = {"input_ids": case["pad_id"], "labels": -100, "position_ids": 0}
    for name, value in fill.items():
        wanted = np.array(theirs[name])
        assert (wanted[:, width:] == value).all()
        assert getattr(batch, name).tolist() == wanted[:, :width].tolist()
    if "attn_mask_startend_row_indices" in theirs:
        wanted = np.array(theirs["attn_mask_startend_row_indices"]).reshape(len(rows), -1)
        assert (wanted[:, width:] == 0).all()
        assert Layout.of(batch).flashmask_bounds.tolist() == wanted[:, :width].tolist()
    if "attention_mask" in theirs:
        size = theirs["attention_mask"]["shape"][-1]
        mask = np.array([[int(c) for c in row] for row in theirs["attention_mask"]["rows"]])
        mask = mask.reshape(len(rows), size, size)
        assert not mask[:, width:].any() and not mask[:, :, width:].any()
        ours = [[[int(c) for c in row] for row in rows_] for rows_ in mask_rows(batch)]
        assert ours == mask[:, :width, :width].tolist()


def collate_unchecked(rows: list[list[dict[str, Any]]], pad_id: int = 0) -> Any:
    """`collate` of raw records. Their labels stand for what the record says, not for next tokens, so the
    check that ours always are is left out."""
    arrays = [
        [(np.array(r["input_ids"]), np.array(r["labels"])) for r in records] for records in rows
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.data.collate.check_labels", lambda *_: None)
        return collate(arrays, pad_id)


def mask_rows(batch: Any) -> list[list[str]]:
    """One string of 0 and 1 per query row: query i sees key j iff j <= i < bounds[j]."""
    bounds = Layout.of(batch).flashmask_bounds.tolist()
    return [
        ["".join(str(int(j <= i < ends[j])) for j in range(len(ends))) for i in range(len(ends))]
        for ends in bounds
    ]
