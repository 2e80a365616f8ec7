"""The tables in docs/tasks/several-devices.md: of layouts, from tests/parallel/results.json, and of memory, from benchmarks/memory.

`scripts/support.py layouts` writes the first file, `python -m benchmarks.memory` the other one; `scripts/reference.py` puts the tables
between their marks.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tasks" / "several-devices.md"
RESULTS = ROOT / "tests" / "parallel" / "results.json"
MEMORY = ROOT / "benchmarks" / "memory"
MEMORY_MARKS = (
    "<!-- memory table: python scripts/reference.py -->",
    "<!-- end of memory table -->",
)
MARKS = ("<!-- layouts table: python scripts/reference.py -->", "<!-- end of layouts table -->")


def page() -> str:
    """The page with the tables between its marks."""
    table = runpy.run_path(str(MEMORY / "__main__.py"))["table"]
    measured = json.loads((MEMORY / "results" / "cpu.json").read_text("utf-8"))
    page = _between(PAGE.read_text("utf-8"), MEMORY_MARKS, table(measured))
    return _between(page, MARKS, tables())


def _between(text: str, marks: tuple[str, str], table: str) -> str:
    before, rest = text.split(marks[0])
    return f"{before}{marks[0]}\n\n{table}\n{marks[1]}{rest.split(marks[1])[1]}"


def tables() -> str:
    """Layouts x methods, then layouts x families: in each cell the largest error of its rows."""
    found = json.loads(RESULTS.read_text("utf-8"))
    rows = found["rows"]
    both = [_table(rows, axis) for axis in ("method", "family")]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    passed = sum(row["outcome"] == "passed" for row in rows)
    said = f"{passed} of {len(rows)} rows that were run passed, on gloo processes of one machine; {versions}."
    return "\n".join([*both, said]) + "\n"


def _table(rows: list[dict[str, Any]], axis: str) -> str:
    values = _in_order(row[axis] for row in rows)
    lines = [f"| layout | {' | '.join(values)} |", "|---" * (1 + len(values)) + "|"]
    for layout in _in_order(row["layout"] for row in rows):
        cells = [
            _cell([r for r in rows if (r["layout"], r[axis]) == (layout, value)])
            for value in values
        ]
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (name.count(" x "), name))


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    failed = [row for row in rows if row["outcome"] != "passed"]
    if failed:
        return f"no: {', '.join(row['family'] + ' ' + row['method'] for row in failed)}"
    return f"{max(row['worst'] for row in rows):.0e}"
