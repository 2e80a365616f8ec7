"""The table of bad input: each case makes the words of a command and names what its message must say.

A case gets a `Scene`, spoils one thing in its own folder and returns the command line. `test_bad_input.py`
runs it and checks exit code, message and that no file changed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.conftest import tiny_model_, tiny_tokenizer_
from tests.tiny_runs import copy_model, rows_, tiny_config, write_rows

from luthier.models.load import save_model


@dataclass(frozen=True)
class Scene:
    """What a case starts from: a model, data, a finished run (read only), and an empty folder of its own."""

    here: Path
    model: Path
    data: Path
    run: Path

    def config(self, **keys: Any) -> Path:
        """A config file whose run is right but for `keys`."""
        path = self.here / "run.json"
        tree = tiny_config(self.model, self.data, self.here / "out", **keys)
        path.write_text(json.dumps(tree), "utf-8")
        return path

    def finetune(self, *overrides: str, **keys: Any) -> list[str]:
        return ["finetune", str(self.config(**keys)), *overrides]

    def text(self, name: str, content: str | bytes) -> str:
        """A data file of this content."""
        path = self.here / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def rows(self, *rows: dict[str, Any], name: str = "train.json") -> str:
        return str(write_rows(self.here / name, rows))

    def spoiled_model(self) -> Path:
        """A copy of the model that may be changed."""
        return copy_model(self.model, self.here / "model")

    def other_model(self, **keys: Any) -> Path:
        """A model of other sizes."""
        folder = self.here / "other"
        folder.mkdir()
        save_model(tiny_model_("llama", **keys), folder, tiny_tokenizer_())
        return folder

    def copied_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.here / "out"))


@dataclass(frozen=True)
class Case:
    name: str
    words: Callable[[Scene], list[str]]
    says: tuple[str, ...]


CASES: list[Case] = []
GOOD = {"src": "what is red?", "tgt": "a colour"}
LONG = {"src": "what is red?", "tgt": "red and blue " * 60}


def case(*says: str) -> Callable[[Callable[[Scene], list[str]]], Callable[[Scene], list[str]]]:
    """Add a case; its message must hold every fragment of `says`."""

    def add(words: Callable[[Scene], list[str]]) -> Callable[[Scene], list[str]]:
        CASES.append(Case(words.__name__, words, says))
        return words

    return add


def override(name: str, text: str, *says: str) -> None:
    """A case of one override of a right config."""
    CASES.append(Case(name, lambda s: s.finetune(*text.split()), says))


# ---- data


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


@case("train.json:2:30", "malformed JSON", "delimiter")
def malformed_line(s: Scene) -> list[str]:
    line = json.dumps(GOOD)
    return s.finetune(data__path=s.text("train.json", f'{line}\n{{"src": "what is red?", "tgt" "a"}}\n'))


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
    return s.finetune(
        "data.length=64", "data.overlong=refuse", data__path=s.rows(GOOD, LONG)
    )


@case("train", "dropped", "64")
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


@case("do not fit", "embedding's 100 rows", "286")
def wrong_tokenizer(s: Scene) -> list[str]:
    return s.finetune(model__path=str(s.other_model(vocab_size=100)))


@case("no tokenizer files", "tokenizer.json")
def model_without_tokenizer(s: Scene) -> list[str]:
    model = s.spoiled_model()
    (model / "tokenizer.json").unlink()
    return s.finetune(model__path=str(model))


override("length_beyond_positions", "data.length=512", "data.length=512", "256 positions")
override("gpu_without_one", "model.device=cuda", "model.device=cuda", "no such device", "cpu")
override("device_that_is_none", "model.device=abacus", "model.device=abacus", "no device")
override("more_layers", "model.num_layers=9", "model.num_layers=9", "2 layers")

# ---- adapters

override("rank_zero", "adapter.rank=0", "adapter.rank=0", "at least 1")
override("rank_negative", "adapter.rank=-4", "adapter.rank=-4", "at least 1")
override("rank_above_matrix", "adapter.rank=65", "adapter.rank=65", "32")
override("targets_match_nothing", "adapter.targets=w_pack", "w_pack", "q_proj")
override("targets_broken_pattern", "adapter.targets=(q", "(q", "regular expression")


@case("nowhere", "no such folder")
def missing_adapter_folder(s: Scene) -> list[str]:
    return s.finetune(f"adapter.path={s.here / 'nowhere'}")


@case("adapter_config.json", "run.json")
def folder_without_adapter(s: Scene) -> list[str]:
    return s.finetune(f"adapter.path={s.here}")


@case("q_proj", "shape", "32")
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


# ---- the config

override("lr_negative", "optim.lr=-1", "optim.lr=-1", "above 0")
override("lr_zero", "optim.lr=0", "optim.lr=0", "above 0")
override("lr_huge", "optim.lr=1000", "optim.lr=1000", "at most 100")
override("lr_nan", "optim.lr=.nan", "optim.lr=", "a number above 0")
override("length_one", "data.length=1", "data.length=1", "at least 2")
override("source_length_zero", "data.source_length=0", "data.source_length=0", "at least 1")
override("batch_zero", "train.batch=0", "train.batch=0", "at least 1")
override("batch_fraction", "train.batch=2.5", "train.batch=2.5", "a whole number")
override("steps_zero", "train.steps=0", "train.steps=0", "at least 1")
override("unknown_key", "train.bach=4", "train.bach=4", "no such key", "did you mean 'train.batch'?")
override("key_of_another_tool", "learning_rate=1e-4", "learning_rate", "did you mean 'optim.lr'?")
override("unknown_choice", "optim.schedule=cosin", "optim.schedule=cosin", "did you mean 'cosine'?")
override("wrong_type", "data.lazy=maybe", "data.lazy=maybe", "true or false")
override("word_for_number", "train.steps=ten", "train.steps=ten", "a whole number")
override("override_without_value", "train.steps", "'train.steps'", "section.key=value")
override(
    "batch_not_divisible",
    "train.batch=6 train.micro_batch=4",
    "train.batch=6",
    "train.micro_batch=4",
    "3 would divide it",
)
override("best_without_generate", "checkpoint.best=bleu4", "bleu4", "evaluate.generate=true")
override("two_errors_at_once", "train.batch=0 optim.lr=-1", "2 errors", "train.batch=0", "optim.lr=-1")


@case("data.lazy=true", "train.steps or train.tokens")
def lazy_without_steps(s: Scene) -> list[str]:
    return s.finetune("data.lazy=true", train__steps=None)


@case("nothing.yaml", "no such file")
def missing_config_file(s: Scene) -> list[str]:
    return ["finetune", str(s.here / "nothing.yaml")]


@case("run.json", "folder")
def config_that_is_a_folder(s: Scene) -> list[str]:
    (s.here / "run.json").mkdir()
    return ["finetune", str(s.here / "run.json")]


@case("run.yaml:2:", "YAML")
def malformed_config(s: Scene) -> list[str]:
    return ["finetune", s.text("run.yaml", "model:\n  path: [oops\n")]


@case("run.json:1:10", "JSON")
def malformed_json_config(s: Scene) -> list[str]:
    return ["finetune", s.text("run.json", '{"model" "x"}')]


@case("luthier finetune", "no FILE", "run.yaml")
def no_config_at_all(s: Scene) -> list[str]:
    return ["finetune"]


@case("'finetun'", "did you mean 'finetune'?")
def unknown_command(s: Scene) -> list[str]:
    return ["finetun", "run.yaml"]


@case("'lorra'", "there are:", "did you mean 'lora'?")
def unknown_example(s: Scene) -> list[str]:
    return ["example", "lorra"]


@case("verify pack", "did you mean 'packing'?")
def unknown_check(s: Scene) -> list[str]:
    return ["verify", "pack", "run.yaml"]


@case("--rows x", "positive number")
def preview_of_no_number(s: Scene) -> list[str]:
    return ["preview", str(s.config()), "--rows", "x"]


# ---- output


@case("holds another run", "config.yaml", "checkpoint.resume=auto")
def output_of_another_run(s: Scene) -> list[str]:
    s.copied_run()
    return s.finetune("train.seed=7")


@case("optim.lr was", "now 0.001", "another output")
def resume_with_another_config(s: Scene) -> list[str]:
    s.copied_run()
    return s.finetune("checkpoint.resume=auto", "optim.lr=0.001")


@case("holds another model", "model.safetensors")
def output_that_is_a_model(s: Scene) -> list[str]:
    return s.finetune(f"output={s.spoiled_model()}")


@case("it is a file", "name a folder")
def output_that_is_a_file(s: Scene) -> list[str]:
    return s.finetune(f"output={s.text('out', 'precious')}")


@case("below", "is a file")
def output_below_a_file(s: Scene) -> list[str]:
    return s.finetune(f"output={s.text('file', 'precious')}/out")


@case("step-9", "there is no such folder")
def resume_from_nothing(s: Scene) -> list[str]:
    return s.finetune(f"checkpoint.resume={s.here / 'step-9'}")


@case("not whole", "checkpoint.resume=auto")
def resume_from_torn_checkpoint_by_name(s: Scene) -> list[str]:
    step = s.copied_run() / "checkpoints" / "step-2"
    (step / "adapter_model.safetensors").write_bytes(b"torn")
    return s.finetune(f"checkpoint.resume={step}")


# ---- merge, predict, convert


@case("nowhere", "does not exist")
def merge_without_base(s: Scene) -> list[str]:
    return ["merge", str(s.here / "nowhere"), str(s.run), str(s.here / "merged")]


@case("nowhere", "no such folder")
def merge_without_adapter(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.here / "nowhere"), str(s.here / "merged")]


@case("nowhere", "adapter_config.json")
def merge_without_adapter_and_base(s: Scene) -> list[str]:
    words = ["--lora_path", str(s.here / "nowhere"), "--output_path", str(s.here / "merged")]
    return ["merge", *words]


@case("exists and is not empty", "new folder")
def merge_into_a_folder_in_use(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.run), str(s.spoiled_model())]


@case("below", "is a file")
def merge_below_a_file(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.run), s.text("file", "precious") + "/merged"]


@case("other weights", "hash")
def merge_with_another_base(s: Scene) -> list[str]:
    return ["merge", str(s.other_model(seed=5)), str(s.run), str(s.here / "merged")]


@case("three folders", "luthier merge BASE ADAPTER OUT")
def merge_of_two_words(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.run)]


@case("rows.json:2", "src")
def predict_without_prompt(s: Scene) -> list[str]:
    rows = s.rows({"src": "what is red?"}, {"tgt": "a colour"}, name="rows.json")
    return ["predict", str(s.config()), f"predict.input={rows}"]


@case("nothing.json", "there is no such file")
def predict_without_input(s: Scene) -> list[str]:
    return ["predict", str(s.config()), f"predict.input={s.here / 'nothing.json'}"]


@case("predict.output", "it is a folder")
def predict_into_a_folder(s: Scene) -> list[str]:
    (s.here / "answers").mkdir()
    rows = s.rows({"src": "what is red?"}, name="rows.json")
    words = [f"predict.input={rows}", f"predict.output={s.here / 'answers'}"]
    return ["predict", str(s.config()), *words]


@case("below", "is a file")
def predict_below_a_file(s: Scene) -> list[str]:
    rows = s.rows({"src": "what is red?"}, name="rows.json")
    target = s.text("file", "precious") + "/answers.jsonl"
    return ["predict", str(s.config()), f"predict.input={rows}", f"predict.output={target}"]


@case("notes.txt", "neither a GGUF file nor a checkpoint")
def convert_something_else(s: Scene) -> list[str]:
    return ["convert", s.text("notes.txt", "hello"), str(s.here / "converted")]


@case("nothing.gguf", "no such file")
def convert_nothing(s: Scene) -> list[str]:
    return ["convert", str(s.here / "nothing.gguf"), str(s.here / "converted")]


@case("short.gguf", "cut short")
def convert_gguf_header_only(s: Scene) -> list[str]:
    return ["convert", s.text("short.gguf", b"GGUF\x03\0\0\0\x07"), str(s.here / "converted")]


@case("short.gguf", "cut short")
def convert_gguf_cut_short(s: Scene) -> list[str]:
    path = s.here / "short.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-3000])
    return ["convert", str(path), str(s.here / "converted")]


@case("exists and is not empty", "new folder")
def convert_into_a_folder_in_use(s: Scene) -> list[str]:
    return ["convert", s.text("short.gguf", b"GGUF"), str(s.spoiled_model())]


@case("not whole", "adapter_model.safetensors")
def convert_torn_checkpoint(s: Scene) -> list[str]:
    step = s.copied_run() / "checkpoints" / "step-2"
    (step / "adapter_model.safetensors").write_bytes(b"torn")
    return ["convert", str(step), str(s.here / "converted")]


def write_gguf(path: Path) -> None:
    """A small GGUF file with a few keys and tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, torch.zeros(32, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


__all__ = ["CASES", "Case", "Scene", "rows_"]
