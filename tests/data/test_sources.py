"""Files, folders, tables, hub names and mixtures; what is wrong with a file is said with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import write_lines

from luthier.config import DataConfig, DataPart
from luthier.data import rowfiles
from luthier.data.rowfiles import Unreadable, open_file
from luthier.data.sources import Part, Source, open_evaluation, open_source, permutation
from luthier.errors import Refused


def source(path: Any, split: Any = "train", **data: Any) -> Source | None:
    return open_source(str(path), DataConfig(path=str(path), **data), split)


def values(found: Source | None, key: str = "n") -> list[Any]:
    assert found is not None
    return [found.row(i)[0][key] for i in range(len(found))]


# ---- one file


def test_lines_and_arrays_give_rows_with_their_lines(tmp_path: Path) -> None:
    rows = [{"n": i, "text": "größe\n" * i + "字"} for i in range(5)]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    array = tmp_path / "b.json"
    array.write_text(json.dumps(rows, indent=2, ensure_ascii=False), "utf-8")
    for path in (lines, array):
        opened = open_file(path)
        assert [opened.row(i)[0] for i in (4, 0, 2, 1, 3)] == [rows[i] for i in (4, 0, 2, 1, 3)]
    assert open_file(lines).row(3)[1] == f"{lines}:4"
    assert open_file(array).row(3)[1] == f"{array}:14"


def test_rows_in_turn_come_from_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows asked for one after the other are read many at a time, also where one is longer than a block; those asked
    for here and there, each alone."""
    rows = [{"n": i, "text": "字" * (50 if i == 7 else i % 3)} for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(rowfiles, "BLOCK", 100)
    opened_files, plain = [], rowfiles.FileIO
    monkeypatch.setattr(rowfiles, "FileIO", lambda name: opened_files.append(name) or plain(name))
    for order in (range(40), [*range(5, 12), *range(3, 9), 39, 0, 1, 2, 38], range(39, -1, -1)):
        opened = open_file(path)
        opened_files.clear()
        assert [opened.row(i)[0] for i in order] == [rows[i] for i in order]
        if order == range(40):
            assert len(opened_files) < 20
    assert len(opened_files) == 40  # backwards


def test_blank_lines_bom_crlf_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\r\n   \n{"n": 1}\n\n{"n": 2}')
    opened = open_file(path)
    assert [opened.row(i) for i in range(len(opened))] == [
        ({"n": 0}, f"{path}:1"),
        ({"n": 1}, f"{path}:4"),
        ({"n": 2}, f"{path}:6"),
    ]


def test_lines_are_found_across_read_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"n": i, "t": "x" * (i % 7)} for i in range(50)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    for size in (1, 3, 64):
        monkeypatch.setattr("luthier.data.rowfiles.CHUNK", size)
        opened = open_file(path)
        assert [opened.row(i)[0] for i in range(len(opened))] == rows


