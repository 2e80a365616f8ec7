"""Which layers are chosen, and what is refused before a model is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_table import options, run
from torch import Tensor, nn

from luthier.adapters import (
    ADAPTERS,
    Adapter,
    adapters_of,
    attach,
    detach,
    fold_into,
    select_targets,
)
from luthier.adapters.targets import shortest_targets
from luthier.config import AdapterConfig
from luthier.errors import Failed, Refused

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def names(model: Any, targets: Any) -> list[str]:
    return select_targets(model, targets)


def test_all_linear_is_all_but_the_head(tiny_model: Any) -> None:
    expected = [
        f"model.layers.{i}.{part}.{name}"
        for i in range(2)
        for part, group in (("self_attn", ATTENTION), ("mlp", MLP))
        for name in group
    ]
    for family in ("llama", "qwen2"):  # head untied and tied
        assert names(tiny_model(family), "all-linear") == expected
    gpt2 = names(tiny_model("gpt2"), "all-linear")
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert gpt2 == [f"transformer.h.{i}.{part}" for i in range(2) for part in parts]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        ("mlp.up_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        (".*self_attn.*", 8),
        (r".*layers\.1\..*_proj", 7),
        (("q_proj", "v_proj"), 4),
        (("q_proj", ".*(q|k)_proj"), 4),
        ("lm_head", 1),
        (("all-linear", "lm_head"), 15),
    ],
)
def test_names_and_patterns(tiny_model: Any, targets: Any, count: int) -> None:
    assert len(names(tiny_model("llama"), targets)) == count


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("q_prj", ("'q_prj' matches no layer".replace("'q_prj' ", ""), "did you mean 'q_proj'?")),
        (("q_proj", "c_attn"), ("'c_attn'", "o_proj, gate_proj, up_proj")),
        ("proj", ("matches no layer",)),  # names are compared at a dot
        ("embed_tokens", ("'model.embed_tokens' (Embedding)",)),
        ("q_proj(", ("no regular expression",)),
    ],
)
def test_targets_that_match_nothing(tiny_model: Any, targets: Any, words: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused) as caught:
        attach(model, options("lora", targets=targets), seed=1)
    assert all(word in str(caught.value) for word in words), caught.value
    assert all(p.requires_grad for p in model.parameters()) and not adapters_of(model)


def test_shortest_targets(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    every = names(model, "all-linear")
    assert shortest_targets(model, every) == ["c_attn", "c_fc", "c_proj"]
    some = names(model, "mlp.c_proj")  # attn.c_proj ends in the same way
    assert shortest_targets(model, some) == some


def test_rank_above_the_matrix(tiny_model: Any) -> None:
    model = tiny_model("llama")  # k_proj is 64 -> 32
    with pytest.raises(Refused, match=r"'model.layers.0.self_attn.k_proj' is 64 -> 32.*32 or less"):
        attach(model, options("lora", rank=33), seed=1)
    attach(model, options("lora", rank=33, targets="q_proj"), seed=1)


def test_a_second_adapter(tiny_model: Any) -> None:
    model = tiny_model("llama")
    attach(model, options("lora"), seed=1)
    with pytest.raises(Refused, match="carries one already"):
        attach(model, options("lora"), seed=1)


def test_dropout_on_the_head(tiny_model: Any) -> None:
    with pytest.raises(Refused, match="output layer 'lm_head'"):
        attach(tiny_model("llama"), options("lora", targets="lm_head", dropout=0.1), seed=1)


def test_dropout_where_tokens_are_regrouped(tiny_model: Any, random_batch: Any) -> None:
    model, batch = tiny_model("llama"), random_batch()
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[:5],))
    attach(model, options("lora", targets="down_proj", dropout=0.1), seed=1)
    with pytest.raises(Failed, match=r"layers.0.mlp.down_proj.*5 of 16"):
        run(model.train(), batch)


def test_folding_into_a_shared_weight(tiny_model: Any, random_batch: Any) -> None:
    model, batch = tiny_model("qwen2"), random_batch()
    attach(model, options("lora", targets=("q_proj", "lm_head")), seed=1)
    before = run(model, batch)
    with pytest.raises(Refused, match=r"model.embed_tokens.weight and lm_head.weight"):
        fold_into(model)
    assert torch.equal(run(model, batch), before) and len(adapters_of(model)) == 3


class Shift(Adapter):
    """A method from outside: adds a vector to what enters and leaves a layer."""

    uses = frozenset({"targets"})

    def __init__(self, layer: nn.Module, config: AdapterConfig, *, name: str, seed: int) -> None:
        super().__init__(layer, config, name=name, seed=seed)
        self.shift = self.new_parameter(layer, 8)

    def before(self, x: Tensor) -> Tensor:
        return x + self.shift

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 2 * x


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS._items, "shift", Shift)


def test_a_method_from_outside(shift: None) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    layer, x = model["layer"], torch.randn(2, 8)
    plain = nn.Linear(8, 8)
    plain.load_state_dict(layer.state_dict())
    config = AdapterConfig.model_construct({"method"}, method="shift")
    (adapter,) = attach(model, config, seed=1).values()
    assert isinstance(adapter, Shift) and not adapter.shift.any()
    with torch.no_grad():
        adapter.shift.fill_(0.5)
        assert torch.equal(layer(x), plain(x + 0.5) + 2 * (x + 0.5))
        with pytest.raises(Refused, match="no change of a weight"):
            fold_into(model)
        assert adapters_of(model)
        detach(model)
        assert torch.equal(layer(x), plain(x))


def test_options_of_another_method(shift: None) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    config = AdapterConfig.model_construct({"method", "rank"}, method="shift", rank=4)
    with pytest.raises(Refused, match=r"adapter.rank=4.*shift has no such option.*targets"):
        attach(model, config, seed=1)


def test_a_layer_with_a_tuple_and_a_subclass_of_linear(shift: None) -> None:
    """What has a forward of its own keeps it: hooks act around it."""

    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input), "more"

    class Double(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(2, 8)
    pair, config = Pair(8, 8), AdapterConfig.model_construct({"method"}, method="shift")
    y = pair(x)[0]
    attach(nn.ModuleDict({"layer": pair}), config, seed=1)
    assert torch.equal(pair(x)[0], y + 2 * x) and pair(x)[1] == "more"

    double = Double(8, 8)
    y = double(x)
    (adapter,) = attach(nn.ModuleDict({"layer": double}), options("lora"), seed=1).values()
    nn.init.ones_(adapter.lora_B)
    assert torch.equal(double(x), y + adapter.delta(x))


def test_autocast_computes_in_half_precision() -> None:
    """O1 of the suites: float32 weights, products in bfloat16; the update is added before rounding."""
    layer = nn.Linear(16, 24, bias=True)
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(2, 5, 16)
    (adapter,) = attach(model, options("lora"), seed=1).values()
    nn.init.normal_(adapter.lora_B)
    wide = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - wide).norm() < 2**-7 * wide.norm()
    y.float().sum().backward()
    assert adapter.lora_A.grad.dtype == torch.float32
