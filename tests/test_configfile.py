"""Reading, checking, showing and writing configs: files, overrides, errors, examples, the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from luthier.config import RunConfig
from luthier.config_adapter import METHODS, USUAL, AdapterConfig
from luthier.configfile import from_mapping, json_schema, read, show, split_overrides, to_yaml
from luthier.configkeys import KEYS, SECTIONS, nearest_key
from luthier.configtext import dump_value, parse_file, parse_value
from luthier.errors import Refused

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "luthier" / "examples").glob("*.yaml"))
BASE = """\
model:
  path: base
data:
  path: rows
  length: 1024
optim: {lr: 1e-4}
output: out
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path | list[Path], *overrides: str) -> str:
    with pytest.raises(Refused) as caught:
        read(path if isinstance(path, list) else [path], overrides)
    return str(caught.value)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-2", -2),
        ("1_000", 1000),
        (".5", 0.5),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("true", True),
        ("off", False),
        ("null", None),
        ("none", "none"),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{src: content}", {"src": "content"}),
        ("*.weight", "*.weight"),  # no YAML: text
        ("[qv]_proj", "[qv]_proj"),
        ("a: b: c", "a: b: c"),
    ],
)
def test_values_of_overrides(text: str, value: Any) -> None:
    got = parse_value(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "1e-4",
            "null",
            "yes",
            "010",
            "",
            " x",
            "#a",
            "a: b",
            "a\nb",
            "ü 😀\u2028",
            "...",
            "~",
            "[x",
        ),
        *(1e-05, 3e20, 0.1, True, None, 7, ["a", 1, None], {"b": "x", "a": [1e-4]}),
    ],
)
def test_dumped_values_read_back(value: Any) -> None:
    text = dump_value(value)
    assert parse_value(text) == value and len(text.splitlines()) == 1


# ---- files


def test_a_file_and_where_its_values_stand(run: Path) -> None:
    resolved = read([run])
    assert (resolved.config.optim.lr, resolved.config.data.length) == (1e-4, 1024)
    assert resolved.origins["data.length"] == "run.yaml:5"
    assert resolved.origins["optim.lr"] == "run.yaml:6"
    assert "train.batch" not in resolved.origins


def test_json_with_lines(tmp_path: Path) -> None:
    text = '{\n "model": {"path": "m"},\n "data": {"path": "d",\n "lazy": false}, "output": "o"\n}'
    resolved = read([write(tmp_path, "run.json", text)])
    assert resolved.origins["data.lazy"] == "run.json:4"
    assert resolved.origins["model.path"] == "run.json"  # `path` stands twice: no line is certain


