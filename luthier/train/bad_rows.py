"""The rows of a step whose loss or gradient is not finite, written down for the user to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.batch import IGNORE, Batch, Layout
from luthier.errors import Unwritten
from luthier.files import write_json
from luthier.parallel.world import World

FOLDER = "not_finite"  # in the run's output
MOST = 32  # rows of one step
SHOWN = 400  # characters of a document

Origin = Callable[[int], Sequence[str]]  # serial number of a row -> where its documents come from
Decode = Callable[[list[int]], str]


def keep_rows(
    output: Path,
    world: World,
    origin: Origin,
    decode: Decode,
    step: int,
    rows: Sequence[int],
    micro_batches: Sequence[Batch],
) -> str:
    """Write `output`/not_finite/step-N.json: serial number, origin and beginning of each document of `rows`.

    Every rank enters with its own micro-batches. Returns the path, or that it could not be written.
    """
    wanted = set(sorted(rows)[:MOST])
    ours = [
        _row(batch, i, origin(serial), decode)
        for batch in micro_batches
        if not batch.is_filler
        for i, serial in enumerate(batch.rows)
        if serial in wanted
    ]
    found = sorted(
        (row for part in world.of_data(world.gather(ours)) for row in part), key=lambda r: r["row"]
    )
    path = output / FOLDER / f"step-{step}.json"

    def write() -> str:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"step": step, "num_rows": len(rows), "rows": found})
        except (OSError, Unwritten):
            return "no file: it could not be written"
        return str(path)

    return world.lead(write)


def _row(batch: Batch, i: int, places: Sequence[str], decode: Decode) -> dict[str, Any]:
    documents = []
    for n, s in enumerate(s for s in Layout.of(batch).segments if s.row == i):
        ids = batch.input_ids[i, s.start : s.stop]
        documents.append(
            {
                "from": places[n] if n < len(places) else None,
                "num_tokens": s.stop - s.start,
                "num_supervised": int((batch.labels[i, s.start : s.stop] != IGNORE).sum()),
                "text": decode(ids.tolist())[:SHOWN],
            }
        )
    return {"row": batch.rows[i], "documents": documents}
