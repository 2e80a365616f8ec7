"""report.html: one page on a run that says what was done, what came of it and whether to believe it.

The page is made from plain facts and the run's metrics.jsonl; whatever is missing is left out, so it
serves unfinished, resumed and evaluation-only runs too. Its look is `report_page.py`, its curves `chart.py`;
who gathers the facts is the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import jinja2

import luthier
from luthier.config import METRICS, MINIMISED
from luthier.files import write_text
from luthier.train.chart import Chart, Point, Series, draw, smooth
from luthier.train.metrics import FILE, read_metrics
from luthier.train.report_page import PAGE

REPORT = "report.html"
MISSING = "–"

Values = Mapping[str, float | int | None]


class Sample(TypedDict, total=False):
    """A question of the evaluation data with its answers; what is absent is not shown."""

    prompt: str
    reference: str
    before: str
    after: str


class Facts(TypedDict, total=False):
    """All that a report can tell besides the curves. Every key may be absent."""

    title: str  # "LoRA fine-tuning of SmolLM2-135M-Instruct"
    status: str  # "finished", "stopped by a signal at step 30"
    created: str  # when, in words
    model: str
    data: str
    adapter: str  # "LoRA, rank 8, alpha 16, on 210 layers"
    device: str
    dtype: str
    trained_parameters: int
    total_parameters: int
    steps: int
    total_steps: int  # as planned
    tokens: int  # real tokens trained on
    padding_share: float  # of all slots
    seconds: float  # of training
    tokens_per_second: float
    memory_loaded: int  # bytes after loading the model
    memory_peak: int  # bytes
    versions: Mapping[str, str]
    more: Mapping[str, Any]  # further rows of the run's table
    before: Values  # evaluation before training: the metrics of `evaluate`
    after: Values  # evaluation of the final model
    ledger: Mapping[str, Mapping[str, Any]]  # split -> its `Ledger.to_dict()`
    samples: Sequence[Sample]
    checks: Sequence[tuple[str, bool, str]]  # what was checked, passed, details
    remarks: Sequence[str]  # besides those in metrics.jsonl


def write_report(output: Path, facts: Facts) -> Path:
    """Write `output`/report.html from `facts` and `output`/metrics.jsonl (if there is one), atomically.

    Raises ValueError for a key that `Facts` does not have: it would silently not be shown.
    """
    unknown = set(facts) - set(Facts.__annotations__)
    if unknown:
        raise ValueError(f"a report has no place for {', '.join(sorted(unknown))}")
    metrics = output / FILE
    records = read_metrics(metrics) if metrics.is_file() else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(_content(facts, records))
    path = output / REPORT
    write_text(path, page)
    return path


def pair_samples(
    before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], number: int = 3
) -> list[Sample]:
    """The first `number` records of two `evaluate_generation` runs over the same rows, side by side.

    An empty `before` or `after` leaves its answers out. Raises ValueError when the rows differ.
    """
    samples: list[Sample] = []
    for i, record in enumerate((after or before)[:number]):
        sample = Sample(prompt=record["prompt"], reference=record["tgt"])
        if before:
            if (before[i]["prompt"], before[i]["tgt"]) != (record["prompt"], record["tgt"]):
                raise ValueError(f"row {i} before and after training is not the same row")
            sample["before"] = before[i]["output"]
        if after:
            sample["after"] = after[i]["output"]
        samples.append(sample)
    return samples


def _content(facts: Facts, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The template's variables."""
    remarks = [
        *(r["text"] for r in records if r.get("kind") == "remark"),
        *facts.get("remarks", ()),
    ]
    subtitle = [facts.get("status"), facts.get("created")]
    made = facts.get("versions", {}).get("luthier", luthier.__version__)
    return {
        "title": facts.get("title", "Run"),
        "subtitle": " · ".join(part for part in subtitle if part),
        "headline": _headline(facts),
        "tiles": _tiles(facts),
        "charts": [c for c in _charts(records) if c],
        "metrics": _metrics(facts.get("before", {}), facts.get("after", {})),
        "samples": [_sample(s) for s in facts.get("samples", ())],
        "remarks": list(dict.fromkeys(remarks)),
        "checks": list(facts.get("checks", ())),
        "run": _run(facts),
        "ledger": _ledger(facts.get("ledger", {})),
        "footer": f"Made by Luthier {made}. The numbers behind the curves are in {FILE} beside this page.",
    }


