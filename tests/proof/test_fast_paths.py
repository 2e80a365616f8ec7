"""A bfloat16 LoRA run on a CPU takes every fast path, as often as it can; without the kernels it says why not.

What each path computes is compared with its reference beside it: attention (`test_native_attention`, `test_cpu_attention`), norm
and SwiGLU (`test_fast_layers`), cross entropy (`test_native_loss`), the adapter's product (`test_lora_options`),
compiled layers (`test_compiled`). Here: that a run gets there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_config, write_data
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier import native
from luthier.adapters import fused
from luthier.assemble import build, make_updater, open_data, open_text
from luthier.configfile import from_mapping
from luthier.train import loss

LAYERS, LINEARS = 2, 7  # of the tiny llama
NORMS = 2 * LAYERS + 1
built = pytest.mark.skipif(native.library() is None, reason=native.status())


class Counting(TorchDispatchMode):
    """How often each operator ran, those inside of autograd's nodes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Operators, native cross entropies and products with a low-rank update."""
    mode = Counting()

    def count(owner: Any, name: str, as_: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any) -> Any:
            mode.calls[as_] += 1
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    count(loss, "_native", "cross entropy")
    count(fused._LowRankProduct, "apply", "low-rank product")
    with mode:
        yield mode.calls


def one_step(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any
) -> tuple[Counter[str], list[str]]:
    """What one step called, and the remarks of the run."""
    tree = tiny_config(folder, write_data(tmp_path / "data"), tmp_path / "out", **keys)
    config = from_mapping(tree, []).config
    text = open_text(config)
    data = open_data(config, text)
    model = build(config, train=True)
    updater, batches = make_updater(config, model), data.loader.peek()
    assert len(batches) == 1
    with counted(monkeypatch) as calls:
        updater.update(batches, step=1, lr=1e-3)
    data.loader.close()
    return calls, model.remarks


@built
def test_every_fast_path_is_taken(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, remarks = one_step(tmp_path, model_folder("llama"), monkeypatch, model__dtype="bfloat16")
    wanted = {
        "luthier.attention": LAYERS,
        "luthier.attention_backward": LAYERS,
        "luthier.rms_norm": NORMS,
        "luthier.rms_norm_backward": NORMS - 1,  # nothing is trained before the first
        "luthier.swiglu": 2 * LAYERS,  # once more in the backward
        "luthier.swiglu_backward": LAYERS,
        "low-rank product": LAYERS * LINEARS,
        "cross entropy": 1,  # one chunk
        "aten._fused_adamw_": 1,  # one group
    }
    assert {name: calls[name] for name in wanted} == wanted
    # what the fast paths are there to replace
    for slow in ("aten.silu", "aten.rsqrt", "aten._log_softmax"):
        assert not calls[slow], slow
    assert not remarks


@built
def test_codes_of_a_quantised_base_are_read_by_the_kernel(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"model__dtype": "bfloat16", "quantize__weights": "nf4"}
    calls, _ = one_step(tmp_path, model_folder("llama"), monkeypatch, **keys)
    # forward, and backward to the inputs of all but what the first layer's q, k and v get from the embedding
    assert calls["luthier.dequantize"] >= LAYERS * LINEARS + (LAYERS - 1) * LINEARS
    assert not calls["aten.index_select"]
    monkeypatch.setenv(native.SWITCH, "0")
    calls, _ = one_step(tmp_path, model_folder("llama"), monkeypatch, **keys)
    assert not calls["luthier.dequantize"] and calls["aten.index_select"]


def test_without_the_kernels_torch_computes_and_the_run_says_why(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    calls, remarks = one_step(tmp_path, model_folder("llama"), monkeypatch, model__dtype="bfloat16")
    assert not calls["cross entropy"] and not calls["luthier.rms_norm"] + calls["luthier.swiglu"]
    # the backward of products in torch, in the same operator
    assert calls["luthier.attention_backward"] == LAYERS and calls["aten.silu"] == LAYERS
    assert calls["low-rank product"] == LAYERS * LINEARS and calls["aten._fused_adamw_"] == 1
    said = "attention is computed by torch, the native kernels are off: LUTHIER_NATIVE=0"
    assert said in remarks


@built
def test_full_fine_tuning_takes_the_kernels_too(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"model__dtype": "bfloat16", "adapter__method": "none", "adapter__rank": None}
    calls, remarks = one_step(tmp_path, model_folder("llama"), monkeypatch, **keys)
    assert calls["luthier.attention_backward"] == LAYERS
    assert calls["luthier.rms_norm_backward"] == NORMS
    assert calls["luthier.swiglu_backward"] == LAYERS
    assert calls["cross entropy"] == 1 and calls["aten._fused_adamw_"] >= 1
    assert not remarks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 17, 5, 3), (14, 33, 65, 5), (131, 47, 91, 9)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_with_a_low_rank_update_over_odd_shapes(
    sizes: tuple[int, ...], dtype: torch.dtype, biased: bool, relative: Any
) -> None:
    """Against three products apart in float64: the result and the gradients of x, A and B."""
    rows, width, out, rank = sizes
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (width, out), (rank, width), (out, rank), (rows, out), (out,))
    x, matrix, down, up, grad, bias = (
        torch.randn(shape, generator=draw).to(dtype) for shape in shapes
    )

    def run(function: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
        leaves = [value.detach().clone().requires_grad_() for value in values]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    added = bias if biased else None
    found = run(
        lambda a, d, u: fused._LowRankProduct.apply(a, None, matrix, added, d, u, None, None),
        *(x, down, up),
    )
    exact, offset = matrix.double(), bias.double() if biased else 0
    wanted = run(
        lambda a, d, u: a @ exact + (a @ d.t()) @ u.t() + offset,
        *(value.double() for value in (x, down, up)),
    )
    # in bfloat16 x A and its gradient are rounded once on the way, what comes out once more: 2^-9 each
    bound = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and relative(ours, theirs) < bound
