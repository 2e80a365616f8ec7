"""Run the conformance suite and write what it found: tests/conformance/results.json.

One entry a family and check ("passed" or "failed"), with the versions of the packages. `scripts/reference.py`
makes the support tables of README and docs from it; `tests/conformance/test_support.py` fails where the file does
not name every check of the suite. `make support` runs this: the whole product, some minutes. With arguments of pytest (-k nf4) that part is run anew and the rest kept.
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


def main() -> int:
    sys.path.insert(0, str(ROOT))  # tests import each other by the root
    collector = Collector()
    code = pytest.main([str(SUITE), "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[collector])
    versions = {name: version(name) for name in ("torch", "transformers")}
    found = collector.found
    if sys.argv[1:]:  # a part of the suite was run: the rest stays
        kept = json.loads(RESULTS.read_text("utf-8"))["families"]
        found = {name: {**kept.get(name, {}), **found.get(name, {})} for name in {*kept, *found}}
    families = {name: dict(sorted(checks.items())) for name, checks in sorted(found.items())}
    text = json.dumps({"versions": versions, "families": families}, indent=1)
    RESULTS.write_text(text + "\n", "utf-8")
    print(f"wrote {RESULTS}; now: python scripts/reference.py")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
