"""FlashMask column bounds derived from document ids, against PaddlePaddle's documented convention."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import ROOT, absent

from luthier.batch import Layout

PATH = ROOT / "data/flashmask.json"


def cases() -> list[Any]:
    if not PATH.is_file():
        return [absent(PATH)]
    params = []
    for i, case in enumerate(json.loads(PATH.read_text("utf-8"))["cases"]):
        documents = case["causal"] and "document" in case["name"]
        reason = f"{case['name']}: no causal documents, and no batch of ours has such a mask"
        marks = () if documents else pytest.mark.skip(reason=reason)
        params.append(pytest.param(case, id=f"{i}-{case['name'].replace(' ', '-')}", marks=marks))
    return params


@pytest.mark.parametrize("case", cases())
def test_bounds_of_packed_causal_documents(case: dict[str, Any]) -> None:
    allowed = torch.tensor([[int(c) for c in row] for row in case["allowed"]])  # [S, S]
    starts = allowed.argmax(dim=1)  # the first key a query sees is its document's first token
    documents = (starts[1:] != starts[:-1]).cumsum(0)
    documents = torch.cat([torch.zeros(1, dtype=torch.long), documents])
    positions = torch.arange(len(starts)) - starts
    bounds = Layout(documents[None], positions[None]).flashmask_bounds[0]
    wanted = torch.tensor(case["indices"]).reshape(-1)
    assert bounds.tolist() == wanted.tolist()
    i, j = torch.meshgrid(torch.arange(len(bounds)), torch.arange(len(bounds)), indexing="ij")
    assert torch.equal(((j <= i) & (i < bounds[j])).long(), allowed)
