"""Bad configs, outputs, and words of the other commands; see `bad_input_scene.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from bad_input_scene import Scene, case, override

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
override(
    "unknown_key", "train.bach=4", "train.bach=4", "no such key", "did you mean 'train.batch'?"
)
override("key_of_another_tool", "learning_rate=1e-4", "learning_rate", "did you mean 'optim.lr'?")
override("unknown_choice", "optim.schedule=cosin", "optim.schedule=cosin", "did you mean 'cosine'?")
override("wrong_type", "data.lazy=maybe", "data.lazy=maybe", "true or false")
override("word_for_number", "train.steps=ten", "train.steps=ten", "a whole number")
override(
    "batch_not_divisible",
    "train.batch=6 train.micro_batch=4",
    "train.batch=6",
    "train.micro_batch=4",
    "3 would divide it",
)
override("best_without_generate", "checkpoint.best=bleu4", "bleu4", "evaluate.generate=true")
override(
    "two_errors_at_once", "train.batch=0 optim.lr=-1", "2 errors", "train.batch=0", "optim.lr=-1"
)


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


@case("run.yaml", "YAML at line 3, column 1")
def malformed_config(s: Scene) -> list[str]:
    return ["finetune", s.text("run.yaml", "model:\n  path: [oops\n")]


@case("run.json", "JSON at line 1, column 10")
def malformed_json_config(s: Scene) -> list[str]:
    return ["finetune", s.text("run.json", '{"model" "x"}')]


@case("luthier finetune", "no FILE", "run.yaml")
def no_config_at_all(s: Scene) -> list[str]:
    return ["finetune"]


@case("'finetun'", "did you mean 'finetune'?")
def unknown_command(s: Scene) -> list[str]:
    return ["finetun", "run.yaml"]


@case("luthier env foo", "takes no argument")
def words_after_env(s: Scene) -> list[str]:
    return ["env", "foo"]


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


@case("precious is a file", "name a folder")
def output_below_a_file(s: Scene) -> list[str]:
    return s.finetune(f"output={s.text('precious', '')}/out")


@case("step-9", "there is no such folder")
def resume_from_nothing(s: Scene) -> list[str]:
    return s.finetune(f"checkpoint.resume={s.here / 'step-9'}")


@case("not whole", "checkpoint.resume=auto")
def resume_from_torn_checkpoint_by_name(s: Scene) -> list[str]:
    step = s.copied_run() / "checkpoints" / "step-2"
    (step / "adapter_model.safetensors").write_bytes(b"torn")
    return s.finetune(f"checkpoint.resume={step}")


@case(
    "output=/proc/luthier",
    "nothing can be written in /proc",
    skip="" if Path("/proc/self").exists() else "needs a place that even root cannot write to",
)
def output_not_writable(s: Scene) -> list[str]:
    return s.finetune("output=/proc/luthier")


@case("evaluate.save=true", "precious is a file")
def evaluate_saves_below_a_file(s: Scene) -> list[str]:
    words = ["evaluate.save=true", "evaluate.generate=true", f"output={s.text('precious', '')}"]
    return ["evaluate", str(s.config()), *words]


@case("train.steps", "section.key=value")
def override_without_value(s: Scene) -> list[str]:
    return s.finetune("train.batch=4", "train.steps")


# ---- merge, predict, convert


@case("nowhere", "does not exist")
def merge_without_base(s: Scene) -> list[str]:
    return ["merge", str(s.here / "nowhere"), str(s.run), str(s.here / "merged")]


@case("nowhere", "no such folder")
def merge_without_adapter(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.here / "nowhere"), str(s.here / "merged")]


@case("nowhere", "no such folder")
def merge_without_adapter_and_base(s: Scene) -> list[str]:
    words = ["--lora_path", str(s.here / "nowhere"), "--output_path", str(s.here / "merged")]
    return ["merge", *words]


@case("exists and is not empty", "new folder")
def merge_into_a_folder_in_use(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.run), str(s.spoiled_model())]


@case("precious is a file", "name a folder")
def merge_below_a_file(s: Scene) -> list[str]:
    return ["merge", str(s.model), str(s.run), s.text("precious", "") + "/merged"]


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


@case("precious is a file", "name a folder")
def predict_below_a_file(s: Scene) -> list[str]:
    rows = s.rows({"src": "what is red?"}, name="rows.json")
    target = s.text("precious", "") + "/answers.jsonl"
    return ["predict", str(s.config()), f"predict.input={rows}", f"predict.output={target}"]


@case("notes.txt", "no GGUF file, no checkpoint of a run", "no model or adapter of PaddleNLP")
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
