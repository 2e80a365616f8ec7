"""The place of this process: one process is fine, several are refused."""

import pytest

from luthier.errors import Refused
from luthier.parallel.world import SIZES, World


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_main_one(monkeypatch):
    for value in (None, "1", " 1 "):
        if value is not None:
            monkeypatch.setenv("WORLD_SIZE", value)
        world = World.current()
        assert world == World() and world.is_main and (world.size, world.data_size) == (1, 1)
        assert world.sum(2.5) == 2.5


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", ["2", "0", "many"])
def test_a_launcher_with_several_processes_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=rf"{name}={value}.*one process") as caught:
        World.current()
    assert caught.value.exit_code == 2
