"""MoRA: its forms against their definitions, written out entry by entry; files; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import error, fill, run
from torch import Tensor, nn

from luthier.adapters import (
    adapter_parameters,
    adapters_of,
    attach,
    initialise,
    load_adapter,
    plan_of,
    save_adapter,
)
from luthier.adapters.facts import CONFIG, FACTS
from luthier.adapters.mora import square
from luthier.adapters.placing import build, install
from luthier.config import AdapterConfig
from luthier.errors import Refused

FORMS = ("type1", "type2", "type3", "type4", "type6", "paddlenlp")
# wide and narrow outputs, chunks that end with the input and that do not, a matrix wider than the input
SHAPES = [(24, 40, 2), (40, 24, 2), (32, 32, 4), (7, 50, 1), (8, 30, 6), (50, 7, 3)]


def mora(form: str, num_in: int, num_out: int, rank: int, dtype: Any = torch.float64) -> Any:
    model = nn.ModuleDict({"layer": nn.Linear(num_in, num_out).to(dtype)})
    config = AdapterConfig.model_validate({"method": "mora", "form": form, "rank": rank})
    attach(model, config, seed=1)
    fill(model, size=1.0)
    return model["layer"]


def expected(form: str, x: Tensor, matrix: Tensor, num_out: int) -> Tensor:
    """The definition for one x [in], entry by entry."""
    num_in, size = len(x), len(matrix)
    if form in ("type6", "paddlenlp"):
        matrix = matrix.t() if form == "paddlenlp" else matrix
        out = []
        for chunk in range(math.ceil(num_in / size)):
            part = torch.stack([x[(chunk * size + i) % num_in] for i in range(size)])
            turned = part.clone()
            half = size // 2
            for i in range(half):
                angle = chunk * 10000.0 ** (-2 * i / size)
                cos, sin = math.cos(angle), math.sin(angle)
                turned[i] = cos * part[i] - sin * part[half + i]
                turned[half + i] = cos * part[half + i] + sin * part[i]
            out += list(matrix @ turned)
        return torch.stack([out[i % len(out)] for i in range(num_out)])
    small = torch.zeros(size, dtype=x.dtype)
    for i in range(math.ceil(num_in / size) * size):
        if form in ("type1", "type4"):
            small[i % size] += x[i % num_in]
        elif i < num_in:
            small[group(i, num_in, size)] += x[i]
    small = matrix @ small
    if form in ("type1", "type3"):
        return torch.stack([small[i % size] for i in range(num_out)])
    return torch.stack([small[group(i, num_out, size)] for i in range(num_out)])


def group(i: int, width: int, groups: int) -> int:
    """Number of the contiguous group that i lies in; the first ones are one longer."""
    length, longer = divmod(width, groups)
    border = longer * (length + 1)
    return i // (length + 1) if i < border else longer + (i - border) // length


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_are_as_defined(form: str, shape: tuple[int, int, int]) -> None:
    num_in, num_out, rank = shape
    grouped = {"type2": min(num_in, num_out), "type3": num_in, "type4": num_out}
    if square(num_in, num_out, rank, form) > grouped.get(form, 99):
        with pytest.raises(Refused, match="cannot be put into"):
            mora(form, num_in, num_out, rank)
        return
    layer = mora(form, num_in, num_out, rank)
    # few tokens and many go two ways; both have gradients
    for tokens in (1, 40):
        x = torch.randn(tokens, num_in, dtype=torch.float64)
        wanted = torch.stack(
            [expected(form, row, layer.adapter.mora_M.detach(), num_out) for row in x]
        )
        torch.testing.assert_close(layer.adapter.delta(x).detach(), wanted, rtol=1e-12, atol=1e-12)
    inputs = (
        torch.randn(2, 3, num_in, dtype=torch.float64, requires_grad=True),
        layer.adapter.mora_M,
    )
    assert torch.autograd.gradcheck(lambda x, _: layer(x), inputs)


def test_both_orders_of_rotation_agree_in_gradients() -> None:
    layer = mora("type6", 24, 40, 2)  # M is 10 wide: 9 tokens rotate themselves, 10 rotate M
    x = torch.randn(20, 24, dtype=torch.float64)
    gradients = []
    for parts in ((x,), x.split(5)):
        layer.adapter.mora_M.grad = None
        for part in parts:
            layer.adapter.delta(part).square().sum().backward()
        gradients.append(layer.adapter.mora_M.grad)
    assert error(*gradients) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near_float32(form: str) -> None:
    layer = mora(form, 48, 96, 4, torch.float32)
    x = torch.randn(64, 48)
    # x, M, up to two intermediate results and the output are rounded, by 2^-9 of each, sums of chunks included
    assert error(layer.adapter.delta(x.bfloat16()), layer.adapter.delta(x)) < 5 * 2**-9


def test_an_adapter_made_without_values_gets_its_tables() -> None:
    config = AdapterConfig.model_validate({"method": "mora", "rank": 2})
    x, deltas = torch.randn(3, 24), []
    for device in ("cpu", "meta"):
        model = nn.ModuleDict({"layer": nn.Linear(24, 40, device=device)})
        install(model, build(model, plan_of(model, config), seed=1))
        if device == "meta":
            model.to_empty(device="cpu")
            for buffer in model.buffers():
                buffer.fill_(7.0)
        initialise(model, seed=1)
        fill(model)
        adapter: Any = adapters_of(model)["layer"]
        deltas.append(adapter.delta(x))
    assert torch.equal(*deltas)


def test_paddlenlp_stores_the_transpose(tiny_model: Any, random_batch: Any) -> None:
    batch, outputs = random_batch(), []
    for form in ("type6", "paddlenlp"):
        model = tiny_model("llama")
        config = AdapterConfig.model_validate({"method": "mora", "form": form})
        attach(model, config, seed=1)
        for parameter in adapter_parameters(model).values():
            draw = torch.Generator().manual_seed(3)
            noise = 0.1 * torch.randn(parameter.shape, generator=draw)
            with torch.no_grad():
                parameter.copy_(noise.t() if form == "paddlenlp" else noise)
        outputs.append(run(model, batch))
    assert error(*outputs) < 1e-6


def test_the_folder_says_all_without_our_facts(
    tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    model, batch = tiny_model("qwen2"), random_batch()
    options = {"method": "mora", "form": "type3", "rank": 2, "dropout": 0.25}
    config = AdapterConfig.model_validate({**options, "rank_pattern": {"q_proj": 3}})
    attach(model, config, seed=1)
    fill(model)
    save_adapter(model, tmp_path, config, "base", None)
    assert json.loads((tmp_path / CONFIG).read_text("utf-8"))["peft_type"] == "LUTHIER_MORA"
    (tmp_path / FACTS).unlink()
    again = tiny_model("qwen2")
    loaded = load_adapter(again, tmp_path, trainable=True).config
    assert (loaded.form, loaded.rank, loaded.dropout) == ("type3", 2, 0.25)
    assert torch.equal(run(again, batch), run(model, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 4}, "adapter.alpha"),
        ({"rank": 33}, "rank 32 at most"),
        ({"form": "type3", "rank": 32}, "64 features cannot be put into"),
    ],
)
def test_refused(tiny_model: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    config = AdapterConfig.model_validate({"method": "mora", **options})
    with pytest.raises(Refused, match=message):
        attach(model, config, seed=1)


def test_a_folder_of_an_unknown_form_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = AdapterConfig.model_validate({"method": "mora"})
    attach(model, config, seed=1)
    save_adapter(model, tmp_path, config, "base", None)
    path = tmp_path / CONFIG
    fields = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**fields, "form": "type9"}), "utf-8")
    with pytest.raises(Refused, match="form=type9"):
        load_adapter(tiny_model("llama"), tmp_path)
