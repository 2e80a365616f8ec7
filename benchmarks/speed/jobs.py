"""One job of the speed benchmark: its rows, its contestants, its turns, and their table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.speed import contest, peers
from benchmarks.speed.workload import BILLION, Shape, make, random_model


def measure(
    args: argparse.Namespace,
    kind: str,
    folder: Path,
    known: dict[str, str],
    device: str,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """One job: its turns and their table. `known`: environment -> its Python, where one was given."""
    settings = vars(args) | {"device": device}
    if kind == "full":
        settings["lr"] = args.full_lr
    model_name = Path(args.model).name
    if kind == "qlora":
        shape = BILLION | ({"num_hidden_layers": args.layers} if args.layers else {})
        say(f"making a random model of {shape['num_hidden_layers']} layers")
        dtype = getattr(torch, args.dtype)
        settings["model"] = random_model(folder / "base", args.model, shape, dtype)
        # 4,096 tokens a step, by default a row at a time: of what four at once keep for the backward, a base in few
        # bits saves nothing
        settings |= {"length": 1024, "batch": 4}
        model_name = f"random Llama of 1B's shape, {shape['num_hidden_layers']} layers"
    work = make(folder / "rows", kind, settings, ())
    config = Shape.of(AutoConfig.from_pretrained(settings["model"]))
    present = contest.places(chosen(args, kind), known, args.peers, device == "cuda")
    rates = contest.hold(
        present,
        work,
        kind,
        folder,
        repeats=args.repeats,
        limit=args.limit,
        rate=lambda: contest.machine_rate(work, asdict(config), folder),
        say=say,
    )
    return {
        "job": kind,
        "model": model_name,
        "length": settings["length"],
        "batch": settings["batch"],
        "micro_batch": settings["micro_batch"],
        "lr": settings["lr"],
        "tokens_per_step": work.tokens,
        "supervised_per_step": work.supervised,
        "flops_per_step": work.flops,
        "attention_flops_per_step": work.attention_flops,
        "rates": rates,
        "table": contest.summary(present, work, rates, args.warm),
    }


def chosen(args: argparse.Namespace, kind: str) -> list[peers.Contestant]:
    """The contestants of a job: Luthier, its other ways that were asked for, and the peers."""
    also = []
    for text in args.also:
        name, _, words = text.partition(":")
        pairs = [word for word in words.split(",") if word]
        options = {
            "overrides": [pair for pair in pairs if not pair.split("=")[0].isupper()],
            "environment": dict(
                pair.split("=", 1) for pair in pairs if pair.split("=")[0].isupper()
            ),
        }
        full = f"{peers.LUTHIER}, {name}"
        jobs = ("lora", "full", "qlora")
        also.append(peers.Contestant(full, "run_luthier", None, words, options, jobs))
    if kind == "qlora":  # the same base, not quantised: what nf4 saves and costs
        options = {"overrides": ["quantize.weights=none"]}
        name = f"{peers.LUTHIER}, {args.dtype} base"
        also.append(peers.Contestant(name, "run_luthier", None, "", options, ("qlora",)))
    known = [*peers.CONTESTANTS[:1], *also, *peers.CONTESTANTS[1:]]
    return [
        c
        for c in known
        if kind in c.jobs and (not args.only or c.name == peers.LUTHIER or c.name in args.only)
    ]
