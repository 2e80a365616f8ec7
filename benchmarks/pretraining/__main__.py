"""Models of a real size trained from scratch: `python -m benchmarks.pretraining`.

GPT-2-, NeoX-, OPT- and Bloom-shaped models of 17 to 21 million weights, on the C4 sample of `LUTHIER_DATA`, with a byte-level
BPE of 8,192 tokens made of its texts: each is one `luthier finetune` in a process of its own, whose losses and
held-out losses are kept. The steps make less than one pass over the texts: no token is trained twice. How fast it ran
is not kept; machines are shared. Families that were measured before stay in the results file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu.json"
WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 384, 8, 6, 128, 8192
DECODER = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 1024},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "gpt_neox": {**DECODER, "intermediate_size": 4 * WIDTH, "max_position_embeddings": 1024},
    "opt": {
        **DECODER,
        **{"word_embed_proj_dim": WIDTH, "ffn_dim": 4 * WIDTH, "max_position_embeddings": 1024},
        **{"dropout": 0.0, "attention_dropout": 0.0},
    },
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
}
END = "<|end|>"


def make_folder(family: str, data: Path, folder: Path) -> Path:
    """A config.json and a tokenizer, no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    lines = data.read_text("utf-8").splitlines()
    core.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END).save_pretrained(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **ids, **SHAPES[family])
    config.save_pretrained(folder)
    return folder


def train(family: str, args: argparse.Namespace, here: Path) -> dict[str, Any]:
    """One run; its losses, those of held-out text, and the number of weights."""
    output = here / "run"
    config = {
        "model": {"path": str(make_folder(family, args.data, here / family)), "init": "random"}
        | {"dtype": args.dtype, "device": "cpu"},
        "data": {"path": str(args.data), "length": LENGTH, "split": "90,10,0"}
        | {"cache": str(here.parent / "cache"), "workers": 0},
        "optim": {"lr": args.lr, "betas": [0.9, 0.95], "schedule": "cosine", "lr_end": args.lr / 10}
        | {"warmup": 20},
        "train": {"mode": "pretrain", "steps": args.steps, "batch": args.batch},
        "evaluate": {"before": True, "every": args.every, "rows": 16, "micro_batch": 4},
        "checkpoint": {"every": "never"},
        "log": {"sinks": [], "progress": "none"},
        "output": str(output),
    }
    (here / "run.json").write_text(json.dumps(config), "utf-8")
    subprocess.run(
        [sys.executable, "-m", "luthier", "finetune", str(here / "run.json")], check=True
    )
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r["loss"] for r in records if r["kind"] == "train"]
    held = {str(r["step"]): round(r["loss"], 4) for r in records if r["kind"] == "evaluate"}
    return {
        "weights": _weights(output),
        "losses": [round(loss, 4) for loss in trained],
        "held_out": held,
        "tokens": max(r["tokens"] for r in records if r["kind"] == "train"),  # of all steps so far
    }


def _weights(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    folder = os.environ.get("LUTHIER_DATA")
    args.data = Path(str(folder)) / "c4_demo.jsonl"
    if not folder or not args.data.is_file():
        sys.exit("set LUTHIER_DATA to the folder of c4_demo.jsonl (docs/tasks/data-sets.md)")
    import torch
    import transformers

    names = ("steps", "batch", "lr", "dtype")
    config = {name: getattr(args, name) for name in names}
    config |= {"length": LENGTH, "vocabulary": VOCABULARY}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    about = {
        "config": config,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit.stdout.strip() or None,
        "device": platform.processor() or "cpu",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for family in args.families:
            here = Path(place) / family
            here.mkdir()
            run = train(family, args, here)
            print(family, run["held_out"], flush=True)
            # another process may have measured another family meanwhile
            kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else about
            families = kept.get("families", {}) if kept["config"] == config else {}
            families[family] = run
            RESULTS.write_text(
                json.dumps({**about, "families": families}, indent=1) + "\n", "utf-8"
            )


if __name__ == "__main__":
    main()
