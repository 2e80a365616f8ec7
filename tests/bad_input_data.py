"""Bad rows, models and adapters; see `bad_input_scene.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bad_input_scene import GOOD, LONG, Scene, case, override
from safetensors.torch import load_file, save_file

from luthier.data.indexed import write_tokens
from tests.conftest import VOCAB

# ---- rows


@case("nothing.json", "there is no such file or folder", "run.json")
def missing_data_file(s: Scene) -> list[str]:
    return s.finetune(data__path=str(s.here / "nothing.json"))


@case("train.json", "holds no rows")
def empty_data_file(s: Scene) -> list[str]:
    return s.finetune(data__path=s.text("train.json", ""))


@case("is empty", "train.json")
def empty_data_folder(s: Scene) -> list[str]:
    (s.here / "rows").mkdir()
    return s.finetune(data__path=str(s.here / "rows"))


@case("train.csv", "'.csv'", ".jsonl")
def unknown_data_suffix(s: Scene) -> list[str]:
    return s.finetune(data__path=s.text("train.csv", "a,b\n"))


@case("train.json:2:31", "malformed JSON", "delimiter")
def malformed_line(s: Scene) -> list[str]:
    line = json.dumps(GOOD)
    return s.finetune(
        data__path=s.text("train.json", f'{line}\n{{"src": "what is red?", "tgt" "a"}}\n')
    )


@case("train.json:1:", "malformed JSON")
def malformed_first_line(s: Scene) -> list[str]:
    return s.finetune(data__path=s.text("train.json", '{"src": "what is red?"\n'))


@case("train.json:3:3", "malformed JSON")
def malformed_array(s: Scene) -> list[str]:
    return s.finetune(data__path=s.text("train.json", f"[{json.dumps(GOOD)},\n\n  oops]"))


@case("train.json:1", "question", "data.columns")
def wrong_fields(s: Scene) -> list[str]:
    return s.finetune(data__path=s.rows({"question": "a", "reply": "b"}))


@case("train.json:2", "tgt")
def wrong_fields_later(s: Scene) -> list[str]:
    return s.finetune(data__path=s.rows(GOOD, {"src": "and blue?"}))


@case("train.json:2", "src", "tgt", "2", "1")
def turns_of_different_lengths(s: Scene) -> list[str]:
    return s.finetune(data__path=s.rows(GOOD, {"src": ["a", "b"], "tgt": ["c"]}))


@case("train.json:2", "0xff", "not UTF-8", "iconv")
def not_utf8(s: Scene) -> list[str]:
    line = json.dumps(GOOD).encode()
    bad = line.replace(b"colour", b"\xff\xfe")
    return s.finetune(data__path=s.text("train.json", line + b"\n" + bad + b"\n"))


@case("train.json:2", "data.length=64", "overlong=refuse")
def row_longer_than_length(s: Scene) -> list[str]:
    return s.finetune("data.length=64", "data.overlong=refuse", data__path=s.rows(GOOD, LONG))


@case("no row of 2 is usable", "2 x longer than data.length=64", "train.json:1")
def all_rows_dropped(s: Scene) -> list[str]:
    return s.finetune("data.length=64", "data.overlong=drop", data__path=s.rows(LONG, LONG))


@case("evaluate.before", "no evaluation rows", "data.validation_path")
def evaluate_before_without_dev(s: Scene) -> list[str]:
    return s.finetune("evaluate.before=true", data__path=s.rows(GOOD, GOOD))


@case("no dev, validation or test part", "data.validation_path")
def evaluate_without_dev(s: Scene) -> list[str]:
    return ["evaluate", str(s.config(data__path=s.rows(GOOD)))]


@case("chat.jinja", "template")
def missing_template(s: Scene) -> list[str]:
    return s.finetune(f"data.template={s.here / 'chat.jinja'}")


# ---- model


@case("nowhere", "does not exist", "model.path")
def missing_model_folder(s: Scene) -> list[str]:
    return s.finetune(f"model.path={s.here / 'nowhere'}")


@case("'lama'", "not known", "did you mean 'llama'?")
def unknown_model_type(s: Scene) -> list[str]:
    model = s.spoiled_model()
    path = model / "config.json"
    path.write_text(path.read_text().replace('"model_type": "llama"', '"model_type": "lama"'))
    return s.finetune(model__path=str(model))


@case("there is no model.safetensors", "model.init=random")
def folder_without_weights(s: Scene) -> list[str]:
    model = s.spoiled_model()
    (model / "model.safetensors").unlink()
    return s.finetune(model__path=str(model))


@case("config.json cannot be read", "line 1 column 2")
def broken_model_config(s: Scene) -> list[str]:
    model = s.spoiled_model()
    (model / "config.json").write_text("{oops")
    return s.finetune(model__path=str(model))


@case("model.safetensors", "truncated", "bytes")
def truncated_weights(s: Scene) -> list[str]:
    model = s.spoiled_model()
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return s.finetune(model__path=str(model))


@case("1 of 2 files are missing", "model-00002-of-00002.safetensors")
def missing_shard(s: Scene) -> list[str]:
    model = s.spoiled_model()
    _shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    return s.finetune(model__path=str(model))


@case("model-00002-of-00002.safetensors", "header", "truncated")
def corrupt_shard(s: Scene) -> list[str]:
    model = s.spoiled_model()
    _shard(model)
    (model / "model-00002-of-00002.safetensors").write_bytes(b"not a shard of weights at all")
    return s.finetune(model__path=str(model))


def _shard(model: Path) -> None:
    """Cut the model's one weight file into two and write their index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:4], names[4:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, model / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


