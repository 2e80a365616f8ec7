"""The row ledger: what became of every input row, in numbers that add up.

Each row ends as used, cut (used, but n tokens were lost), dropped (with a reason) or invalid (with file
and line). Rows that are plainly used are only counted; all others are listed, up to a limit that is itself
counted. `check` refuses data that cannot teach what it should. Who decides a row's end is `dataset.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from luthier.errors import Failed, Refused

Status = Literal["used", "cut", "dropped", "invalid"]
STATUSES: tuple[Status, ...] = ("used", "cut", "dropped", "invalid")
MAX_ENTRIES = 1000  # listed rows per status; the others are counted
NAMED = 3  # rows that a message names


class Record(NamedTuple):
    """The end of one input row. `place` is "file:line"; `num_examples` the documents it became (0 when
    dropped or invalid), `num_tokens` and `num_supervised` theirs, `cut` the tokens it lost; `ended` whether
    its last answer ends in a trained end token."""

    row: int
    place: str
    status: Status
    reason: str = ""
    cut: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    ended: bool = False
    note: str = ""


@dataclass
class Ledger:
    """Counts over the rows read so far, and the rows worth naming."""

    split: str
    source: str
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)  # status -> reason -> rows
    first: dict[str, str] = field(default_factory=dict)  # reason -> its first row
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_cut: int = 0  # tokens lost
    num_ended: int = 0  # rows whose last answer ends in a trained end token
    unended: list[str] = field(default_factory=list)  # the first rows whose answer does not
    entries: list[dict[str, Any]] = field(default_factory=list)
    listed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    left_out: int = 0  # rows worth an entry for which there was no space
    packing: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(self.rows.values())

    @property
    def num_usable(self) -> int:
        return self.rows["used"] + self.rows["cut"]

    def add(self, record: Record) -> None:
        """Book one row."""
        self.rows[record.status] += 1
        if record.reason:
            # numbers differ from row to row; as a reason they are one
            reason = re.sub(r"(?<![\w=-])\d+", "n", record.reason)
            counts = self.reasons.setdefault(record.status, {})
            counts[reason] = counts.get(reason, 0) + 1
            self.first.setdefault(reason, record.place)
        first = self.num_examples
        self.num_examples += record.num_examples
        self.num_tokens += record.num_tokens
        self.num_supervised += record.num_supervised
        self.num_cut += record.cut
        self.num_ended += record.ended
        if record.num_examples and not record.ended and len(self.unended) < NAMED:
            self.unended.append(record.place)
        if record.status != "used" or record.note or record.num_examples != 1:
            self._list(_entry(record, first))

    def merge(self, later: Ledger) -> None:
        """Book all rows of a ledger of rows that follow these."""
        for status in STATUSES:
            self.rows[status] += later.rows[status]
        for status, counts in later.reasons.items():
            mine = self.reasons.setdefault(status, {})
            for reason, count in counts.items():
                mine[reason] = mine.get(reason, 0) + count
        for reason, place in later.first.items():
            self.first.setdefault(reason, place)
        for entry in later.entries:
            moved = dict(entry)
            if "examples" in entry:
                moved["examples"] = [self.num_examples + entry["examples"][0], entry["examples"][1]]
            self._list(moved)
        self.left_out += later.left_out
        for name in ("num_examples", "num_tokens", "num_supervised", "num_cut", "num_ended"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.unended = (self.unended + later.unended)[:NAMED]

    def note(self, text: str) -> None:
        """A remark on the whole data set, shown once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def reconcile(self, num_rows: int) -> None:
        """Raise Failed unless exactly `num_rows` rows were booked and the listed ones agree with the counts."""
        wrong = []
        if self.num_rows != num_rows:
            wrong.append(f"{self.num_rows} rows were booked, {num_rows} were read")
        for status in ("cut", "dropped", "invalid"):
            counted = sum(self.reasons.get(status, {}).values())
            if status != "cut" and counted != self.rows[status]:
                wrong.append(f"{self.rows[status]} rows are {status}, {counted} have a reason")
            if self.listed[status] != min(self.rows[status], MAX_ENTRIES):
                wrong.append(f"{self.rows[status]} rows are {status}, {self.listed[status]} listed")
        if len(self.entries) != sum(self.listed.values()):
            wrong.append(f"{len(self.entries)} entries, {sum(self.listed.values())} counted")
        if not self.num_usable <= self.num_examples or self.num_ended > self.num_usable:
            wrong.append(
                f"{self.num_usable} usable rows, {self.num_examples} examples, {self.num_ended} ends"
            )
        if wrong:
            raise Failed(
                f"the ledger of the {self.split} rows", "; ".join(wrong), "report this error"
            )

    def check(self, *, training: bool) -> None:
        """Refuse data with invalid rows, without a usable row, or (training) whose answers never end in a
        trained end token. A row without a trained token is not usable."""
        what = f"the {self.split} data ({self.source})"
        if self.rows["invalid"]:
            raise Refused(
                what,
                f"{_count(self.rows['invalid'], 'row')} of {self.num_rows} cannot be read as asked: "
                + self._named("invalid"),
                "correct them; nothing is skipped silently",
            )
        if not self.num_usable:
            raise Refused(
                what,
                f"no row of {self.num_rows} is usable: {self._reasons('dropped')}",
                "see data.length, data.overlong and data.format",
            )
        if training and not self.num_ended:
            raise Refused(
                what,
                f"no answer ends in a trained end token (first: {', '.join(self.unended)}): "
                "the model would never learn to stop",
                "raise data.length if the answers are cut, or use a tokenizer and template with an end token",
            )

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain values, for a checkpoint."""
        return asdict(self)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Become the ledger of which `snapshot` was taken."""
        for name, value in copy.deepcopy(dict(snapshot)).items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """What ledger.json holds for this split."""
        return {
            "split": self.split,
            "source": self.source,
            "rows": {"read": self.num_rows, **self.rows},
            "reasons": self.reasons,
            "examples": self.num_examples,
            "tokens": {
                "real": self.num_tokens,
                "supervised": self.num_supervised,
                "cut": self.num_cut,
            },
            "answers": {"rows": self.num_usable, "end_in_trained_eos": self.num_ended},
            "packing": self.packing,
            "notes": self.notes,
            "entries": self.entries,
            "entries_left_out": self.left_out,
        }

    def summary(self) -> str:
        """A few lines for the console."""
        rows = self.rows
        lines = [
            f"{self.split}: {_count(self.num_rows, 'row')} of {self.source}: {rows['used']:,} used, "
            f"{rows['cut']:,} cut ({_count(self.num_cut, 'token')} lost), {rows['dropped']:,} dropped, "
            f"{rows['invalid']:,} invalid"
        ]
        lines += [f"  {status}: {self._reasons(status)}" for status in self.reasons]
        lines.append(
            f"  {_count(self.num_examples, 'example')}, {_count(self.num_tokens, 'token')}, "
            f"{self.num_supervised:,} of them trained; {self.num_ended:,} of {self.num_usable:,} answers end "
            "in a trained end token"
        )
        if self.packing:
            p = self.packing
            lines.append(
                f"  {_count(p['rows'], 'row')} of at most {p['length']:,} tokens (packing {p['method']}), "
                f"padding {100 * p['padding_share']:.2f} %"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _list(self, entry: Mapping[str, Any]) -> None:
        status = entry["status"]
        if self.listed[status] < MAX_ENTRIES:
            self.listed[status] += 1
            self.entries.append(dict(entry))
        else:
            self.left_out += 1

    def _named(self, status: Status) -> str:
        """The first rows of a status with their places and reasons."""
        rows = [entry for entry in self.entries if entry["status"] == status][:NAMED]
        more = self.rows[status] - len(rows)
        text = "; ".join(f"{entry['place']}: {entry['reason']}" for entry in rows)
        return text + (f"; and {more} more" if more else "")

    def _reasons(self, status: str) -> str:
        counts = sorted(self.reasons.get(status, {}).items(), key=lambda item: -item[1])
        return "; ".join(f"{n} x {reason} (first {self.first[reason]})" for reason, n in counts)


def _entry(record: Record, first: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"row": record.row, "place": record.place, "status": record.status}
    if record.reason:
        entry["reason"] = record.reason
    if record.cut:
        entry["tokens_cut"] = record.cut
    if record.num_examples:
        entry["examples"] = [first, record.num_examples]  # the first one's number, how many
    if record.note:
        entry["note"] = record.note
    return entry


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"
