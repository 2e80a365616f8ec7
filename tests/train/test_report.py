"""report.html: says what it is told, escapes it, needs nothing from outside, and stands missing parts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.train.report import Facts, duration, number, pair_samples, size, write_report

FACTS: Facts = {
    "title": "LoRA fine-tuning of tiny",
    "status": "finished",
    "model": "tiny (llama)",
    "trained_parameters": 2_442_240,
    "total_parameters": 136_957_248,
    "steps": 30,
    "total_steps": 40,
    "tokens": 412_345,
    "seconds": 372.4,
    "tokens_per_second": 1107.3,
    "memory_loaded": 612 * 2**20,
    "memory_peak": 2**31,
    "versions": {"luthier": "9.9", "torch": "2.13.0"},
    "more": {"Seed": 42},
    "before": {"loss": 3.4127, "perplexity": 30.347, "accuracy": 0.4012, "tokens": 3122},
    "after": {"loss": 1.87, "perplexity": 6.4883, "accuracy": 0.6123, "tokens": 3122, "bleu4": 0.5},
    "ledger": {
        "train": {
            "rows": {"read": 1500, "used": 1488, "dropped": 12},
            "reasons": {"dropped": {"the answer is empty": 12}},
            "examples": 1488,
            "tokens": {"real": 90_000, "supervised": 40_000},
            "packing": {"rows": 44, "padding_share": 0.0012},
            "notes": ["took the format src_tgt"],
        },
        "dev": {"rows": {"read": 100, "used": 100}},
    },
    "samples": [{"prompt": "what?", "reference": "that", "before": "", "after": "this"}],
    "checks": [("isolation", True, "8 rows"), ("merge equality", False, "off by 0.3")],
    "remarks": ["a remark"],
}


class Page(HTMLParser):
    """Tags, texts by element, table rows; fails on tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)

    def classes(self, tag: str) -> list[str | None]:
        return [attrs.get("class") for name, attrs in self.tags if name == tag]


def run(output: Path, facts: Facts, records: list[dict[str, Any]] | None = None) -> Page:
    if records is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (output / "metrics.jsonl").write_text(lines, "utf-8")
    path = write_report(output, facts)
    assert path == output / "report.html"
    return Page(path)


def steps(number: int) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": i + 1, "loss": 3.0 / (i + 1), "lr": 1e-4} for i in range(number)
    ]


def test_all_parts(tmp_path: Path) -> None:
    records = [{"kind": "evaluate", "step": 0, "loss": 3.4}, *steps(20)]
    records += [
        {"kind": "remark", "step": 3, "text": "from the run"},
        {"kind": "evaluate", "step": 20, "loss": 1.87},
        {"kind": "end", "step": 20},
    ]
    page = run(tmp_path, FACTS, records)
    headline = "Held-out perplexity fell from 30.35 to 6.488 (-78.6\N{NO-BREAK SPACE}%)."
    assert headline in page.texts
    assert page.row("Perplexity") == ["30.35", "6.488", "-23.86 (-78.6 %)"]
    assert page.row("Token accuracy") == ["40.1 %", "61.2 %", "+21.1 points"]
    assert page.row("BLEU-4") == ["–", "0.5000", ""]
    assert page.row("Supervised tokens") == ["3,122", "3,122", ""]
    assert page.row("Trained parameters") == ["2,442,240 of 136,957,248 (1.78 %)"]
    assert page.row("Steps") == ["30 of 40"]
    assert page.row("Memory after loading") == ["612 MiB"]
    assert page.row("Peak memory") == ["2.00 GiB"]
    assert page.row("Versions") == ["luthier 9.9, torch 2.13.0"]
    assert page.row("Seed") == ["42"]
    assert page.row("Rows used") == ["1,488", "100"]
    assert page.row("Rows dropped") == ["12", "–"]
    assert page.row("Tokens, supervised") == ["40,000", "–"]
    assert page.row("Padding") == ["0.12 %", "–"]
    for text in ("train: 12 dropped: the answer is empty", "train: took the format src_tgt"):
        assert text in page.texts
    for text in ("what?", "that", "(empty)", "this", "a remark", "from the run", "off by 0.3"):
        assert text in page.texts
    assert [page.texts.count(mark) for mark in ("passed", "failed")] == [1, 1]
    lines = [name for name in page.classes("path") if name and name.startswith("line")]
    assert lines == ["line raw", "line smooth", "line evaluated", "line rate"]
    assert page.classes("circle") == ["dot evaluated"] * 2
    assert "evaluation loss at step 0: 3.4" in page.texts


