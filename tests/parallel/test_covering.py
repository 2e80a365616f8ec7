"""The table of layouts: families x methods x layouts, every pair of values, against one process.

Packed rows, three steps: losses, every gradient, the weights. In double precision, mixtral's routers too, where rounding
explains no more than 1e-9 (on an nf4 base these compute in float32: 1e-5). `python scripts/support.py layouts` writes
what became of each row to `results.json`, and the table in docs/tasks/several-devices.md is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model_, tiny_tokenizer_
from covering import (
    DEPTH,
    FAMILIES,
    LAYERS,
    LAYOUTS,
    METHODS,
    Row,
    allowed,
    covering,
    degrees_of,
    keys_of,
    pairs_of,
    processes_of,
    refusals,
)
from layouts import Found, steps, steps_in_double, worst
from ranks import run_ranks
from tiny_runs import write_data

from luthier.models.load import save_model
from luthier.parallel.world import World

KEYS = {"train__batch": 8, "train__micro_batch": 2, "data__length": 128, "optim__clip": 0.5}
RESULTS = Path(__file__).with_name("results.json")


def test_every_pair_of_values_is_covered() -> None:
    rows = covering()
    assert len(rows) == len(set(rows))
    wanted = set().union(*map(pairs_of, allowed()))
    assert wanted <= set().union(*map(pairs_of, rows))
    # no pair is missing: nothing is refused any more
    assert not refusals()
    assert len(wanted) == sum(
        len(a) * len(b) for a, b in ((FAMILIES, METHODS), (FAMILIES, LAYOUTS), (METHODS, LAYOUTS))
    )


def test_the_results_are_of_rows_of_the_table() -> None:
    """After a change of the axes: python scripts/support.py layouts."""
    found = json.loads(RESULTS.read_text("utf-8"))["rows"]
    known = set(covering())
    assert {(r["family"], r["method"], r["layout"]) for r in found} <= known
    assert all(r["outcome"] == "passed" or r["reason"] for r in found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Folders, keys and what one process finds, of a family and a method."""
    data = write_data(tmp_path_factory.mktemp("rows"), train=20, dev=4)

    @cache
    def folder(family: str) -> Path:
        made = tmp_path_factory.mktemp(f"covering-{family}")
        model = tiny_model_(family, **{DEPTH.get(family, "num_hidden_layers"): LAYERS})
        save_model(model, made, tiny_tokenizer_())
        if family == "mixtral":  # torch has no grouped products in double precision
            config = json.loads((made / "config.json").read_text("utf-8"))
            said = config | {"experts_implementation": "eager"}
            (made / "config.json").write_text(json.dumps(said), "utf-8")
        return made

    @cache
    def find(family: str, method: str) -> tuple[Any, dict[str, Any], Found]:
        folders, keys = (folder(family), data, Path("unused")), {**KEYS, **keys_of(method)}
        return folders, keys, steps_of(family, method)(World(), folders, keys)

    return find


def steps_of(family: str, method: str) -> Callable[..., Found]:
    """Codes are made and read in float32 in any model: there mixtral's routers are left as they are."""
    wide = family == "mixtral" and method != "nf4 qlora"
    return steps_in_double if wide else steps


def difference(ours: Found, theirs: Found) -> tuple[float, str]:
    """The largest relative error of losses, gradients and weights, and where it is."""
    both = zip(ours["loss"], theirs["loss"], strict=True)
    found = [(abs(mine - other) / abs(other), "loss") for mine, other in both]
    for step, each in enumerate(zip(ours["gradients"], theirs["gradients"], strict=True), 1):
        error, name = worst(*each)
        found.append((error, f"gradient of {name} in step {step}"))
    return max(*found, worst(ours["weights"], theirs["weights"]))


@pytest.mark.long
@pytest.mark.parametrize("row", sorted(covering(), key=processes_of), ids="-".join)
def test_layout(
    row: Row, alone: Callable[..., Any], record_property: Callable[[str, Any], None]
) -> None:
    family, method, layout = row
    record_property("row", row)
    folders, keys, theirs = alone(family, method)
    degrees = degrees_of(layout)
    given = keys | {f"parallel__{name}": value for name, value in degrees.items()}
    found = run_ranks(degrees, steps_of(family, method), folders, given)
    if "pipeline" in degrees:  # rank 0 has gathered what all stages have
        found = found[:1]
    assert all(ours["tokens"] == theirs["tokens"] for ours in found)
    error, where = max(difference(ours, theirs) for ours in found)
    record_property("worst", error)
    assert error < (1e-5 if row[:2] == ("mixtral", "nf4 qlora") else 1e-9), f"{where}: {error}"
