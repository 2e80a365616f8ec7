"""The argument files that PaddleNLP publishes: training of weights and adapters translates, the rest is refused by name.

The files are read from LUTHIER_CONFIGS; without it, these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from luthier.errors import Refused
from luthier.interop.paddlenlp_keys import ALIASES, INERT, JOBS, NAMES, OFF, PARALLEL, READ
from luthier.interop.read import read_config


def test_every_argument_has_one_place() -> None:
    groups = [
        set(READ),
        set(ALIASES),
        set(INERT),
        set(PARALLEL),
        set(OFF),
        *map(set, (n for _, n in JOBS)),
    ]
    assert sum(map(len, groups)) == len(NAMES)
    assert set(ALIASES.values()) <= NAMES


def corpus() -> list[Path]:
    root = Path(os.environ.get("LUTHIER_CONFIGS", ""))
    folder = root / "paddlenlp" if (root / "paddlenlp").is_dir() else root
    files = sorted(folder.rglob("*.json")) if os.environ.get("LUTHIER_CONFIGS") else []
    return [path for path in files if "_sample-data" not in path.parts]


needs_corpus = pytest.mark.skipif(not corpus(), reason="LUTHIER_CONFIGS names no argument files")


@needs_corpus
def test_every_key_of_the_published_files_is_known() -> None:
    keys = {key for path in corpus() for key in json.loads(path.read_text("utf-8"))}
    assert len(keys) > 100 and keys - NAMES == set()


ADAPTERS = {
    "lora_argument": "lora",
    "pt_argument": "prefix",
    "vera_argument": "vera",
    "lokr_argument": "lokr",
    "reft_argument": "reft",
}


@needs_corpus
@pytest.mark.parametrize(
    "path",
    [p for p in corpus() if p.stem in ADAPTERS or p.stem in ("sft_argument", "sft_pp_argument")]
    + [p for p in corpus() if p.parent.name == "flashmask" and p.stem in ("sft", "lora")],
    ids=lambda path: "/".join(path.parts[-3:]),
)
def test_published_fine_tuning_files_translate(path: Path) -> None:
    given = json.loads(path.read_text("utf-8"))
    config = read_config([path]).config
    assert config.model.path == given["model_name_or_path"]
    assert config.lr == given["learning_rate"]
    rows = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    assert config.batch == rows
    assert config.adapter.method == ADAPTERS.get(path.stem, "lora" if given.get("lora") else "none")
    assert config.data.length == given.get("max_length", 2048)


METHODS = {
    "ptq_argument": "quantisation",
    "gptq_argument": "GPTQ",
    "awq_argument": "AWQ",
    "ptq_c8_argument": "quantisation",
    "fp8_ptq_argument": "quantisation",
    "dpo_argument": "DPO",
    "dpo_lora_argument": "DPO",
    "kto_argument": "KTO",
    "kto_lora_argument": "KTO",
    "simpo_argument": "SimPO",
    "rm_argument": "RM",
    "rm_flashmask_argument": "RM",
    "ppo_argument": "PPO",
}


@needs_corpus
def test_published_files_with_quantised_bases_translate() -> None:
    wanted = {"qlora_argument": "nf4", "wint8_lora_argument": "int8"}
    found = {p.stem: read_config([p]).config for p in corpus() if p.stem in wanted}
    assert {stem: config.quantize.weights for stem, config in found.items()} == wanted
    assert all(config.adapter.method == "lora" for config in found.values())


@needs_corpus
@pytest.mark.parametrize(
    "path", [p for p in corpus() if p.stem in METHODS], ids=lambda path: "/".join(path.parts[-3:])
)
def test_other_published_files_are_refused_by_method(path: Path) -> None:
    with pytest.raises(Refused, match=METHODS[path.stem]):
        read_config([path])