def _charts(records: list[dict[str, Any]]) -> list[Chart | None]:
    train, rate = _points(records, "train", "loss"), _points(records, "train", "lr")
    evaluated = _points(records, "evaluate", "loss")
    steps = [x for points in (train, rate, evaluated) for x, _ in points]
    x_range = (min(steps), max(steps)) if steps and min(steps) < max(steps) else None
    loss = [
        Series("training loss", "raw", train),
        Series("smoothed", "smooth", smooth(train) if len(train) > 10 else []),
        Series("evaluation loss", "evaluated", evaluated, dots=True),
    ]
    return [
        draw("Loss", "nats per token", loss, x_range=x_range),
        draw("Learning rate", "", [Series("rate", "rate", rate)], x_range=x_range, height=170),
    ]


def _points(records: list[dict[str, Any]], kind: str, name: str) -> list[Point]:
    """(step, value) of the records that have a finite value; of two for one step the later counts."""
    values = {r["step"]: r.get(name) for r in records if r.get("kind") == kind}
    return [(float(step), value) for step, value in sorted(values.items()) if _is_number(value)]


def _headline(facts: Facts) -> str:
    """The result in one sentence, when there is an evaluation before and after."""
    old = facts.get("before", {}).get("perplexity")
    new = facts.get("after", {}).get("perplexity")
    if not (_is_number(old) and _is_number(new)) or not old:
        return ""
    change = (new - old) / old
    verb = "fell" if change < 0 else "rose" if change > 0 else "stayed"
    return f"Held-out perplexity {verb} from {number(old)} to {number(new)} ({percent(change, sign=True)})."


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    tiles = []
    for name in ("perplexity", "accuracy", "bleu4"):
        old, new = facts.get("before", {}).get(name), facts.get("after", {}).get(name)
        if _is_number(new):
            note = f"was {_metric(name, old)}" if _is_number(old) else ""
            tiles.append((TITLES[name], _metric(name, new), note))
    if "seconds" in facts:
        steps = f"{facts['steps']:,} steps" if "steps" in facts else ""
        tiles.append(("Training time", duration(facts["seconds"]), steps))
    if "tokens_per_second" in facts:
        tokens = f"{facts['tokens']:,} real tokens" if "tokens" in facts else ""
        tiles.append(("Tokens per second", f"{facts['tokens_per_second']:,.0f}", tokens))
    if "memory_peak" in facts:
        loaded = facts.get("memory_loaded")
        note = "" if loaded is None else f"{size(loaded)} after loading"
        tiles.append(("Peak memory", size(facts["memory_peak"]), note))
    return tiles


def _run(facts: Facts) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [
        ("Model", facts.get("model")),
        ("Data", facts.get("data")),
        ("Adapter", facts.get("adapter")),
        ("Trained parameters", _parameters(facts)),
        ("Steps", _steps(facts)),
        ("Real tokens", _count(facts.get("tokens"))),
        ("Padding", _optional(percent, facts.get("padding_share"))),
        ("Training time", _optional(duration, facts.get("seconds"))),
        ("Tokens per second", _count(facts.get("tokens_per_second"))),
        ("Memory after loading", _optional(size, facts.get("memory_loaded"))),
        ("Peak memory", _optional(size, facts.get("memory_peak"))),
        ("Device", facts.get("device")),
        ("Dtype", facts.get("dtype")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())),
        *facts.get("more", {}).items(),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _parameters(facts: Facts) -> str | None:
    trained, total = facts.get("trained_parameters"), facts.get("total_parameters")
    if trained is None:
        return None
    share = f" of {total:,} ({percent(trained / total, digits=2)})" if total else ""
    return f"{trained:,}{share}"


def _steps(facts: Facts) -> str | None:
    done, planned = facts.get("steps"), facts.get("total_steps")
    if done is None:
        return None
    return f"{done:,}" if planned in (None, done) else f"{done:,} of {planned:,}"