@case("NaN", "model.norm.weight")
def nan_in_weights(s: Scene) -> list[str]:
    model = s.spoiled_model()
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return s.finetune(model__path=str(model))


@case("do not fit", "186 of its tokens", "embedding's 100 rows")
def wrong_tokenizer(s: Scene) -> list[str]:
    return s.finetune(model__path=str(s.other_model(vocab_size=100)))


def without_eos(s: Scene, *more: str) -> str:
    model = s.spoiled_model()
    for file, keys in (
        ("tokenizer_config.json", ("eos_token", *more)),
        ("config.json", ("eos_token_id", "pad_token_id")),
    ):
        fields = json.loads((model / file).read_text("utf-8"))
        kept = {key: value for key, value in fields.items() if key not in keys}
        (model / file).write_text(json.dumps(kept))
    (model / "generation_config.json").unlink()
    return str(model)


@case("have to end in a token", "neither the tokenizer", "set eos_token")
def tokenizer_without_eos(s: Scene) -> list[str]:
    return s.finetune(model__path=without_eos(s))


@case("data.template is none", "this tokenizer has none", "data.template")
def tokenizer_without_eos_or_template(s: Scene) -> list[str]:
    return s.finetune("data.template=none", model__path=without_eos(s, "pad_token"))


PRETRAINING: dict[str, Any] = {
    "train__mode": "pretrain",
    "adapter__method": None,
    "adapter__rank": None,
}


@case("have to end in a token", "set eos_token")
def pretraining_without_eos(s: Scene) -> list[str]:
    rows = s.rows({"text": "red and blue"})
    return s.finetune(data__path=rows, model__path=without_eos(s), **PRETRAINING)


@case("data.length=512", "256 positions", "model.rope_scaling.factor=2")
def pretraining_beyond_positions(s: Scene) -> list[str]:
    return s.finetune("data.length=512", data__path=s.rows({"text": "red and blue"}), **PRETRAINING)


@case("token 1 is 300", "ends at 285", "another tokenizer made them")
def shard_with_ids_that_the_tokenizer_lacks(s: Scene) -> list[str]:
    write_tokens(s.here / "corpus", [[5, 300, 2]] * 9, VOCAB, {})
    return s.finetune(data__path=str(s.here / "corpus"), **PRETRAINING)


@case("another tokenizer made them (hash 0123abc,", "give the text itself")
def shard_of_another_tokenizer(s: Scene) -> list[str]:
    write_tokens(s.here / "corpus", [[5, 30, 2]] * 9, VOCAB, {"tokenizer": "0123abc"})
    return s.finetune(data__path=str(s.here / "corpus"), **PRETRAINING)


