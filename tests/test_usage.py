"""`--help` of the whole and of each command."""

from __future__ import annotations

import pytest

from luthier.cli import COMMANDS, main
from luthier.configkeys import KEYS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    usage, about, *rest = said.splitlines()
    assert usage.startswith(f"usage: luthier {name}") and about.strip() and "  " not in usage
    takes_config = "FILE" in usage
    assert bool(rest) == takes_config
    if takes_config:
        found = {word for line in rest for word in line.split()}
        assert {key.rpartition(".")[2] for key in KEYS} <= found
        assert main([name, "run.yaml", "-h"]) == 0  # no file is looked for
        assert capsys.readouterr().out == said


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert COMMANDS.keys() <= said
