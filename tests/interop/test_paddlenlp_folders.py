"""Adapter folders that PaddleNLP 3.0.0b4 wrote (scripts/golden/paddlenlp_adapters.py): converted, they give
the logits of PaddleNLP's live model, through `load` and, where that can be, through `merge`."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import luthier
from luthier.cli import main
from luthier.errors import Refused
from luthier.exchange import convert, merge
from luthier.interop.pickles import read_arrays

FOLDER = Path(__file__).parents[1] / "golden" / "data" / "paddlenlp_adapters"
BASE = str(FOLDER / "base")
FOLDS = ("lora", "rslora", "pissa", "mora", "mixer", "vera", "lokr")
# logits are about 4; two implementations in float32 through two layers
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=expected("input_ids")).logits


def expected(name: str) -> Tensor:
    return load_file(FOLDER / "expected.safetensors")[name]


@pytest.mark.parametrize("name", [*FOLDS, "prefix", "loreft", "tinyreft"])
def test_converted(tmp_path: Path, name: str) -> None:
    convert(str(FOLDER / name), str(tmp_path / "a"), base=BASE, say=print)
    model, _ = luthier.load(BASE, adapter=tmp_path / "a", dtype="float32")
    torch.testing.assert_close(logits(model), expected(name), **TOLERANCE)
    assert not torch.allclose(expected("base"), expected(name), **TOLERANCE)


@pytest.mark.parametrize("name", FOLDS)
def test_merged(tmp_path: Path, name: str) -> None:
    option = {"vera": "vera_path", "lokr": "lokr_path"}.get(name, "lora_path")
    words = ["merge", "--model_name_or_path", BASE, f"--{option}", str(FOLDER / name)]
    assert main([*words, "--output_path", str(tmp_path / "m")]) == 0
    model, _ = luthier.load(tmp_path / "m", dtype="float32")
    torch.testing.assert_close(logits(model), expected(name), **TOLERANCE)


@pytest.mark.parametrize("name", ["prefix", "loreft"])
def test_what_is_no_change_of_weights_is_not_merged(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match=r"no change of a weight.*use the base together"):
        merge(BASE, str(FOLDER / name), str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_the_base_is_needed_where_it_was_split(tmp_path: Path) -> None:
    for name in ("pissa", "vera"):
        shutil.copytree(FOLDER / name, tmp_path / name)
        file = next((tmp_path / name).glob("*a_config.json"))
        fields = json.loads(file.read_text()) | {"base_model_name_or_path": None}
        file.write_text(json.dumps(fields))
        with pytest.raises(Refused, match=r"singular vectors.*--base BASE"):
            convert(str(tmp_path / name), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"gpt.decoder.layers.0.linear1.lora_A": 1}, "cuts this family's layers otherwise"),
        ({"llama.layers.0.self_attn.qkv_proj.lora_A": 1}, "not fused"),
        ({"llama.layers.0.self_attn.q_proj.bias": 1}, "belongs to no adapter"),
        ({"llama.layers.0.mlp.up_proj.lora_A": 1}, "up_proj has lora_A and no lora_B"),
        ({"llama.layers.0.mlp.up_proj.lora_A": "words"}, "a str where an array was expected"),
    ],
)
def test_tensors_that_have_no_equal(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "lora")
    arrays = {n: np.zeros((2, 2)) if v == 1 else v for n, v in change.items()}
    (folder / "lora_model_state.pdparams").write_bytes(pickle.dumps(arrays))
    with pytest.raises(Refused, match=found):
        convert(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_parts_of_ranks_and_missing_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "lora")
    file = folder / "lora_model_state.pdparams"
    file.rename(folder / "lora_model_state.tp00.pdparams")
    with pytest.raises(Refused, match="one tensor- or pipeline-parallel rank"):
        convert(str(folder), str(tmp_path / "out"))
    (folder / "lora_model_state.tp00.pdparams").unlink()
    with pytest.raises(Refused, match=r"holds no weights.*lora_config.json"):
        convert(str(folder), str(tmp_path / "out"))


def test_a_base_for_what_needs_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="only the conversion of a PaddleNLP adapter reads a base"):
        convert(BASE, str(tmp_path / "out"), base=BASE)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_pickles_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pdparams"
    for value in ({"x": Evil()}, Evil(), {"x": np.array([Evil()], dtype=object)}):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(Refused, match="only arrays are read"):
            read_arrays(path)
    for content in (b"", b"text", pickle.dumps([1]), pickle.dumps({"x": 1})):
        path.write_bytes(content)
        with pytest.raises(Refused, match="no file of named arrays"):
            read_arrays(path)
    assert "this ran" not in capsys.readouterr().out


def test_pickled_arrays(tmp_path: Path) -> None:
    half = torch.tensor([1.5, -2.0]).bfloat16()
    path = tmp_path / "a.pdparams"
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": half.view(torch.int16).numpy().view(np.uint16),
        "c": ("linear_0.w_0", np.ones(2, dtype=np.float16)),
        "StructuredToParameterName@@": {"a": "linear_0.w_0"},
    }
    path.write_bytes(pickle.dumps(arrays))
    found = read_arrays(path)
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["a"], torch.arange(6.0, dtype=torch.float64).view(2, 3).t())
    assert torch.equal(found["b"], half) and found["c"].dtype == torch.float16
