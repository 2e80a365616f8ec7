"""Make docs/reference/config.md and config.schema.json from luthier/config.py.

`--check` writes nothing and fails when a file is not what the code says; CI runs that.
"""

import argparse
import json
import sys
from pathlib import Path

from luthier.configfile import json_schema
from luthier.configkeys import KEYS, SECTIONS, expected
from luthier.configtext import dump_value

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
HEAD = """\
# Configuration

Made by `scripts/reference.py` from `luthier/config.py`; do not edit. Keys stand in sections of a YAML or
JSON file, or on the command line as `section.key=value`. `luthier show FILE` prints the resolved
configuration and where each value comes from.
"""


def reference() -> str:
    """The page: one table per section, the keys without a section first."""
    plain = [key for key in KEYS if "." not in key]
    parts = [HEAD, *_table(plain)]
    for name in SECTIONS:
        parts += [f"\n## {name}\n", *_table([key for key in KEYS if key.startswith(f"{name}.")])]
    return "\n".join(parts) + "\n"


def _table(keys: list[str]) -> list[str]:
    rows = [_row(key) for key in keys]
    return ["| key | values | default | meaning |", "|---|---|---|---|", *rows]


def _row(key: str) -> str:
    info = KEYS[key]
    default = info.default_factory() if info.default_factory else info.default
    if info.is_required():
        shown = "required"
    else:
        plain = list(default) if isinstance(default, tuple) else default
        shown = "" if plain is None else f"`{dump_value(plain)}`"
    cells = [f"`{key}`", expected(key), shown, info.description or ""]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the reference of the configuration.")
    parser.add_argument("--check", action="store_true", help="fail if a file is out of date")
    check = parser.parse_args().check
    files = {
        FOLDER / "config.md": reference(),
        FOLDER / "config.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }
    stale = [p for p, text in files.items() if not p.is_file() or p.read_text("utf-8") != text]
    if check:
        for path in stale:
            print(f"{path} is out of date; run: make docs", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path], "utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
