"""Any config file -> our config: recognises whose it is by its keys and has it translated.

Overrides of a foreign file use its own names; `section.key=value` is applied to the translation. The
keys of a second file win over the first's. Ours: `configfile.py`; PaddleNLP: `paddlenlp.py`.
MindFormers' YAML is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from luthier.configfile import (
    Layer,
    Resolved,
    file_layer,
    override_layer,
    resolve,
    split_overrides,
)
from luthier.configkeys import KEYS, SECTIONS
from luthier.configtext import Parsed, parse_file
from luthier.errors import Refused
from luthier.interop import paddlenlp
from luthier.interop.paddlenlp_keys import NAMES, names

Suite = Literal["luthier", "paddlenlp", "mindformers"]
Items = list[tuple[str, list[str]]]

MINDFORMERS = names("""
    run_mode runner_config runner_wrapper trainer train_dataset train_dataset_task eval_dataset
    eval_dataset_task use_parallel parallel_config context load_checkpoint auto_trans_ckpt resume_training
    optimizer lr_schedule callbacks eval_callbacks processor recompute_config moe_config pet_config
    only_save_strategy auto_tune pretrained_model_dir training_args
    """)


def read_config(
    paths: Sequence[Path | str],
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Resolved:
    """Read config files of any suite with overrides (words of the command line). Raises `Refused`.

    Without files, foreign overrides alone make the config: PaddleNLP's plain command line. `defaults` are values
    of a command that does without keys which others need.
    """
    parsed = [parse_file(Path(path)) for path in paths]
    foreign, ours, items = _sort(parsed, overrides)
    layers = [file_layer(file) for file in ours]
    remarks: list[str] = []
    if foreign is not None:
        layer, remarks = paddlenlp.translate(*foreign)
        layers.insert(0, layer)
    if defaults:
        layers.insert(0, Layer(dict(defaults), dict.fromkeys(defaults, "default")))
    return resolve([*layers, override_layer(items)], remarks)


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Words of a command line -> (files, overrides).

    Files stand first. `--config FILE`, `--lora FILE` and `--q_lora FILE`, which PaddleNLP's documents
    print, name files too; the first word that is an override ends the files.
    """
    files: list[Path] = []
    rest = list(words)
    while rest:
        if rest[0] in ("--config", "--lora", "--q_lora") and _is_config(rest[1:2]):
            files.append(Path(rest[1]))
            rest = rest[2:]
        elif rest[0].startswith("--") or ("=" in rest[0] and not Path(rest[0]).is_file()):
            break
        else:
            files.append(Path(rest.pop(0)))
    return files, rest


def _is_config(word: list[str]) -> bool:
    return bool(word) and word[0].endswith((".json", ".yaml", ".yml"))


def commands(words: Sequence[str]) -> list[list[str]]:
    """Luthier's commands for a command line of PaddleNLP's fine-tuning script, in their order.

    `do_train`, `do_eval` and `do_predict` say what the script does; prediction after training uses the
    run's result. Bad input gives `finetune`, which will refuse it.
    """
    files, overrides = split_words(words)
    try:
        foreign, _, _ = _sort([parse_file(path) for path in files], overrides)
        jobs = ["finetune"] if foreign is None else paddlenlp.jobs(*foreign)
    except Refused:
        jobs = []
    return [[job, *words] for job in jobs or ["finetune"]]


Foreign = tuple[dict[str, Any], dict[str, str]]


def _sort(
    parsed: Sequence[Parsed], overrides: Sequence[str]
) -> tuple[Foreign | None, list[Parsed], Items]:
    """PaddleNLP's arguments with their origins (None without any), our files, our overrides."""
    theirs: list[Parsed] = []
    ours: list[Parsed] = []
    for file in parsed:
        suite = recognise(file.values)
        if suite == "mindformers":
            marks = ", ".join(sorted(MINDFORMERS & set(file.values))[:3])
            raise Refused(
                f"the config {file.path}",
                f"it is a MindFormers YAML ({marks}); these are not translated yet",
                "luthier example lora prints a config of ours to start from",
            )
        if suite == "paddlenlp" and ours:
            raise Refused(
                f"the config {file.path}",
                f"PaddleNLP arguments stand behind Luthier's own file {ours[0].path}",
                "give the PaddleNLP file first: the later file's keys win",
            )
        (theirs if suite == "paddlenlp" else ours).append(file)

    def is_key(name: str) -> bool:
        return name in KEYS or name in NAMES

    items = split_overrides(overrides, is_key)
    mine = [item for item in items if "." in item[0] or item[0] in KEYS]
    rest = [item for item in items if item not in mine]
    if not theirs and (ours or not any(name in NAMES for name, _ in rest)):
        return None, ours, items
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in theirs:
        values |= file.values
        origins |= {name: file.origin(name) for name in file.values}
    for name, words in rest:
        values[name] = True if not words else words[0] if len(words) == 1 else words
        origins[name] = "override"
    return (values, origins), ours, mine


def recognise(values: dict[str, Any]) -> Suite:
    """Whose file this is, by its top-level keys."""
    given = set(values)
    own = {name for name in given & set(SECTIONS) if isinstance(values[name], dict)}
    own |= given & set(KEYS)
    counts: dict[Suite, int] = {
        "luthier": len(own),
        "mindformers": len(given & MINDFORMERS),
        "paddlenlp": len((given & NAMES) - own),
    }
    return max(counts, key=lambda suite: counts[suite])  # a tie is ours, whose errors name the keys