@pytest.mark.parametrize(
    ("content", "place", "said"),
    [
        (b'{"n": 1}\n{"n": 2,}\n', ":2:9", "malformed JSON"),
        (b'{"n": 1}\n{"n": \n', ":2:6", "malformed JSON"),
        (b'{"n": 1} {"n": 2}\n', ":1:10", "more text after the row"),
        (b'{\n  "n": 1\n}\n', ":1:2", "each line must hold one whole object"),
        (b'{"n": 1}\n[1]\n', ":2", "the row is list, not an object"),
        ('{"n": "裤型"}\n'.encode("gb18030"), ":1", "at offset 7 of the file is not UTF-8"),
        (b'{"n": "\\ud83d"}\n', ":1", "half of a surrogate pair"),
        (b'{"n": ' + b"[" * 100_000, ":1", "nested too deeply"),
    ],
    ids=["comma", "cut", "two", "pretty", "list", "gbk", "surrogate", "deep"],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, place: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    opened = open_file(path)
    with pytest.raises(Unreadable) as caught:
        [opened.row(i) for i in range(len(opened))]
    assert caught.value.place == f"{path}{place}"
    assert said in caught.value.reason


def test_good_surrogate_pairs_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": "\\ud83d\\ude00"}\n')
    assert open_file(path).row(0)[0] == {"n": "😀"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", "holds no rows"),
        ("a.json", b"\n \n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"n": 1}, {"n": 2]', "a.json:1:19: malformed JSON"),
        ("a.json", b'[{"n": 1},\n {"n": 2}', "a.json:2:10: malformed JSON"),
        ("a.json", b'[{"n": 1},]', "a.json:1:11: malformed JSON"),
        ("a.json", b'[{"n": 1}]\n[2]', "a.json:2:1: malformed JSON"),
        ("a.json", '[\n{"n": "裤"}]'.encode("gb18030"), "a.json:2: byte"),
        ("a.json", b"src,tgt\na,b\n", "a.json:1:1: malformed JSON: the file begins with"),
        ("a.json", '{"n": 1}'.encode("utf-16"), "UTF-16"),
        ("a.csv", b"src,tgt\n", "'.csv' is not one of"),
        ("a.parquet", b"no table", "a.parquet"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Refused) as caught:
        open_file(path)
    assert said in str(caught.value)


def test_an_array_with_a_row_that_is_no_object_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"n": 1},\n "x"\n]')
    with pytest.raises(Unreadable) as caught:
        open_file(path).row(1)
    assert caught.value.place == f"{path}:3"


# ---- tables of the package datasets


def test_parquet_arrow_and_saved_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [{"src": f"q{i}", "tgt": ["a", "b"]} for i in range(4)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "train.parquet")
    with (
        pa.OSFile(str(tmp_path / "s.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as w,
    ):
        w.write_table(table)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as w:
        w.write_table(table)
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, validation=saved.select([2])).save_to_disk(tmp_path / "both")
    for path in ("train.parquet", "s.arrow", "f.arrow", "one", "both", "."):
        opened = source(tmp_path / path)
        assert opened is not None
        assert [opened.row(i)[0] for i in (3, 0, 1, 2)] == [rows[i] for i in (3, 0, 1, 2)]
    assert opened.row(1)[1].endswith("train.parquet:row 2")
    assert source(tmp_path / "one", "dev") is None
    assert values(source(tmp_path / "both", "dev"), "src") == ["q2"]


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Refused, match=r"pip install 'luthier\[data\]'"):
        open_file(tmp_path / "a.parquet")


class Hub:
    """What the package datasets answers for a data set of the hub."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]
    ) -> None:
        datasets = pytest.importorskip("datasets")
        self.asked: list[tuple[Any, ...]] = []
        self.splits = splits
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.names)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def names(self, path: str, subset: str | None) -> list[str]:
        self.asked.append((path, subset))
        return list(self.splits)

    def load(self, path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        return self.splits[split]


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LUTHIER_DATA", raising=False)
    hub = Hub(monkeypatch, {"train": [{"n": 1}], "validation": [{"n": 2}]})
    assert values(source("owner/some-name:main")) == [1]
    assert values(source("owner/some-name", "dev")) == [2]
    assert source("owner/some-name", "test") is None
    assert values(source("advertisegen")) == [1]
    assert values(source("bellegroup/school_math_0.25M")) == [1]
    assert hub.asked[0] == ("owner/some-name", "main")
    assert hub.asked[-2:] == [
        ("shibing624/AdvertiseGen", None),
        ("BelleGroup/school_math_0.25M", None),
    ]


def test_a_hub_that_cannot_be_reached_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, {})

    def fail(*_: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "names", fail)
    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", fail)
    with pytest.raises(Refused, match=r"no such local file or folder.*Couldn't reach"):
        source("owner/name")


# ---- which files


def test_single_files_win_over_folders(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.json", [{"n": 1}])
    write_lines(tmp_path / "train" / "x.json", [{"n": 2}])
    write_lines(tmp_path / "dev.json", [{"n": 3}])
    write_lines(tmp_path / "test.json", [{"n": 4}])
    assert [values(source(tmp_path, s)) for s in ("train", "dev", "test")] == [[1], [3], [4]]


def test_folders_are_read_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the order in which a file system lists names is its own affair
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, p: sorted(glob(self, p), reverse=True))
    for name, n in (
        ("b.json", 2),
        ("a.jsonl", 1),
        ("c.json", 3),
        (".hidden.json", 9),
        ("note.md", 9),
    ):
        write_lines(tmp_path / "train" / name, [{"n": n}, {"n": -n}])
    write_lines(tmp_path / "valid" / "d.json", [{"n": 5}])
    assert values(source(tmp_path)) == [1, -1, 2, -2, 3, -3]
    assert values(source(tmp_path, "dev")) == [5]
    found = source(tmp_path)
    assert found is not None
    assert found.row(3)[1].endswith("b.json:2")


def test_the_layout_of_downloaded_hub_folders(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "train-00001-of-00002.jsonl", [{"n": 2}])
    write_lines(tmp_path / "data" / "train-00000-of-00002.jsonl", [{"n": 1}])
    write_lines(tmp_path / "data" / "validation-00000-of-00001.jsonl", [{"n": 3}])
    assert values(source(tmp_path)) == [1, 2]
    assert values(source(tmp_path, "dev")) == [3]


def test_a_plain_file_is_training_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"n": 1}])
    assert values(source(path)) == [1]
    assert source(path, "dev") is None and source(path, "test") is None


def test_a_suite_name_finds_the_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "sets" / "AdvertiseGen" / "train.json", [{"n": 1}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_DATA", str(tmp_path / "sets"))
    assert values(source("advertisegen")) == [1]
    write_lines(tmp_path / "advertisegen" / "train.json", [{"n": 2}])
    assert values(source("advertisegen")) == [2]  # the working folder comes first


def test_what_is_missing_is_said_with_what_is_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "trian.json", [{"n": 1}])
    with pytest.raises(Refused, match=r"no train\.json.*holds trian\.json"):
        source(tmp_path)
    with pytest.raises(Refused, match=r"did you mean 'trian\.json'"):
        source(tmp_path / "train.json")
    with pytest.raises(Refused, match="nowhere does not exist either"):
        source(tmp_path / "nowhere" / "train.json")


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.json", [{"n": 1}])
    write_lines(tmp_path / "train.jsonl", [{"n": 1}])
    with pytest.raises(Refused, match=r"train\.json, train\.jsonl"):
        source(tmp_path)


def test_evaluation_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.json", [{"n": 1}])
    write_lines(tmp_path / "d" / "test.json", [{"n": 2}])
    other = write_lines(tmp_path / "other.json", [{"n": 3}])

    def rows(split: Any, validation: Any = None) -> list[Any]:
        data = DataConfig(path=str(tmp_path / "d"), validation_path=validation)
        return values(open_evaluation(data, split))

    assert rows("dev") == [2]  # the test part stands in
    assert rows("dev", str(other)) == [3]
    assert rows("test", str(other)) == [2]
    write_lines(tmp_path / "d" / "dev.json", [{"n": 4}])
    assert rows("dev") == [4]
    assert rows("dev", str(tmp_path / "d")) == [4]
    assert open_evaluation(DataConfig(path=str(other)), "dev") is None
    write_lines(tmp_path / "only" / "train.json", [{"n": 1}])
    with pytest.raises(Refused, match="no dev, validation or test part"):
        rows("dev", str(tmp_path / "only"))


# ---- the order of rows


class Numbers:
    """Rows 0, 1, ... without a file."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        return {"n": index}, f"numbers:{index}"


def mixture(sizes: list[int], weights: list[float]) -> Source:
    return Source(
        [
            Part(f"p{i}", "text", weight, (Numbers(size),))
            for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
        ]
    )


def test_order_depends_on_seed_and_epoch_alone() -> None:
    one = mixture([100], [1.0])
    orders = [one.order(seed, epoch, True).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] == mixture([100], [1.0]).order(1, 0, True).tolist()
    assert one.order(1, 5, False).tolist() == list(range(100))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ([100, 100], [3, 1]),
        ([1000, 10], [1, 1]),
        ([7, 5, 3], [0.2, 0.5, 0.3]),
        ([50, 3], [1, 0.001]),
    ],
)
def test_a_mixture_draws_by_weight_and_evenly(
    sizes: list[int], weights: list[float], shuffle: bool
) -> None:
    mixed = mixture(sizes, weights)
    total, part_of = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    shares = mixed.shares()
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1
    drawn = np.zeros(total, dtype=int)
    for epoch in range(7):
        order = mixed.order(9, epoch, shuffle)
        assert len(order) == total
        assert np.bincount(part_of[order], minlength=len(sizes)).tolist() == shares
        np.add.at(drawn, order, 1)
        for p in range(len(sizes)):  # no row again before all others of its part
            counts = drawn[part_of == p]
            assert counts.max() - counts.min() <= 1
    assert (
        mixed.order(9, 3, shuffle).tolist() == mixture(sizes, weights).order(9, 3, shuffle).tolist()
    )