@case("2 of another shape: lm_head.weight, model.embed_tokens.weight", "model.misfits=accept")
def vocabulary_of_another_size(s: Scene) -> list[str]:
    model = s.spoiled_model()
    fields = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(fields | {"vocab_size": 400}))
    return s.finetune(model__path=str(model))


override(
    "misfits_under_an_adapter", "model.misfits=accept", "model.misfits=accept", "full fine-tuning"
)


@case("no tokenizer files", "tokenizer.json")
def model_without_tokenizer(s: Scene) -> list[str]:
    model = s.spoiled_model()
    (model / "tokenizer.json").unlink()
    return s.finetune(model__path=str(model))


override("length_beyond_positions", "data.length=512", "data.length=512", "256 positions")
override(
    "gpu_without_one",
    "model.device=cuda",
    "model.device=cuda",
    "no such device",
    "cpu",
    skip="there is a GPU" if torch.cuda.is_available() else "",
)
override("device_that_is_none", "model.device=abacus", "model.device=abacus", "no device")
override("more_layers", "model.num_layers=9", "model.num_layers=9", "2 layers")

# ---- adapters

override("rank_zero", "adapter.rank=0", "adapter.rank=0", "at least 1")
override("rank_negative", "adapter.rank=-4", "adapter.rank=-4", "at least 1")
override("rank_above_matrix", "adapter.rank=65", "adapter.rank=65", "q_proj", "64 -> 64")
override("targets_match_nothing", "adapter.targets=w_pack", "w_pack", "q_proj")
override("targets_broken_pattern", "adapter.targets=(q", "(q", "regular expression")


@case("nowhere", "no such folder")
def missing_adapter_folder(s: Scene) -> list[str]:
    return s.finetune(f"adapter.path={s.here / 'nowhere'}")


@case("adapter_config.json", "run.json")
def folder_without_adapter(s: Scene) -> list[str]:
    return s.finetune(f"adapter.path={s.here}")


@case("14 of its 28 tensors do not fit", "its shape is 64x2, 32x2 would fit")
def adapter_of_another_shape(s: Scene) -> list[str]:
    other = s.other_model(hidden_size=32)
    adapter = _without_hash(s)
    return s.finetune(f"adapter.path={adapter}", model__path=str(other))


@case("other weights", "hash")
def adapter_of_another_base(s: Scene) -> list[str]:
    return s.finetune(f"adapter.path={s.run}", model__path=str(s.other_model(seed=5)))


@case("adapter_model.safetensors", "copy the folder again")
def corrupt_adapter(s: Scene) -> list[str]:
    adapter = _without_hash(s)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return s.finetune(f"adapter.path={adapter}")


def _without_hash(s: Scene) -> Path:
    """The run's adapter as PEFT would have saved it: the base's hash is not recorded."""
    folder = s.here / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(s.run / name, folder / name)
    return folder


# ---- checkpoints that do not fit their config


def _retensored(s: Scene, change: Any) -> list[str]:
    """The model with its tensors changed."""
    model = s.spoiled_model()
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return s.finetune(model__path=str(model))


@case("1 missing: model.layers.1.mlp.up_proj.weight", "config.json")
def weights_with_a_missing_tensor(s: Scene) -> list[str]:
    return _retensored(s, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


@case("1 unexpected: model.layers.9.extra.weight")
def weights_with_an_unexpected_tensor(s: Scene) -> list[str]:
    return _retensored(s, lambda t: t.update({"model.layers.9.extra.weight": torch.zeros(2)}))


@case("1 of another shape: model.norm.weight")
def weights_of_another_shape(s: Scene) -> list[str]:
    return _retensored(s, lambda t: t.update({"model.norm.weight": torch.ones(7)}))


@case("'gptj'", "attention interface", "nearest family that is tested is gpt_neox", "deepseek_v3")
def family_without_support(s: Scene) -> list[str]:
    model = s.spoiled_model()
    (model / "config.json").write_text(json.dumps({"model_type": "gptj", "vocab_size": 320}))
    return s.finetune(model__path=str(model))


@case("Python code", "model.trust_remote_code=true")
def family_of_remote_code(s: Scene) -> list[str]:
    model = s.spoiled_model()
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config))
    return s.finetune(model__path=str(model))
