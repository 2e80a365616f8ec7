"""Where rows come from: files, folders with train and dev parts, data sets of the hub, mixtures.

A `Source` is random access to raw rows, `row(i) -> (dict, "file:line")`, without holding them: JSON
files keep one byte offset per row, tables are memory-mapped by the package `datasets`. In which order
rows are drawn is a function of (seed, epoch, index). What a row means is told by `formats.py`; which
rows are used, cut or dropped by `ledger.py`; how one file is read by `rowfiles.py`.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from luthier.config import DataConfig, DataPart
from luthier.data.rowfiles import SUFFIXES, Rows, open_disk, open_file, open_hub
from luthier.errors import Refused, suggest
from luthier.seeding import generator

Split = Literal["train", "dev", "test"]
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
Order = np.ndarray[tuple[int], np.dtype[np.int64]]

ALIASES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test",),
}
# data sets that PaddleNLP knows by a bare name -> where the hub has them
SUITE = {"advertisegen": "shibing624/AdvertiseGen", "bellegroup": "BelleGroup"}


@dataclass(frozen=True)
class Part:
    """Files of one origin and one format; `weight` is its share in a mixture."""

    name: str
    format: str
    weight: float
    files: tuple[Rows, ...]

    @property
    def num_rows(self) -> int:
        return sum(len(file) for file in self.files)


class Source:
    """Raw rows of all parts, one after the other, or a selection of them."""

    def __init__(self, parts: Sequence[Part], selection: Order | None = None) -> None:
        self.parts = tuple(parts)
        self.selection = selection  # sorted indices into all rows of the parts
        self._files = [file for part in parts for file in part.files]
        self._file_ends = list(accumulate(len(file) for file in self._files))
        self._part_ends = list(accumulate(part.num_rows for part in parts))

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    def __len__(self) -> int:
        return self._part_ends[-1] if self.selection is None else len(self.selection)

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        """Row `index` and where it stands, "file:line". Raises `Unreadable`."""
        raw = self._raw(index)
        file = bisect_right(self._file_ends, raw)
        before = self._file_ends[file - 1] if file else 0
        return self._files[file].row(raw - before)

    def part_of(self, index: int) -> int:
        return bisect_right(self._part_ends, self._raw(index))

    def take(self, selection: Order) -> Source:
        """The rows `selection` (sorted indices) of this source."""
        return Source(
            self.parts, selection if self.selection is None else self.selection[selection]
        )

    def sizes(self) -> list[int]:
        """Number of rows of each part."""
        ends = np.array(self._part_ends)
        if self.selection is not None:
            ends = np.searchsorted(self.selection, ends)
        return np.diff(ends, prepend=0).tolist()

    def shares(self) -> list[int]:
        """Rows drawn from each part per epoch; their sum is the number of rows.

        One part: all its rows, once. A mixture: an epoch has as many rows as all parts together, divided
        by the weights, whatever the parts' sizes (largest remainders round).
        """
        sizes = self.sizes()
        weights = np.array(
            [part.weight if n else 0.0 for part, n in zip(self.parts, sizes, strict=True)]
        )
        exact = weights / weights.sum() * len(self)
        counts = np.floor(exact).astype(np.int64)
        left = len(self) - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
        return counts.tolist()

    def order(self, seed: int, epoch: int, shuffle: bool) -> Order:
        """Indices of the rows of one epoch, in the order in which they are drawn.

        A part of a mixture is drawn without replacement over and over: epoch e takes the places
        [e*share, (e+1)*share) of an endless run of permutations of that part, so no row is drawn a second
        time before all others of its part were drawn. Without `shuffle` parts are interleaved evenly.
        """
        if len(self.parts) == 1:
            return permutation(len(self), seed, "rows", epoch, shuffle=shuffle)
        drawn, places = [], []
        start = 0
        for p, (size, share) in enumerate(zip(self.sizes(), self.shares(), strict=True)):
            at = np.arange(epoch * share, (epoch + 1) * share)
            for turn in range(int(at[0]) // size, int(at[-1]) // size + 1) if share else ():
                turned = permutation(size, seed, "part", p, turn, shuffle=shuffle)
                drawn.append(start + turned[at[at // size == turn] % size])
            places.append((np.arange(share) + 0.5) / max(share, 1))
            start += size
        mixed = (
            permutation(len(self), seed, "mixture", epoch, shuffle=True)
            if shuffle
            else np.argsort(np.concatenate(places), kind="stable")
        )
        return np.concatenate(drawn)[mixed]

    def _raw(self, index: int) -> int:
        return index if self.selection is None else int(self.selection[index])


def permutation(size: int, seed: int, *names: object, shuffle: bool) -> Order:
    """0..size-1 in an order that depends on (seed, names) alone; as they are without `shuffle`."""
    if not shuffle:
        return np.arange(size, dtype=np.int64)
    return torch.randperm(size, generator=generator(seed, *names)).numpy()


def open_source(path: str | tuple[DataPart, ...], data: DataConfig, split: Split) -> Source | None:
    """The rows of `split` at `path`; None where there is no such part (training data must exist).

    Folders: `train.json` or `dev.json` -> the single files train, dev and test; else the sorted files of
    `train/`, `dev/`, `test/`. A plain file is training data. Raises `Refused` for what cannot be opened.
    """
    given = (
        (DataPart(path=path, weight=1.0, format=data.format),) if isinstance(path, str) else path
    )
    parts = []
    for part in given:
        files = _files(part.path, split)
        if files:
            form = data.format if part.format == "auto" else part.format
            parts.append(Part(part.path, form, part.weight, tuple(files)))
    return Source(parts) if parts else None


def open_evaluation(data: DataConfig, split: Split) -> Source | None:
    """Rows to evaluate (`dev`) or to predict (`test`), or None where the data has neither.

    `data.validation_path` wins for `dev`; then the part asked for, then the other one.
    """
    if split == "dev" and data.validation_path is not None:
        path = data.validation_path
        whole = _local(path)
        order: tuple[Split, ...] = ("train",) if whole and whole.is_file() else ("dev", "test")
        for name in order:
            found = open_source(path, data, name)
            if found is not None:
                return found
        raise Refused(
            f"data.validation_path={path} was asked for",
            f"it has no dev, validation or test part ({_listing(Path(path))})",
            "name the file itself",
        )
    for name in ("dev", "test") if split == "dev" else ("test", "dev"):
        found = open_source(data.path, data, name)
        if found is not None:
            return found
    return None


def _files(path: str, split: Split) -> list[Rows]:
    """The opened files of one part of the data; empty where the split does not exist."""
    local = _local(path)
    if local is None:
        name = _hub_name(path)
        if name is None:
            raise _missing(path)
        return open_hub(name, ALIASES[split], required=split == "train")
    if local.is_file():
        return [open_file(local)] if split == "train" else []
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        found = open_disk(local, ALIASES[split], split == "train")
    else:
        found = [open_file(file) for file in _discover(local, split)]
    if not found and split == "train":
        raise Refused(
            f"training data was looked for in {local}",
            f"there is no train.json, train.jsonl, train.parquet or train/ ({_listing(local)})",
            "rename the file, or give it as data.path itself",
        )
    return found


def _discover(folder: Path, split: Split) -> list[Path]:
    """Files of one split in a folder. A single file wins over a folder of that name, as in PaddleNLP."""
    names = [folder / f"{alias}{suffix}" for alias in ALIASES[split] for suffix in SUFFIXES]
    single = [file for file in names if file.is_file()]
    if len(single) > 1:
        raise Refused(
            f"the {split} part was looked for in {folder}",
            f"there are several: {', '.join(file.name for file in single)}",
            "leave one of them, or name the file in data.path or data.validation_path",
        )
    if single:
        return single
    for alias in ALIASES[split]:
        # a folder of files, or the hub's own layout: [data/]train-00000-of-00002.parquet
        for pattern in (f"{alias}/*", f"{alias}-*", f"data/{alias}-*"):
            found = [f for f in folder.glob(pattern) if f.suffix in SUFFIXES and f.is_file()]
            if found:
                return sorted(file for file in found if not file.name.startswith("."))
    return []


def _local(path: str) -> Path | None:
    """The local file or folder that `path` names. A suite's name is also looked for in LUTHIER_DATA
    (default: the folder `data`), in any case."""
    place = Path(path).expanduser()
    if place.exists():
        return place
    first, *rest = place.parts
    if first.lower() in SUITE:
        for base in (Path(), Path(os.environ.get("LUTHIER_DATA", "data"))):
            for folder in sorted(base.iterdir()) if base.is_dir() else ():
                inside = folder.joinpath(*rest)
                if folder.name.lower() == first.lower() and inside.exists():
                    return inside
    return None


def _hub_name(path: str) -> str | None:
    """`owner/name[:subset]` for what can only be a name of the hub."""
    first, _, rest = path.partition("/")
    if first.lower() in SUITE:
        known = SUITE[first.lower()]
        path = f"{known}/{rest}" if rest else known
    return path if HUB_NAME.fullmatch(path) and Path(path).suffix not in SUFFIXES else None


def _missing(path: str) -> Refused:
    place = Path(path).expanduser()
    parent = place.parent
    known = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    here = _listing(parent) if parent.is_dir() else f"the folder {parent} does not exist either"
    return Refused(
        f"data was looked for at {path}",
        f"there is no such file or folder ({here})",
        suggest(place.name, known) or "check data.path",
    )


def _listing(folder: Path, most: int = 8) -> str:
    """What a folder holds, in words."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return f"{folder} is empty"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most])}{more}"