def test_the_second_file_wins(run: Path) -> None:
    second = write(run.parent, "more.json", '{"data": {"length": 64}, "train": {"seed": 7}}')
    resolved = read([run, second], ["train.seed=9"])
    assert (resolved.config.data.length, resolved.config.data.path) == (64, "rows")
    assert resolved.config.train.seed == 9
    assert resolved.origins["data.length"] == "more.json:1"
    assert resolved.origins["train.seed"] == "override"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.yaml", "", "the file is empty"),
        ("e.yaml", "# nothing\n", "the file is empty"),
        ("e.json", " \n", "the file is empty"),
        ("l.yaml", "- a\n- b\n", "a list, not a mapping"),
        ("l.json", "[1]", "a list, not a mapping"),
        ("t.yaml", "hello", "text, not a mapping"),
        ("b.yaml", "model:\n  path: [a\ndata: 1\n", "broken YAML at line 3, column 5"),
        ("b.yaml", "model:\n\tpath: a\n", "broken YAML at line 2, column 1"),
        ("b.json", '{"model": {"path": "a"},\n "data": }', "broken JSON at line 2, column 10"),
        ("b.json", '{"optim": {"lr": NaN}}', "NaN is not JSON"),
        ("d.yaml", "data:\n  length: 5\n  length: 6\n", "data.length stands twice (lines 2 and 3)"),
        ("d.json", '{"output": "a",\n"output": "b"}', "output stands twice (lines 1 and 2)"),
        ("u.yaml", b"output: a\nmodel: \xff\n", "line 2 is not UTF-8"),
        ("n.yaml", b"output: \x00\n", "broken YAML"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    found = refusal(write(tmp_path, name, text))
    assert message in found and name in found


def test_a_missing_file_names_its_neighbours(run: Path) -> None:
    found = refusal(run.parent / "rum.yaml")
    assert (
        "no such file" in found
        and "holds run.yaml" in found
        and "did you mean 'run.yaml'?" in found
    )


def test_a_folder_is_no_file(run: Path) -> None:
    assert "it is a folder that holds run.yaml" in refusal(run.parent)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    text = json.dumps({"model": {"path": "m"}, "data": {"path": "d"}, "output": "out"})
    for name in ("b.yaml", "b.json"):
        path = write(tmp_path, name, b"\xef\xbb\xbf" + text.encode())
        assert read([path]).config.output == "out"


def test_an_empty_section_is_no_section(run: Path) -> None:
    run.write_text(BASE + "train:\n  # seed: 1\n")
    assert read([run]).config.train.seed == 42


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = "a: &a {path: x}\nmodel: *a\ndata:\n  <<: *a\n  length: 5\noutput: o\n"
    assert "a={path: x} (m.yaml:1)" in refusal(write(tmp_path, "m.yaml", text))
    assert parse_file(tmp_path / "m.yaml").values["data"] == {"path": "x", "length": 5}


# ---- overrides


@pytest.mark.parametrize(
    "words",
    [
        [
            "data.length=64",
            "adapter.method=lora",
            "adapter.targets=[q_proj, v_proj]",
            "data.lazy=true",
        ],
        [
            "--data.length",
            "64",
            "--adapter.method=lora",
            "--adapter.targets",
            "q_proj",
            "v_proj",
            "--data.lazy",
        ],
        [
            "--data.lazy",
            "data.length=64",
            "--adapter.method",
            "lora",
            "adapter.targets=[q_proj,v_proj]",
        ],
    ],
)
def test_forms_of_overrides(run: Path, words: list[str]) -> None:
    config = read([run], [*words, "train.steps=3"]).config
    assert (config.data.length, config.data.lazy, config.train.steps) == (64, True, 3)
    assert config.adapter.targets == ("q_proj", "v_proj")


def test_a_value_may_look_like_a_flag_or_an_override(run: Path) -> None:
    assert read([run], ["--output", "a=b"]).config.output == "a=b"
    assert "optim.lr=-1 " in refusal(run, "--optim.lr", "-1")


def test_names_stay_text(run: Path) -> None:
    config = read([run], ["output=2024", "adapter.path=007", "model.path=null"]).config
    assert (config.output, config.adapter.path, config.model.path) == ("2024", "007", "null")
    assert read([run], ["adapter.path=null"]).config.adapter.path is None


def test_split_overrides() -> None:
    words = ["a=1", "--b-c", "2", "3", "--d", "e=4", "--f"]
    want = [("a", ["1"]), ("b_c", ["2", "3"]), ("d", []), ("e", ["4"]), ("f", [])]
    assert split_overrides(words, {"e"}.__contains__) == want
    with pytest.raises(Refused, match="gives no value"):
        split_overrides(["a=1", "b"], set().__contains__)


def test_batch_and_accumulation_replace_each_other_between_layers(run: Path) -> None:
    run.write_text(BASE + "train: {micro_batch: 2, accumulation: 4}\n")
    assert read([run]).config.batch == 8
    config = read([run], ["train.batch=6"]).config
    assert (config.batch, config.train.accumulation) == (6, None)
    run.write_text(BASE + "train: {micro_batch: 2, batch: 6}\n")
    assert read([run], ["train.accumulation=5"]).config.batch == 10
    assert "give one" in refusal(run, "train.accumulation=5", "train.batch=6")


# ---- errors


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr=1", ["train.lr=1 (override)", "did you mean 'optim.lr'?"]),
        ("lr=1", ["did you mean 'optim.lr'?"]),
        ("optim.learning_rate=1", ["did you mean 'optim.lr'?"]),
        ("lora_rank=4", ["did you mean 'adapter.rank'?"]),
        ("data.lenght=5", ["did you mean 'data.length'?"]),
        ("adaptor.rank=5", ["did you mean 'adapter.rank'?"]),
        ("zzz=5", ["no such key", "docs/reference/config.md"]),
        ("optim=5", ["optim is a section", "weight_decay"]),
        ("train.batch=many", ["train.batch=many", "expected a whole number of at least 1"]),
        ("train.batch=2.5", ["expected a whole number of at least 1"]),
        ("train.batch=true", ["expected a whole number of at least 1"]),
        ("data.lazy=maybe", ["expected true or false"]),
        ("optim.schedule=cosin", ["expected one of linear, cosine,", "did you mean 'cosine'?"]),
        ("optim.betas=[0.9, 2]", ["a list of 2, each a number of at least 0 and below 1"]),
        ("data.columns=5", ["expected a mapping"]),
        ("data.path=[{path: a, weight: -1}]", ["0.weight", "greater than 0"]),
        ("evaluate.every=0", ["at least 1 or one of epoch, end, never"]),
        ("train.micro_batch=3", ["no multiple of train.micro_batch=3"]),
    ],
)
def test_messages(run: Path, override: str, parts: list[str]) -> None:
    found = refusal(run, override)
    assert all(part in found for part in parts), found


