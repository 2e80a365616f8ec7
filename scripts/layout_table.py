"""The table of layouts in docs/tasks/several-devices.md, from tests/parallel/results.json.

`scripts/support.py layouts` writes that file; `scripts/reference.py` puts the table between `MARKS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tasks" / "several-devices.md"
RESULTS = ROOT / "tests" / "parallel" / "results.json"
MARKS = ("<!-- layouts table: python scripts/reference.py -->", "<!-- end of layouts table -->")


def page() -> str:
    """The page with the tables between its marks."""
    before, rest = PAGE.read_text("utf-8").split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


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