TITLES = {
    "loss": "Loss (nats per token)",
    "perplexity": "Perplexity",
    "accuracy": "Token accuracy",
    "bleu4": "BLEU-4",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougel": "ROUGE-L",
    "tokens": "Supervised tokens",
    "answers": "Generated answers",
}


def _metrics(before: Values, after: Values) -> dict[str, Any] | None:
    """The table of evaluations: columns, and rows of name, cells, change and whether it is good."""
    parts = {"Before": before, "After": after}
    shown = {name: values for name, values in parts.items() if values}
    if not shown:
        return None
    known = [n for n in (*METRICS, "tokens", "answers") if n in before or n in after]
    others = [n for n in {**before, **after} if n not in known]
    rows = []
    for name in (*known, *others):
        cells = [_metric(name, values.get(name)) for values in shown.values()]
        change, verdict = "", ""
        old, new = before.get(name), after.get(name)
        if name not in ("tokens", "answers") and _is_number(old) and _is_number(new):
            difference = new - old
            relative = old and name != "accuracy"  # whose difference is a percentage already
            share = f" ({percent(difference / old, sign=True)})" if relative else ""
            change = f"{_metric(name, difference, sign=True)}{share}"
            if name in METRICS and difference:
                better = (difference < 0) == (name in MINIMISED)
                verdict = "good" if better else "bad"
        rows.append((TITLES.get(name, name), cells, change, verdict))
    changes = len(shown) == 2
    columns = [*(shown if changes else ["Value"]), *(["Difference"] if changes else [])]
    return {"columns": columns, "rows": rows, "changes": changes}


def _metric(name: str, value: Any, *, sign: bool = False) -> str:
    if not _is_number(value):
        return MISSING
    if name in ("tokens", "answers"):
        return f"{value:,.0f}"
    if name == "accuracy":
        return f"{value * 100:+.1f} points" if sign else percent(value)
    return number(value, sign=sign)


def _sample(sample: Sample) -> dict[str, Any]:
    names = {"reference": "Reference", "before": "Before", "after": "After"}
    answers = [(title, sample[key] or "(empty)") for key, title in names.items() if key in sample]
    return {"prompt": sample.get("prompt", ""), "answers": answers}


def _ledger(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table of what became of the rows, one column a split, and the reasons below it."""
    table: dict[str, list[str]] = {}
    reasons = []
    for i, (split, ledger) in enumerate(splits.items()):
        tokens, packing = ledger.get("tokens", {}), ledger.get("packing", {})
        padding = packing.get("padding_share")
        cells = {
            **{f"Rows {name}": _count(n) for name, n in ledger.get("rows", {}).items()},
            "Examples": _count(ledger.get("examples")),
            **{f"Tokens, {name}": _count(n) for name, n in tokens.items()},
            "Rows after packing": _count(packing.get("rows")),
            "Padding": None if padding is None else percent(padding, digits=2),
        }
        for name, cell in cells.items():
            if cell is not None:
                table.setdefault(name, [MISSING] * len(splits))[i] = cell
        for status, counts in ledger.get("reasons", {}).items():
            reasons += [f"{split}: {n:,} {status}: {reason}" for reason, n in counts.items()]
        reasons += [f"{split}: {note}" for note in ledger.get("notes", ())]
    if not table:
        return None
    return {"columns": list(splits), "rows": list(table.items()), "reasons": reasons}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _optional(form: Any, value: Any) -> str | None:
    return None if value is None else form(value)


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def number(value: float, *, sign: bool = False) -> str:
    """Four significant digits, at most four decimals: `12.35`, `0.4731`, `1.2e+05`."""
    mark = "+" if sign else ""
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:{mark}.2g}"
    decimals = 4 if not value else max(0, 3 - max(math.floor(math.log10(abs(value))), -1))
    return f"{value:{mark},.{decimals}f}"


def percent(share: float, *, sign: bool = False, digits: int = 1) -> str:
    """`0.4731` -> `47.3 %`, which does not wrap."""
    return f"{share * 100:{'+' if sign else ''}.{digits}f}\N{NO-BREAK SPACE}%"


def size(num_bytes: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """`8.4 s`, `6 min 12 s`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"
