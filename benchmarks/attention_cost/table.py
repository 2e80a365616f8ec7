"""The docs' table of `benchmarks.attention_cost`: microseconds per token by the length of rows."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, Any], name: str) -> str:
    """A row a length of rows, from the results file of this name."""
    config, tables = found["config"], found["tables"]
    names = list(tables)
    first = names[0]
    lines = [f"| row, tokens | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for width in tables[first]:
        cells = (tables[name].get(width) for name in names)
        shown = ("" if c is None else f"{c['us_per_token']:.1f}" for c in cells)
        lines.append(f"| {int(width):,} | {' | '.join(shown)} |")
    lines += [
        "",
        f"Microseconds per token of one layer's attention, forward and backward, {config['tokens']:,} tokens in all; "
        f"{config['heads']} heads of {config['head_dim']} over {config['kv_heads']} of keys, {config['dtype']} on "
        f"{found['device']}, {found['threads']} thread(s), torch {found['versions']['torch']}. `packed`: documents of "
        f"{config['document']} tokens on average. The rows of `{first}` lie within {found['spread']:.1%} of each other. "
        f"`benchmarks/attention_cost/results/{name}`.",
    ]
    return "\n".join(lines) + "\n"
