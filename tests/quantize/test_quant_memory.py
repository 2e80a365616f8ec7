"""Memory of quantising a model into a folder: never the model in full precision (a process of its own, Linux only)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.models.load import save_model

MEASURE = """
import json, sys, threading, time
import luthier

def anonymous():  # pages of files that are mapped are the system's to drop
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

small, large, out, scheme = sys.argv[1:]
asked = {"quantize": {"weights": scheme}}
luthier.quantize_model({"model": {"path": small}, "output": out + "-small", **asked})
before = most = anonymous()
done = threading.Event()

def watch():
    global most
    while not done.is_set():
        most = max(most, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
luthier.quantize_model({"model": {"path": large}, "output": out, **asked})
done.set()
thread.join()
print("GREW", most - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_the_model_in_full_precision_never_exists(
    scheme: str, tiny_model: Any, tmp_path: Path
) -> None:
    """The codes, packed again for the folder, read back to compare, and a layer's work: well below the model."""
    save_model(tiny_model("llama"), tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    large = tiny_model("llama", **sizes)
    save_model(large, tmp_path / "large")
    words = [str(tmp_path / name) for name in ("small", "large", "out")]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *words, scheme], capture_output=True, text=True, check=True
    )
    grew = int(ran.stdout.rpartition("GREW ")[2])
    dense = sum(p.numel() * p.element_size() for p in large.parameters())
    codes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert codes < 0.2 * dense
    print(grew, dense, codes)
    assert grew < 0.6 * dense, f"{grew / 1e6:.0f} MB for a model of {dense / 1e6:.0f} MB"
