"""PoSE as PaddleNLP and as the paper's authors draw it: their draws are injected, their rows come out."""

from __future__ import annotations

import json

import pytest
from golden_cases import ROOT, absent

from luthier.data.pose import paddlenlp, paper

PATH = ROOT / "data" / "pose.json"


def cases():
    if not PATH.is_file():
        return [absent(PATH)]
    return json.loads(PATH.read_text("utf-8"))["cases"]


@pytest.mark.parametrize("case", cases())
def test_rows(case):
    draws = iter(case["draws"])

    def draw(low, high):
        recorded = next(draws)
        assert (low, high) == (recorded["low"], recorded["high"])
        return recorded["value"]

    if case["impl"] == "PaddleNLP":
        found = paddlenlp(case["ids"], case["max_length"], [case["eos_id"]], draw)
        assert list(found) == [case["out"][n] for n in ("input_ids", "labels", "position_ids")]
    else:
        found = paper(case["ids"], case["max_length"], case["scaled_max_length"], draw)
        assert list(found) == [case["out"][n] for n in ("input_ids", "position_ids")]
    assert next(draws, None) is None
