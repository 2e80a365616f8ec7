"""Layouts of quantised folders against folders that bitsandbytes and compressed-tensors wrote (`folders/`).

`scripts/golden/quantized_folders.py` made them; the libraries are not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import Refused
from luthier.quantize import dequantize, layouts, make_spec, quantize
from luthier.quantize.stored import Stored
from luthier.seeding import generator

FOLDERS = sorted(p for p in (Path(__file__).parent / "folders").iterdir() if p.is_dir())
NAMES = [folder.name for folder in FOLDERS]
# scheme, block size, double quantisation
FORMS = [
    ("nf4", 64, False),
    ("nf4", 32, True),
    ("fp4", 64, False),
    ("fp4", 64, True),
    ("int8", None, False),
    ("int8", 32, False),
    ("int4", None, False),
    ("int4", 32, False),
]
# [out, in]: whole blocks in rows; blocks over the ends of rows; odd rows and a short last block
SHAPES = [(96, 256), (50, 160), (7, 33), (5, 30)]
STACK = (3, 8, 64)
LAYOUTS = {"bnb": "bitsandbytes", "ct": "compressed-tensors"}


class Folder:
    """A folder's config, headers and tensors; tests change them."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text("utf-8"))
        self.fields: dict[str, Any] = config["quantization_config"]
        with safe_open(path / "model.safetensors", "pt") as file:
            parts = {name: file.get_slice(name) for name in self.tensors}
        self.headers: dict[str, dict[str, Any]] = {
            name: {"dtype": part.get_dtype(), "shape": part.get_shape()}
            for name, part in parts.items()
        }

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def plan(self) -> dict[str, Stored]:
        return layouts.plan("folder", self.fields, self.headers, self.read)

    def take(self, stored: Stored) -> dict[str, Tensor]:
        return layouts.take("folder", self.fields, stored, self.read)


def folder_of(tmp_path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Folder:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fields}))
    return Folder(tmp_path)


def golden(name: str) -> Folder:
    return Folder(Path(__file__).parent / "folders" / name)


@pytest.mark.parametrize("path", FOLDERS, ids=NAMES)
def test_their_folders_decode_to_their_weights(path: Path, relative: Any) -> None:
    folder, expected = Folder(path), load_file(path / "expected.safetensors")
    expected.pop("logits")
    plan = folder.plan()
    assert plan.keys() == expected.keys()
    for name, stored in plan.items():
        weight = dequantize(folder.take(stored), stored.spec, expected[name].dtype)
        # level x scale: in float32 another order of factors, in bfloat16 one rounding of the product
        if weight.dtype == torch.bfloat16:
            assert torch.equal(weight, expected[name])
        else:
            assert relative(weight, expected[name]) < 2e-7


@pytest.mark.parametrize("path", FOLDERS, ids=NAMES)
def test_what_is_read_is_written_as_it_was(path: Path) -> None:
    folder = Folder(path)
    if folder.fields.get("format") == "int-quantized":
        pytest.skip("written as pack-quantized")
    for name, stored in folder.plan().items():
        made = layouts.write(
            folder.fields["quant_method"],
            name,
            folder.take(stored),
            stored.spec,
            stored.dtype or torch.float32,
        )
        for part, values in made.items():
            theirs = folder.tensors[part]
            if "quant_state" in part:  # JSON text
                ours = json.loads(bytes(values.tolist()))
                assert ours == json.loads(bytes(theirs.tolist()))
            elif part.endswith("_scale"):
                # exact for the 16 bits of usual scales, else to float32's last place
                off = (values - theirs.float()).abs() / theirs.float()
                assert float(off.max()) < (2**-23 if theirs.dtype == torch.float32 else 1e-12)
            elif theirs.dtype != values.dtype and values.dtype == torch.uint8:
                assert torch.equal(values.flatten(), theirs.view(torch.uint8).flatten())
            else:
                assert torch.equal(values, theirs), part
        mine = {n for n in folder.tensors if n.startswith(name.removesuffix("weight"))}
        assert mine - {name.removesuffix("weight") + "bias"} == made.keys()