def test_verdicts(tmp_path: Path) -> None:
    """Green is better, red is worse: lower for loss and perplexity, higher for the rest."""
    before = {"loss": 1.0, "perplexity": 3.0, "accuracy": 0.5, "bleu4": 0.2, "rouge1": 0.1}
    after = {"loss": 0.5, "perplexity": 4.0, "accuracy": 0.6, "bleu4": 0.1, "rouge1": 0.1}
    page = run(tmp_path, {"before": before, "after": after})
    cells = [c for c in page.classes("td") if c]
    assert cells[2::3] == ["number good", "number bad", "number good", "number bad", "number "]
    assert any("rose from 3.000 to 4.000 (+33.3" in text for text in page.texts)


def test_nothing_from_outside(tmp_path: Path) -> None:
    page = run(tmp_path, FACTS, steps(3))
    assert not re.search(
        r"https?:|//|@import|url\(|<script|<link|<img|<iframe| on\w+=", page.source
    )
    assert not {"src", "href", "onclick"} & {name for _, attrs in page.tags for name in attrs}


def test_everything_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>\"&"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {bad if key == "Seed" else key: poison(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(poison(v) for v in value)
        return bad if isinstance(value, str) else value

    records = [*steps(2), {"kind": "remark", "step": 1, "text": bad}]
    facts = poison(dict(FACTS))
    facts["ledger"] = {bad: {"rows": {bad: 1}, "reasons": {bad: {bad: 1}}, "notes": [bad]}}
    facts["after"] = {**facts["after"], bad: 1.0}
    page = run(tmp_path, facts, records)
    assert "<script" not in page.source and "alert('x')" not in page.source
    assert page.source.count("&lt;script&gt;") > 15


def test_nothing_known(tmp_path: Path) -> None:
    page = run(tmp_path, {})
    assert "Run" in page.texts
    assert page.rows == [] and "svg" not in [tag for tag, _ in page.tags]


def test_only_an_evaluation(tmp_path: Path) -> None:
    page = run(tmp_path, {"after": {"loss": 1.5, "perplexity": 4.48}})
    assert page.rows[0] == ["Measure", "Value"]
    assert page.row("Perplexity") == ["4.480"]
    assert not any("fell" in text for text in page.texts)


def test_one_step(tmp_path: Path) -> None:
    page = run(tmp_path, {}, steps(1))
    assert page.classes("circle") == ["dot raw", "dot rate"]


def test_missing_losses_and_torn_line(tmp_path: Path) -> None:
    """A step without supervised tokens has a null loss; a killed run ends in half a line."""
    records = steps(4)
    records[1]["loss"] = None
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"kind": "tra', "utf-8")
    page = run(tmp_path, {})
    paths = {a.get("class"): a.get("d") or "" for tag, a in page.tags if tag == "path"}
    assert len(paths["line raw"].split()) == 3
    assert len(paths["line rate"].split()) == 4


def test_unknown_fact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place for step_count"):
        write_report(tmp_path, {"step_count": 3})  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_pair_samples() -> None:
    before = [{"prompt": f"q{i}", "tgt": f"r{i}", "output": f"b{i}"} for i in range(5)]
    after = [{**record, "output": f"a{i}"} for i, record in enumerate(before)]
    first = {"prompt": "q0", "reference": "r0", "before": "b0", "after": "a0"}
    samples = pair_samples(before, after)
    assert samples[0] == first and len(samples) == 3
    assert pair_samples([], after, 1) == [{k: v for k, v in first.items() if k != "before"}]
    assert pair_samples(before, [], 1) == [{k: v for k, v in first.items() if k != "after"}]
    with pytest.raises(ValueError, match="not the same row"):
        pair_samples(before[1:], after)


def test_forms() -> None:
    shown = [number(x) for x in (0.0, 0.47312, 12.3456, 1234.5, 0.00002, 1.5e9, 1)]
    assert shown == ["0.0000", "0.4731", "12.35", "1,234", "2e-05", "1.5e+09", "1.000"]
    assert [number(x, sign=True) for x in (0.5, -0.5)] == ["+0.5000", "-0.5000"]
    assert [duration(x) for x in (8.44, 372.4, 11_100)] == ["8.4 s", "6 min 12 s", "3 h 05 min"]
    assert [size(x) for x in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.50 GiB"]
