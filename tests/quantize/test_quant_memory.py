"""Memory of quantising: neither the model in full precision nor a second dense copy of a layer (Linux for the first)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.compress import PIECE, Cost
from luthier.models.load import save_model
from luthier.quantize import QuantizedLinear

MEASURE = """
import sys, threading, time
import luthier

def private():  # pages of files that are mapped are the system's to drop
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

small, large, out, scheme = sys.argv[1:]
asked = {"quantize": {"weights": scheme}}
luthier.quantize_model({"model": {"path": small}, "output": out + "-small", **asked})
before = most = private()
done = threading.Event()

def watch():
    global most
    while not done.is_set():
        most = max(most, private())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
luthier.quantize_model({"model": {"path": large}, "output": out, **asked})
done.set()
thread.join()
print("GREW", most - before)
"""


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in held:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_error_of_a_layer_is_measured_in_pieces(scheme: str) -> None:
    weight = torch.randn(2 * PIECE // 512 + 3, 512).bfloat16()
    layer = QuantizedLinear(512, len(weight), scheme)
    layer.load_from(weight)
    cost = Cost()
    with Largest() as largest:
        cost.add(layer, weight)
    assert largest.bytes <= 4 * PIECE
    dense = weight.double()
    off = layer.dequantize(torch.float32).double() - dense
    expected = float(off.norm() / dense.norm())
    assert cost.row(scheme)["error"] == pytest.approx(expected, rel=1e-5)  # float32 within a row


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_model_in_full_precision_never_exists(tiny_model: Any, tmp_path: Path) -> None:
    """Private memory of the whole command: the codes and a layer's work. Without giving freed memory back: the model."""
    save_model(tiny_model("llama"), tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20}
    large = tiny_model("llama", **sizes)
    save_model(large, tmp_path / "large")
    dense = sum(p.numel() * p.element_size() for p in large.parameters())
    words = [str(tmp_path / name) for name in ("small", "large", "out")]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *words, "nf4"], capture_output=True, text=True, check=True
    )
    grew = int(ran.stdout.rpartition("GREW ")[2])
    codes = (tmp_path / "out" / "model.safetensors").stat().st_size  # a seventh of the model
    assert grew < codes + 0.15 * dense, f"{grew / 1e6:.0f} MB for a model of {dense / 1e6:.0f} MB"
