"""Results of the speed benchmark -> tables of the docs."""

from __future__ import annotations

from typing import Any

JOBS = {
    "lora": "LoRA, rank 8 on all linears",
    "full": "Full fine-tuning",
    "qlora": "LoRA on a quantised base",
}


def page(found: dict[str, Any], file: str) -> str:
    """All tables of one results file, with what they were measured on."""
    parts = [_job(found, job) for job in found.get("jobs", [])]
    if "products" in found:
        parts.append(_gpu(found))
    if found.get("shapes"):
        parts.append(_shapes(found["shapes"]))
    parts.append(_foot(found, file))
    return "\n".join(parts)


def _job(found: dict[str, Any], job: dict[str, Any]) -> str:
    config, size = found["config"], job["batch"]
    together = job.get("micro_batch", size)  # older files tell it where it is all
    rows = f"{size} a step" if together == size else f"{size} a step, {together} at a time"
    lines = [
        f"{JOBS[job['job']]}: {job['model']}, {config['dtype']}, rows of {job['length']:,} tokens, {rows}",
        "",
        "| | real tokens/s | Luthier is faster by | of the product limit | step, s | peak memory, GB (loaded) | first step after, s | loss at steps 1, 4, 8 |",
        "|---" * 8 + "|",
    ]
    for r in job["table"]:
        if "absent" in r or "failed" in r:
            why = f"absent: {r['absent']}" if "absent" in r else f"failed: {r['failed']}"
            lines.append(f"| {r['contestant']} | {why.replace('|', '/')} | | | | | | |")
            continue
        losses = [r["losses"][i - 1] for i in (1, 4, 8) if i <= len(r["losses"])]
        shown = " / ".join(f"{loss:.3f}" for loss in losses)
        cells = [
            r["contestant"],
            _spread(r["tokens_per_second"], "{:,.0f}"),
            _spread(r.get("luthier_is_faster_by"), "{:.2f}"),
            f"{r['share_of_product_limit']['median']:.0%}",
            _spread(r["step_seconds"], "{:.2f}"),
            f"{_gb(r['memory_peak'])} ({_gb(r['memory_loaded'])})",
            f"{r['first_step_after']['median']:.1f}",
            shown if r["same_rows"] else f"{shown} (its own rows)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rates = [rate["all"] for rate in job["rates"]]
    tokens = sum(job["tokens_per_step"]) / len(job["tokens_per_step"])
    limit = sorted(rates)[len(rates) // 2] * 1e9 / (job["flops_per_step"] / tokens)
    lines += [
        "",
        f"Matrix products of these shapes ran at {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s in the same turns; a step of nothing but "
        f"its products would make {limit:,.0f} tokens/s. {len(rates)} turns of {config['steps']} steps, {config['warm']} of them not timed.",
        "",
    ]
    return "\n".join(lines)


def _gpu(found: dict[str, Any]) -> str:
    """What `gpu.py` wrote."""
    shape = found["shape"]
    lines = [
        f"One GPU, random weights of {shape['num_hidden_layers']} layers of {shape['hidden_size']:,}, bf16, packed rows",
        "",
        "| case | real tokens/s | MFU | peak memory, GB (loaded) |",
        "|---|---|---|---|",
    ]
    for r in found["table"]:
        if r["kind"] == "head":
            name = f"the head alone, {r['head']}"
        else:
            ways = [f"recompute {r['recompute']}"] if r["recompute"] != "none" else []
            ways += ["compiled"] if r["compile"] else []
            ways += [r["attention"]] if r["attention"] != "auto" else []
            name = ", ".join([f"{r['method']}, {r['rows']} x {r['length']:,}", *ways])
        if "failed" in r:
            lines.append(f"| {name} | {r['failed'].replace('|', '/')} | | |")
        elif r["kind"] == "head":
            size = f"{r['tokens']:,} x {r['vocabulary']:,} x {r['hidden']:,}"
            speed = f"{r['milliseconds']:.1f} ms ({r['spread'][0]:.1f} to {r['spread'][1]:.1f})"
            lines.append(
                f"| {name}, {size} | {speed} | | {_gb(r['memory_above'])} above its inputs |"
            )
        else:
            low, high = r["spread"]
            mfu = "?" if r["mfu"] is None else f"{r['mfu']:.1%}"
            lines.append(
                f"| {name} | {r['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) | {mfu} "
                f"| {_gb(r['memory_peak'])} ({_gb(r['memory_loaded'])}) |"
            )
    rate = found["products"]
    lines += [
        "",
        f"Square products of {rate['size']:,} ran at {rate['tflops']:,.0f} TFLOP/s. MFU: {found['mfu']}.",
        "",
    ]
    return "\n".join(lines)


def _shapes(shapes: dict[str, Any]) -> str:
    lines = [
        f"Shapes of data, Luthier alone, {shapes['layers']} layers of {shapes['model']}",
        "",
        "| rows | tokens a step | real tokens/s | of normal rows | of the product limit, attention counted | peak memory, GB |",
        "|---" * 6 + "|",
    ]
    for r in shapes["table"]:
        if "failed" in r:
            lines.append(f"| {r['shape']} | failed: {r['failed'].replace('|', '/')} | | | | |")
            continue
        lines.append(
            f"| {r['shape']} | {r['tokens_per_step']:,.0f} | {r['tokens_per_second']:,.0f} | {r['of_normal']:.2f} "
            f"| {r['share_with_attention']:.0%} | {_gb(r['memory_peak'])} |"
        )
    return "\n".join([*lines, ""])


def runs(files: dict[str, dict[str, Any]]) -> str:
    """Luthier beside the best of the peers in all runs: name of a results file -> what it holds."""
    lines = []
    for file, found in files.items():
        for job in found.get("jobs", []):
            rows = {row["contestant"]: row for row in job["table"] if "tokens_per_second" in row}
            ours, best = rows.get("luthier"), rows.get("TRL, best")
            if not ours or not best:
                continue
            rates = [rate["all"] for rate in job["rates"]]
            cells = [
                found.get("date", ""),
                JOBS[job["job"]],
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                *(_spread(row["tokens_per_second"], "{:,.0f}") for row in (ours, best)),
                _spread(best["luthier_is_faster_by"], "{:.2f}"),
                f"{ours['share_of_product_limit']['median']:.0%}",
                f"{ours['memory_peak'] / best['memory_peak']:.2f}",
                f"{len(rates)}",
                f"`{file}`",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "Luthier and TRL at its best in all runs that were kept:",
            "",
            "| date | job | products, GFLOP/s | Luthier, tokens/s | TRL | faster by | of the product limit | of TRL's memory | turns | file |",
            "|---" * 10 + "|",
            *lines,
            "",
        ]
    )


def _foot(found: dict[str, Any], file: str) -> str:
    v = found["versions"]
    changed = ", with changes" if found.get("changed") else ""
    return (
        f"{f'{date}; ' if (date := found.get('date')) else ''}{found['device']}; torch {v['torch']}, transformers {v['transformers']}; commit {(found['commit'] or 'none')[:10]}{changed}. "
        f"Medians (least to greatest). `benchmarks/speed/results/{file}`.\n"
    )


def _spread(value: dict[str, float] | None, form: str) -> str:
    if value is None:
        return ""
    shown = [form.format(value[name]) for name in ("median", "min", "max")]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if shown[1] != shown[2] else shown[0]


def _gb(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:.2f}"
