"""The layers of docs/architecture.md: a file imports from lower layers, folders of one layer never each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "luthier"


def table() -> dict[str, int]:
    """Name of a file or folder of the package -> its layer, from the page's table."""
    rows = re.findall(r"^\| (\d) \|(.*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    names = {
        name.removesuffix("/").removesuffix(".py"): int(layer)
        for layer, cells in rows
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", cells)
    }
    assert {"config", "data", "train", "assemble", "recipes", "cli"} <= set(names)
    return names


LAYERS = table()


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = [name.split(".")[1:] for name in found if name.startswith("luthier.")]
    return {tuple(parts) for parts in inside if (PACKAGE / parts[0]).is_dir() or _is_file(parts[0])}


def _is_file(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file()


def violation(source: tuple[str, ...], target: tuple[str, ...]) -> str | None:
    """Why `source` may not import `target`, or None. Both are paths within the package."""
    here, there = source[0], target[0]
    layer, other = LAYERS.get(here, 9), LAYERS.get(there, 9)
    # files beside the folders of their layer put these together (assemble: train); folders stay apart
    if here == there or other < layer or (other == layer and len(source) == 1):
        return None
    return f"{'/'.join(source)} (layer {layer}) imports {'/'.join(target)} (layer {other})"


def test_every_file_imports_from_lower_layers_only() -> None:
    found = [violation(parts_of(p), target) for p in modules() for target in imported(p)]
    assert [v for v in found if v] == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("data/loader", "models/load"),
        ("models/load", "train/loss"),
        ("train/loop", "interop/read"),
        ("train/loop", "assemble"),
        ("config", "data/formats"),
        ("assemble", "recipes"),
        ("interop/read", "cli"),
    ],
)
def test_the_rule_finds_what_is_forbidden(source: str, target: str) -> None:
    assert violation(tuple(source.split("/")), tuple(target.split("/")))


def test_every_file_has_a_layer() -> None:
    assert {parts_of(p)[0] for p in modules()} - set(LAYERS) == set()


def test_every_name_of_the_page_exists() -> None:
    assert [n for n in LAYERS if not (PACKAGE / n).is_dir() and not _is_file(n)] == []


def test_no_file_is_longer_than_400_lines() -> None:
    long = [str(p.relative_to(ROOT)) for p in modules() if len(p.read_text().splitlines()) > 400]
    assert long == []


@pytest.mark.parametrize("module", ["cli", "configfile", "interop.read"])
def test_start_up_is_light(module: str) -> None:
    code = (
        f"import luthier.{module}, sys; "
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
