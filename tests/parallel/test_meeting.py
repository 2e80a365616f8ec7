"""How processes find each other, and what they say when one is missing, twice there or different."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from ranks import free_port, run_ranks

from luthier.errors import Failed, LuthierError, Refused
from luthier.parallel.joining import Place, code_hash, first_to_tell, meet, open_store
from luthier.parallel.world import World


def places(size: int) -> list[Place]:
    port = free_port()
    return [Place(rank=rank, size=size, port=port) for rank in range(size)]


def together(given: list[tuple[Place, dict[str, object]]]) -> list[object]:
    """Each place meets the others with its facts; what came of it."""
    store = open_store(given[0][0], 5)

    def one(place: Place, facts: dict[str, object]) -> object:
        try:
            meet(store if place.rank == 0 else open_store(place, 5), place, facts, 1.5)
        except LuthierError as error:
            return error
        return None

    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(lambda pair: one(*pair), given))


def test_equal_processes_meet() -> None:
    facts = {"train.batch": 8, "data.path": ["a", None], "code": code_hash()}
    assert together([(place, facts) for place in places(3)]) == [None] * 3


def test_who_is_missing_is_named() -> None:
    there = places(4)
    for error in together([(there[0], {}), (there[2], {})]):
        assert isinstance(error, Failed)
        assert "the 4 processes" in str(error) and "rank 1, 3 are missing" in str(error)


def test_another_config_is_refused_with_the_key() -> None:
    first, second = places(2)
    ours = {"train.batch": 8, "luthier": "abc"}
    found = together([(first, ours), (second, ours | {"train.batch": 4})])
    for error in found:  # also on the rank that would wait for the other
        assert isinstance(error, Refused)
        assert "rank 1 of 2" in str(error)
        assert "train.batch is 4 here, 8 on rank 0" in str(error)
        assert "luthier" not in error.found


def test_two_runs_on_one_port() -> None:
    first, second = places(2)
    store = open_store(first, 5)
    with pytest.raises(Refused, match=r"cannot listen.*another run uses that port"):
        open_store(first, 5)
    store.add("here/1", 1)  # the first run's rank 1
    with pytest.raises(Refused, match=r"rank 1 of 2.*two runs use one address and port"):
        meet(open_store(second, 5), second, {}, 5)


def test_an_address_where_nobody_answers() -> None:
    with pytest.raises(Failed, match=r"nothing answers rank 1 of 2.*rank 0"):
        open_store(Place(rank=1, size=2, port=free_port()), 1.0)


def test_one_process_tells_of_an_error() -> None:
    first, second = places(2)
    store = open_store(first, 5)
    assert [first_to_tell(first, store), first_to_tell(second, None)] == [True, False]


def exchange(world: World, numbers: list[float]) -> tuple[object, ...]:
    def refuse() -> None:
        raise Refused("this", f"seen by rank {world.rank}", "that")

    try:
        world.lead(refuse)
        told = ""
    except Refused as error:
        told = str(error)
    return (
        world.sum(numbers[world.rank]),
        world.max(numbers[world.rank]),
        world.gather({"rank": world.rank, "text": "ü" * world.rank}),
        world.broadcast(f"from {world.rank}"),
        world.lead(lambda: [world.rank, "led"]),
        told,
        (world.data_rank, world.data_size),
    )


def test_what_ranks_exchange_is_the_same_on_each() -> None:
    numbers = [1e16, 1.0]
    found = run_ranks({"shard": 2}, exchange, numbers)
    for rank, (total, most, everyone, first, led, told, place) in enumerate(found):
        assert (total, most, first, led) == (1e16 + 1.0, 1e16, "from 0", [0, "led"])
        assert everyone == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
        assert told == "this. seen by rank 0. that." and place == (rank, 2)