@pytest.mark.parametrize("shape", [*SHAPES, STACK], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_written_is_read_as_it_was(form: Any, shape: Any, tmp_path: Path) -> None:
    if form[0].startswith("int") and form[1] and shape[-1] % form[1]:
        pytest.skip("the block size does not divide")
    spec = make_spec(form[0], shape, form[1], form[2])
    weight = torch.randn(shape, generator=generator(0, "w"))
    tensors, name = quantize(weight, spec), "model.layers.0.mlp.up_proj.weight"
    method = layouts.choose({name: spec})
    made = layouts.write(method, name, tensors, spec, torch.bfloat16)
    fields = layouts.config(method, {name: spec}, [], torch.bfloat16)
    folder = folder_of(tmp_path, made | {"norm.weight": torch.ones(3)}, fields)
    plan = folder.plan()
    assert plan.keys() == {name}
    assert plan[name].spec == spec
    found = folder.take(plan[name])
    for part, values in tensors.items():
        assert found[part].dtype == values.dtype
        assert found[part].shape == values.shape
        if part != "absmax" or method == "bitsandbytes":
            assert torch.equal(found[part], values)
    # compressed-tensors' scale is rounded; two neighbours of absmax may give one scale
    ours, theirs = (dequantize(t, spec, torch.float32) for t in (tensors, found))
    assert torch.equal(ours, theirs)


def test_scales_of_16_bits_are_exact_and_wider_ones_to_one_unit() -> None:
    from luthier.quantize.compressed import _absmax

    draw = torch.rand(20000, generator=generator(0, "scale"))
    for largest in (7, 127):
        for dtype in (torch.bfloat16, torch.float16):
            scale = draw.to(dtype).float()
            assert torch.equal(_absmax(scale, largest) / largest, scale)
        off = (_absmax(draw, largest) / largest - draw).abs() / draw
        assert float(off.max()) < 2**-23


def spoil(folder: Folder, name: str, what: str) -> None:
    """Drop a tensor, or change its header's shape or type."""
    full = f"model.layers.0.self_attn.q_proj.{name}"
    if what == "drop":
        del folder.headers[full]
    elif what == "shape":
        folder.headers[full]["shape"] = [3, *folder.headers[full]["shape"]]
    else:
        folder.headers[full]["dtype"] = "BOOL"


PARTS = {
    "bnb-nf4-double": [
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ],
    "bnb-int8": ["weight", "SCB"],
    "ct-int4-group": ["weight_packed", "weight_scale", "weight_shape"],
    "ct-int8-plain": ["weight", "weight_scale"],
}


@pytest.mark.parametrize("what", ["drop", "shape", "type"])
@pytest.mark.parametrize(("name", "part"), [(n, p) for n, ps in PARTS.items() for p in ps])
def test_faults_are_refused_by_name(name: str, part: str, what: str) -> None:
    if what != "drop" and "quant_state" in part:
        pytest.skip("a text")
    folder = golden(name)
    spoil(folder, part, what)
    with pytest.raises(Refused, match=r"self_attn\.q_proj") as refusal:
        folder.plan()
    if what == "drop":
        assert f"q_proj.{part}: it is missing" in str(refusal.value)


def other_map(folder: Folder) -> None:
    folder.tensors["model.layers.0.mlp.up_proj.weight.quant_map"][3] += 0.01


def broken_text(folder: Folder) -> None:
    folder.tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"][0] = 0


def other_block(folder: Folder) -> None:
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    text = bytes(folder.tensors[key].tolist()).replace(b'"blocksize": 64', b'"blocksize": 16')
    folder.tensors[key] = torch.tensor(list(text), dtype=torch.uint8)


def tiles(folder: Folder) -> None:
    folder.tensors["model.layers.0.mlp.up_proj.weight_format"].fill_(2)


def zero_points(folder: Folder) -> None:
    folder.headers["model.layers.0.mlp.up_proj.weight_zero_point"] = {"dtype": "I32", "shape": [1]}


def field(key: str, value: Any) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        where: Any = folder.fields
        *path, last = key.split(".")
        for step in path:
            where = where[step]
        where[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("bnb-nf4", other_map, "not the code book"),
        ("bnb-nf4", broken_text, "no JSON"),
        ("bnb-nf4", other_block, "describes no known form"),
        ("bnb-int8", tiles, "tiles"),
        ("bnb-int8", field("quant_method", "gptq"), r"method that is not read here \(gptq\)"),
        ("bnb-int8", field("quant_method", "awq"), r"\(awq\)"),
        ("ct-int4-group", zero_points, "zero points"),
        (
            "ct-int4-group",
            field("config_groups.group_0.weights.symmetric", False),
            "symmetric=False",
        ),
        ("ct-int4-group", field("config_groups.group_0.weights.type", "float"), "type=float"),
        ("ct-int4-group", field("config_groups.group_0.weights.num_bits", 3), "num_bits=3"),
        ("ct-int4-group", field("config_groups.group_0.weights.num_bits", 8), "in 8 bits"),
        ("ct-int4-group", field("config_groups.group_0.format", "marlin-24"), "marlin-24"),
        (
            "ct-int8-plain",
            field("config_groups.group_0.input_activations", {"num_bits": 8}),
            "activations",
        ),
        ("ct-int8-plain", field("config_groups", {}), "no config_groups"),
        ("ct-int8-plain", field("sparsity_config", {"format": "sparse-24"}), "sparsity_config"),
    ],
)
def test_foreign_forms_are_refused(name: str, change: Any, says: str) -> None:
    folder = golden(name)
    change(folder)
    with pytest.raises(Refused, match=says):
        folder.plan()


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "ct-int8-plain"])
def test_a_config_without_quantised_weights_is_refused(name: str) -> None:
    folder = golden(name)
    folder.headers = {"model.norm.weight": {"dtype": "F32", "shape": [32]}}
    with pytest.raises(Refused, match=r"quantize\.weights"):
        folder.plan()


@pytest.mark.parametrize(
    ("name", "part"),
    [("bnb-nf4", "weight.absmax"), ("bnb-int8", "SCB"), ("ct-int4-group", "weight_scale")],
)
def test_scales_that_are_not_finite_are_refused(name: str, part: str) -> None:
    folder = golden(name)
    folder.tensors[f"model.layers.0.mlp.up_proj.{part}"].view(-1)[1] = float("nan")
    plan = folder.plan()
    with pytest.raises(Refused, match=f"up_proj.{part}.*NaN"):
        folder.take(plan["model.layers.0.mlp.up_proj.weight"])


def test_the_layout_is_chosen_by_what_it_can_hold() -> None:
    spec = {
        "nf4": make_spec("nf4", (4, 64)),
        "fp4": make_spec("fp4", (4, 64)),
        "int8": make_spec("int8", (4, 64)),
        "grouped": make_spec("int8", (4, 64), 32),
        "int4": make_spec("int4", (4, 64)),
    }

    def chosen(*names: str) -> str:
        return layouts.choose({name: spec[name] for name in names})

    assert chosen("nf4", "fp4") == chosen("int8") == "bitsandbytes"
    assert chosen("int4") == chosen("grouped") == chosen("int8", "int4") == "compressed-tensors"
    with pytest.raises(Refused, match="int8, nf4"):
        chosen("nf4", "int8")
