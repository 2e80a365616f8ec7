"""Memory of quantising: neither the model in full precision nor a second dense copy of a layer (Linux for the former)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from luthier.compress import PIECE, Cost
from luthier.models.load import fingerprint, save_model
from luthier.quantize import QuantizedLinear

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MEASURE = """
import sys, threading, time
import luthier

def resident():  # with pages of files that are mapped
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])

small, large, out, scheme = sys.argv[1:]
asked = {"quantize": {"weights": scheme}}
luthier.quantize_model({"model": {"path": small}, "output": out + "-small", **asked})
before = most = resident()
done = threading.Event()

def watch():
    global most
    while not done.is_set():
        most = max(most, resident())
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


@LINUX
def test_no_file_of_a_quantised_base_stays_mapped(tiny_model: Any, tmp_path: Path) -> None:
    """What was read of a mapping is resident for as long as one tensor of the file is kept. And reading otherwise
    than transformers by itself still finds what it finds."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    save_model(tiny_model("llama"), dense)
    told = json.loads((dense / "generation_config.json").read_text("utf-8"))
    (dense / "generation_config.json").write_text(json.dumps(told | {"num_beams": 3}), "utf-8")
    luthier.quantize_model(
        {"model": {"path": str(dense)}, "quantize": {"weights": "nf4"}, "output": str(small)}
    )
    read, _ = luthier.load(dense, quantize="nf4")
    kept, _ = luthier.load(small)
    hashed = fingerprint(dense)
    maps = Path("/proc/self/maps").read_text("utf-8")
    assert hashed and str(tmp_path) not in maps
    whole, _ = luthier.load(dense)
    assert str(dense) in Path("/proc/self/maps").read_text(
        "utf-8"
    )  # a mapping would have been seen
    for model, folder in ((read, dense), (kept, small), (whole, dense)):
        assert model.name_or_path == model.config.name_or_path == str(folder)
        assert model.generation_config.num_beams == 3


@pytest.mark.long
@LINUX
def test_the_model_in_full_precision_never_exists(tiny_model: Any, tmp_path: Path) -> None:
    """Resident memory of the whole command: the codes and a layer's work. Without giving freed memory back, and with
    its file mapped: the model."""
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
