"""The contest: turns in which every contestant trains the same job, each in a process of its own, and their summary.

The order is turned round in every other turn, and the machine's matrix-product rate is measured in each, because
a shared machine is never equally fast for long: ratios are those of one turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.peers import LUTHIER, Contestant, broken, python_of, run
from benchmarks.speed.workload import Work

Run = Callable[[Contestant, str, dict[str, Any], float], dict[str, Any]]
Say = Callable[[str], object]


@dataclass
class Place:
    """A contestant and what is known of it: where its Python is, or why it is absent."""

    contestant: Contestant
    python: str | None
    absent: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)


def places(
    contestants: Sequence[Contestant], given: dict[str, str], folder: Path | None, gpu: bool
) -> list[Place]:
    """Who is there. A peer that is not is kept, with the reason and what installs it."""
    found = []
    for contestant in contestants:
        if contestant.gpu and not gpu:
            found.append(Place(contestant, None, "it needs a GPU"))
            continue
        python, command = python_of(contestant.environment, given, folder)
        why = None if python is None else broken(python, contestant.environment)
        if python is None or why:
            reason = why or "not installed"
            found.append(Place(contestant, None, f"{reason}; install: {command}"))
        else:
            found.append(Place(contestant, python))
    return found


def own(contestant: Contestant) -> Place:
    """A way of Luthier, which needs no other environment."""
    return Place(contestant, sys.executable)


def order(places: Sequence[Place], turn: int) -> list[Place]:
    """The present ones, turned round in every other turn."""
    present = [place for place in places if place.python is not None]
    return present if turn % 2 == 0 else present[::-1]


def hold(
    places: Sequence[Place],
    work: Work,
    kind: str,
    folder: Path,
    *,
    repeats: int,
    limit: float,
    rate: Callable[[], dict[str, Any]],
    say: Say,
    runner: Run = run,
) -> list[dict[str, Any]]:
    """Run all turns of job `kind`; gives the machine's rate in each. `Place.turns` grow."""
    rates = []
    for turn in range(repeats):
        rates.append({**rate(), "load": os.getloadavg()[0]})
        say(f"{kind} turn {turn + 1}: matrix products {rates[-1]['all']:,.0f} GFLOP/s")
        for place in order(places, turn):
            if any("failed" in t for t in place.turns):
                continue  # it would fail again, and its time is better spent
            contestant = place.contestant
            assert place.python is not None
            name = "".join(c if c.isalnum() else "-" for c in contestant.name)
            room = folder / f"{name}-{turn}"
            job = {
                **work.job,
                "contestant": contestant.name,
                "options": dict(contestant.options),
                "config": [
                    *work.job["words"],
                    *contestant.options.get("overrides", []),
                    f"output={room / 'out'}",
                ],
                "work": str(room),
                "result": str(room / "result.json"),
                "started": time.time(),
            }
            found = runner(contestant, place.python, job, limit)
            shutil.rmtree(room, ignore_errors=True)
            place.turns.append(found)
            if "failed" in found:
                say(f"  {contestant.name}: failed: {found['failed']}")
            else:
                say(f"  {contestant.name}: {rate_of(found, 1):,.0f} tokens/s")
    return rates


def machine_rate(work: Work, shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`rate.py` in a process of its own, at the tokens of a micro-batch."""
    job = work.job
    tokens = work.tokens[0] * job["micro_batch"] // job["batch"]
    path = folder / "rate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {"shape": shape, "tokens": max(tokens, 1), "dtype": job["dtype"]}
    asked |= {"device": job["device"], "threads": job["threads"]}
    path.write_text(json.dumps(asked), "utf-8")
    command = [sys.executable, "-m", "benchmarks.speed.rate", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rate_of(found: dict[str, Any], warm: int) -> float:
    """Real tokens per second of the steps behind the first `warm`."""
    steps = found["steps"][warm:] or found["steps"]
    return sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)


def summary(
    places: Sequence[Place], work: Work, rates: Sequence[dict[str, Any]], warm: int
) -> list[dict[str, Any]]:
    """Rows of the job's table: medians over turns with their least and greatest."""
    best = next((p.turns for p in places if p.contestant.name == LUTHIER), [])
    table = []
    for place in places:
        row: dict[str, Any] = {
            "contestant": place.contestant.name,
            "about": place.contestant.about,
            "options": dict(place.contestant.options),
        }
        table.append(row)
        failed = next((t["failed"] for t in place.turns if "failed" in t), None)
        if place.absent or failed or not place.turns:
            row |= {"absent": place.absent} if place.absent else {"failed": failed or "not run"}
            continue
        turns = place.turns
        speeds = [rate_of(turn, warm) for turn in turns]
        steps = [s for turn in turns for s in turn["steps"][warm:]]
        seconds = [s["seconds"] for s in steps]
        flops = work.flops / (sum(work.tokens) / len(work.tokens))  # per real token
        shares = [
            speed * flops / (rate["all"] * 1e9) for speed, rate in zip(speeds, rates, strict=False)
        ]
        row |= {
            "versions": turns[0]["versions"],
            "tokens_per_second": middle(speeds, 1),
            "step_seconds": middle(seconds, 4),
            "padding_share": round(1 - sum(s["tokens"] for s in steps) / sum(s["slots"] for s in steps), 4),
            "share_of_product_limit": middle(shares, 4),
            "memory_loaded": median_of(turns, "memory_loaded"),
            "memory_peak": median_of(turns, "memory_peak"),
            "first_step_after": middle([turn["first"] for turn in turns], 2),
            "same_rows": all(same_rows(turn, work) for turn in turns),
            "losses": [s["loss"] for s in turns[-1]["steps"]],
        }  # fmt: skip
        if len(best) == len(turns) and not any("failed" in turn for turn in best):
            pairs = zip(best, turns, strict=True)
            row["luthier_is_faster_by"] = middle(
                [rate_of(ours, warm) / rate_of(theirs, warm) for ours, theirs in pairs], 3
            )
    return table


def same_rows(turn: dict[str, Any], work: Work) -> bool:
    """Whether the tokens and supervised tokens of every step are those of the run's rows."""
    ours = list(zip(work.tokens, work.supervised, strict=True))
    return [(s["tokens"], s["supervised"]) for s in turn["steps"]] == ours


def middle(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, least and greatest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def median_of(turns: Sequence[dict[str, Any]], name: str) -> int | None:
    values = [turn[name] for turn in turns if turn[name] is not None]
    return int(statistics.median(values)) if values else None
