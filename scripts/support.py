"""Run the conformance suite and write what it found: tests/conformance/results.json; or the table of layouts.

One entry a family and check ("passed" or "failed"), with the versions of the packages. `scripts/reference.py`
makes the support tables of README and docs from it; `tests/conformance/test_support.py` fails where the file does
not name every check of the suite. `make support` runs this: the whole product, some minutes. With arguments of pytest (-k nf4) that part is run anew and the rest kept.

`support.py layouts [arguments of pytest]` does so for tests/parallel/test_covering.py and its results.json: a row
{family, method, layout, outcome, worst error}, written as soon as it is known; rows that were not run are kept.
"""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "conformance"
RESULTS = SUITE / "results.json"
LAYOUTS = ROOT / "tests" / "parallel"
# tests of one family: test_packed[llama], test_adapter[llama-lora]
NAME = re.compile(r"::test_(\w+)\[([a-z0-9_]+)(?:-(\w+))?\]$")


def check_of(node: str) -> tuple[str, str] | None:
    """(family, check) of a test's id; the check of an adapter test is its method."""
    found = NAME.search(node)
    if "/test_conformance" not in node or found is None:
        return None
    return found[2], found[3] or found[1]


class Collector:
    """Collects what became of each check."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = check_of(report.nodeid)
        if name is None or (report.when != "call" and report.passed):
            return
        family = self.found.setdefault(name[0], {})
        family[name[1]] = "passed" if report.passed else "failed"


class Rows:
    """Writes what became of each row of the table of layouts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
        self.found = {(r["family"], r["method"], r["layout"]): r for r in kept}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        if "row" not in said or report.when != "call":
            return
        names = dict(zip(("family", "method", "layout"), said["row"], strict=True))
        row = {**names, "outcome": report.outcome, "worst": said.get("worst")}
        if report.failed:
            row["reason"] = report.longreprtext.strip().splitlines()[-1]
        self.found[tuple(names.values())] = row  # pyright: ignore[reportArgumentType]
        rows = ",\n".join(f"  {json.dumps(row)}" for _, row in sorted(self.found.items()))
        text = f'{{\n "versions": {json.dumps(versions())},\n "rows": [\n{rows}\n ]\n}}\n'
        self.path.write_text(text, "utf-8")


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def layouts() -> int:
    rows = Rows(LAYOUTS / "results.json")
    suite = [str(LAYOUTS / "test_covering.py"), "-m", "long", "-p", "no:cacheprovider"]
    code = pytest.main([*suite, *sys.argv[2:]], plugins=[rows])
    print(f"{len(rows.found)} rows in {rows.path}; now: python scripts/reference.py")
    return int(code)


def main() -> int:
    sys.path.insert(0, str(ROOT))  # tests import each other by the root
    if sys.argv[1:2] == ["layouts"]:
        return layouts()
    collector = Collector()
    code = pytest.main([str(SUITE), "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[collector])
    found = collector.found
    if sys.argv[1:]:  # a part of the suite was run: the rest stays
        kept = json.loads(RESULTS.read_text("utf-8"))["families"]
        found = {name: {**kept.get(name, {}), **found.get(name, {})} for name in {*kept, *found}}
    families = {name: dict(sorted(checks.items())) for name, checks in sorted(found.items())}
    text = json.dumps({"versions": versions(), "families": families}, indent=1)
    RESULTS.write_text(text + "\n", "utf-8")
    print(f"wrote {RESULTS}; now: python scripts/reference.py")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
