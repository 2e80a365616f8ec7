"""PaddleNLP's pre-training arguments (run_pretrain.py) -> our config.

What its script has of its own: token files in `input_dir`, their `split`, rows that ignore document borders,
random weights unless `continue_training`, a schedule down to `min_learning_rate`, evaluation of ten batches.
Arguments that it shares with fine-tuning are translated in `paddlenlp.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import Refused
from luthier.interop.paddlenlp_arguments import Arguments

if TYPE_CHECKING:
    from luthier.interop.paddlenlp import Translation

EVALUATED = 10  # batches of an evaluation, fixed in its script
OWN = ("split", "min_learning_rate", "num_hidden_layers")  # beside input_dir


def is_pretraining(a: Arguments) -> bool:
    """Whether they are run_pretrain.py's. Refused for some of them without `input_dir`, or without an end."""
    own = [name for name in OWN if name in a]
    if "input_dir" not in a:
        if own:
            raise Refused(
                f"pre-training (run_pretrain.py) was asked for, by {', '.join(own)}",
                "input_dir is not given",
                "give input_dir, the folder of the .bin and .idx files; or leave these arguments out",
            )
        return False
    if a["max_steps"] <= 0:
        raise Refused(
            "pre-training without max_steps",
            "PaddleNLP lays its data and its learning rate over max_steps",
            "give max_steps",
        )
    return True


def model(t: Translation, a: Arguments) -> None:
    t.put("train.mode", "pretrain", "input_dir")
    if "continue_training" not in a:
        t.put("model.init", "random", "continue_training")
    if "num_hidden_layers" in a:
        t.put("model.num_layers", a["num_hidden_layers"], "num_hidden_layers")
    words = a["tokenizer_name_or_path"]
    if words is not None and words != a["model_name_or_path"]:
        t.put("model.tokenizer", words, "tokenizer_name_or_path")


def data(t: Translation, a: Arguments) -> None:
    t.put("data.path", _path(a), "input_dir")
    t.put("data.split", a["split"], "split")
    t.put("data.length", a["max_seq_length"], "max_seq_length")
    t.put("data.borders", "ignore", "input_dir")  # its attention knows no documents
    if a["do_predict"]:
        t.remarks.append(
            "do_predict is true: the loss on the test part is not measured; luthier evaluate measures "
            "that of the validation part"
        )


def schedule(t: Translation, a: Arguments) -> bool:
    """Warm-up and decay of its own two schedules; False where the trainer's hold.

    Its first step is t = 1 of lr(t) = max t / W; W steps later the rate falls until `decay_steps`, then it is
    `min_learning_rate`. Without a warm-up ours falls one step later than its.
    """
    kind = a["lr_scheduler_type"]
    if kind not in ("linear", "cosine"):
        return False
    peak, steps = a["learning_rate"], a["max_steps"]
    warmup, name = a["warmup_steps"], "warmup_steps"
    if warmup <= 0:
        exact, name = a["warmup_ratio"] * steps, "warmup_ratio"
        warmup = math.ceil(round(exact, 6))
        if warmup != exact:
            t.remarks.append(f"warmup_ratio: {exact:g} steps are taken as {warmup}")
    # "cooldown" is the cosine that reaches its end after decay_steps, wherever the run ends
    t.put("optim.schedule", "linear" if kind == "linear" else "cooldown", "lr_scheduler_type")
    t.put("optim.lr_end", a["min_learning_rate"], "min_learning_rate")
    end = a["decay_steps"] or steps
    t.put("optim.decay_steps", max(end - warmup, 1), "decay_steps", "max_steps")
    if warmup > 1:
        t.put("optim.warmup", warmup - 1, name)
        t.put("optim.warmup_start", peak / warmup, name)
    return True


def rest(t: Translation, a: Arguments) -> None:
    """Evaluation and checkpoints, where its script differs from fine-tuning."""
    if "max_evaluate_steps" not in a:
        t.put(
            "evaluate.rows",
            EVALUATED * a["per_device_eval_batch_size"],
            "per_device_eval_batch_size",
        )
    if "save_strategy" not in a:
        t.put("checkpoint.every", a["save_steps"], "save_steps")


def _path(a: Arguments) -> str | list[dict[str, Any]]:
    """`input_dir`: a folder of token files, each with the same weight, or "weight prefix weight prefix"."""
    words = a["input_dir"].split()
    if len(words) == 1:
        folder = Path(words[0])
        if not folder.is_dir():
            return words[0]
        found = sorted(p for p in folder.iterdir() if p.suffix == ".idx")
        if not found:
            old = any(p.name.endswith("_idx.npz") for p in folder.iterdir())
            what = "only the older _ids.npy and _idx.npz" if old else "no .idx file"
            raise Refused(
                f"input_dir={words[0]}",
                f"it holds {what}",
                "write .bin and .idx, with luthier tokenize or PaddleNLP's create_pretraining_data.py",
            )
        if len(found) == 1:
            return str(found[0].with_suffix(""))
        return [{"path": str(p.with_suffix("")), "weight": 1.0} for p in found]
    asked = f"input_dir={' '.join(words)}"
    if len(words) % 2:
        raise Refused(
            asked, "several files need a weight before each", 'write "0.3 FIRST 0.7 SECOND"'
        )
    parts = []
    for weight, path in zip(words[::2], words[1::2], strict=True):
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise Refused(asked, f"{weight} is no weight", "give numbers above 0; they need no sum")
        parts.append({"path": path, "weight": share})
    return parts
