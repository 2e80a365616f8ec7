"""The docs' table of `benchmarks.pretraining`: how the losses of the families fall."""

from __future__ import annotations

from typing import Any

POINTS = 5  # steps whose losses are shown, beside the first


def table(found: dict[str, Any], name: str) -> str:
    """A row a family, from the results file of this name."""
    config, families = found["config"], found["families"]
    steps = config["steps"]
    shown = [steps * k // POINTS for k in range(1, POINTS + 1)]
    titles = ["step 1", *(f"to {at}" for at in shown), "held out", f"after {steps}"]
    lines = [f"| family | weights | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for family, run in families.items():
        losses, held = run["losses"], list(run["held_out"].values())
        means = [sum(part) / len(part) for at in shown for part in [losses[at - 10 : at]]]
        cells = [losses[0], *means, held[0], held[-1]]
        numbers = " | ".join(f"{value:.2f}" for value in cells)
        lines.append(f"| {family} | {run['weights'] / 1e6:.0f} M | {numbers} |")
    tokens = max(run["tokens"] for run in families.values())
    lines += [
        "",
        f"{steps} steps of {config['batch']} rows of {config['length']} tokens ({tokens:,} in all, none twice), "
        f"{config['dtype']}, rate {config['lr']:g} with 20 steps of warm-up; losses in nats, means of the ten steps up "
        f"to that one. One run each, torch {found['versions']['torch']}. `benchmarks/pretraining/results/{name}`.",
    ]
    return "\n".join(lines) + "\n"
