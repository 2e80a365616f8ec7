"""The support table's results name every check of the suite, each of them passed, for every tested family."""

from __future__ import annotations

import json
from pathlib import Path

import test_conformance
import test_conformance_adapters
import test_conformance_runs
import test_conformance_storage
from tiny_families import FAMILIES, MORE, model_type

from luthier.models.families import TESTED
from tests.zoo_folders import ZOO

RESULTS = Path(__file__).with_name("results.json")


def checks() -> set[str]:
    """Names of the suite's checks; those of adapters are methods."""
    modules = (test_conformance, test_conformance_runs)
    named = {name for module in modules for name in vars(module) if name.startswith("test_")}
    methods = {*test_conformance_adapters.METHODS, *test_conformance_adapters.FORMS}
    return (
        {name.removeprefix("test_") for name in named}
        | methods
        | {*test_conformance_storage.SCHEMES}
    )


def test_the_results_are_those_of_the_suite() -> None:
    """After a change of the suite: make support."""
    families = json.loads(RESULTS.read_text("utf-8"))["families"]
    assert families.keys() == {*FAMILIES, *MORE, *ZOO}
    for name, found in families.items():
        assert found.keys() == checks(), name
        assert set(found.values()) == {"passed"}, name


def test_tested_families_are_those_of_the_suite() -> None:
    assert sorted(TESTED) == sorted({model_type(name) for name in (*FAMILIES, *MORE)})