def test_without_shuffling_parts_alternate_evenly() -> None:
    order = mixture([20, 20], [3, 1]).order(0, 0, False)
    parts = (order >= 20).tolist()
    assert all(sum(parts[i : i + 4]) == 1 for i in range(0, 40, 4))


def test_rows_and_parts_of_a_selection() -> None:
    mixed = mixture([4, 6], [1, 1]).take(np.array([1, 3, 4, 9]))
    assert len(mixed) == 4 and mixed.sizes() == [2, 2]
    assert [mixed.row(i)[0]["n"] for i in range(4)] == [1, 3, 0, 5]
    assert [mixed.part_of(i) for i in range(4)] == [0, 0, 1, 1]
    again = mixed.take(np.array([2, 3]))
    assert [again.row(i)[0]["n"] for i in range(2)] == [0, 5]
    assert again.sizes() == [0, 2] and again.shares() == [0, 2]


def test_parts_have_their_own_format(tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / f"{n}.json", [{"n": 0}]) for n in "ab")
    parts = (DataPart(path=str(a), format="text"), DataPart(path=str(b), weight=2))
    found = open_source(parts, DataConfig(path=parts, format="alpaca"), "train")
    assert found is not None
    assert [(p.format, p.weight) for p in found.parts] == [("text", 1), ("alpaca", 2)]
    assert open_source(parts, DataConfig(path=parts), "dev") is None


def test_permutation_is_the_same_on_every_machine() -> None:
    # fixed numbers: a resumed run must draw the rows that the first one did
    assert permutation(8, 42, "rows", 0, shuffle=True).tolist() == [
        7,
        5,
        2,
        0,
        1,
        4,
        6,
        3,
    ]