def test_all_errors_at_once(run: Path) -> None:
    run.write_text(BASE + "train: {batch: x}\nfoo: {bar: 1}\n")
    found = refusal(run, "data.lenght=3", "optim.lr=-1")
    assert "has 4 errors" in found
    for part in (
        "train.batch=x (run.yaml:8)",
        "foo={bar: 1} (run.yaml:9)",
        "data.lenght",
        "optim.lr=-1",
    ):
        assert part in found


def test_what_is_missing(tmp_path: Path) -> None:
    found = refusal(write(tmp_path, "m.yaml", "model: {dtype: bf16}\n"))
    assert "has 3 errors" in found
    assert all(f"{key} is needed" in found for key in ("model.path", "data.path", "output"))


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_leads_to_the_right_one(key: str) -> None:
    assert key in nearest_key(f"{key}s")


# ---- writing and showing

RICH = {
    "model": {"path": "m: #1", "dtype": "fp32", "autocast": "bf16"},
    "data": {"path": [{"path": "a", "weight": 2}, {"path": "b"}], "columns": {"src": "1e-4"}},
    "adapter": {"method": "lora", "targets": ["q_proj", ".*\\.v_proj"]},
    "optim": {"schedule": "polynomial", "power": 2, "lr_end": 1e-7, "betas": [0.9, 0.95]},
    "train": {"micro_batch": 2, "accumulation": 4, "steps": 5},
    "evaluate": {"every": 3, "generate": True},
    "checkpoint": {"best": "rougel", "resume": "auto"},
    "output": "runs/ü",
}


@pytest.mark.parametrize(
    "values", [RICH, {"model": {"path": "m"}, "data": {"path": "d"}, "output": "1"}]
)
def test_written_configs_read_back_equal(tmp_path: Path, values: dict[str, Any]) -> None:
    config = from_mapping(values).config
    text = to_yaml(config)
    assert read([write(tmp_path, "w.yaml", text)]).config == config
    names = {line.split(":")[0].strip().lstrip("# ") for line in text.splitlines()}
    assert names >= {key.rpartition(".")[2] for key in KEYS}


def test_mappings_of_a_program() -> None:
    resolved = from_mapping({**RICH, "output": Path("runs") / "x"}, ["train.seed=1"])
    assert (resolved.config.output, resolved.config.train.seed) == ("runs/x", 1)
    with pytest.raises(Refused, match="expected text"):
        from_mapping({**RICH, "output": object()})


def test_show_names_every_key_and_origin(run: Path) -> None:
    resolved = read([run], ["adapter.method=lora", "train.micro_batch=4", "train.accumulation=2"])
    text = show(replace(resolved, remarks=["look here"]))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    hidden = {f"adapter.{key}" for key in AdapterConfig.model_fields} - {
        f"adapter.{k}" for k in USUAL
    }
    assert set(rows) >= {key.rpartition(".")[2] for key in KEYS.keys() - hidden} | set(SECTIONS)
    assert rows["..."].split()[1:] == [str(len(hidden)), "more", "default"]
    assert "mora" in show(read([run], ["adapter.method=mora", "adapter.form=type1"]))
    assert "type1" in show(read([run], ["adapter.method=mora", "adapter.form=type1"]))
    assert rows["length"].split()[1:] == ["1024", "run.yaml:5"]
    assert rows["alpha"].endswith("computed: 2 x rank") and "16.0" in rows["alpha"]
    assert rows["batch"].split()[1:3] == ["8", "computed:"]
    assert rows["method"].split()[1:] == ["lora", "override"]
    assert rows["clip"].split()[1:] == ["1.0", "default"]
    assert text.endswith("\n\nnote: look here\n")


def test_the_schema_takes_what_the_reader_takes() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert set(schema["required"]) == {"model", "data", "output"}
    for name, cls in SECTIONS.items():
        described = schema["$defs"][cls.__name__]["properties"]
        assert set(described) == set(cls.model_fields), name
        assert all(entry["description"] for entry in described.values())
        assert schema["$defs"][cls.__name__]["additionalProperties"] is False
    json.dumps(schema)


# ---- examples and the reference


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    config = read([path]).config
    assert path.read_text("utf-8").startswith("# ") and config.output == f"runs/{path.stem}"


def test_there_is_an_example_of_each_method_and_format() -> None:
    configs = [read([path]).config for path in EXAMPLES]
    assert {c.adapter.method for c in configs} == set(get_args(METHODS))
    assert any(c.data.lazy for c in configs) and any(c.predict.input for c in configs)
    assert {"messages", "text"} <= {c.data.format for c in configs}


def test_the_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
