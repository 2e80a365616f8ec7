"""Kernels in C++ for bfloat16 on a CPU: found or built, loaded, and told apart from their absence.

The sources beside this file see no torch and no Python: plain functions over pointers, so that they are
built in seconds by any g++ and serve every version of torch. They are built at set-up or at first use into
the user's cache folder, for the instructions of the machine, and loaded from there. Whoever uses a kernel
has a path in torch beside it, which is the reference and the fallback: `library()` is None where there are no
kernels and `status()` says why. LUTHIER_NATIVE=0 switches them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SWITCH = "LUTHIER_NATIVE"
SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


class Found(NamedTuple):
    library: ctypes.CDLL | None
    status: str  # `avx512_bf16, in /home/me/.cache/...`, or why there is none


def library() -> ctypes.CDLL | None:
    """The kernels, built if need be (a line on stderr says so); None where there are none."""
    return find().library


def status() -> str:
    """The instructions that the kernels use and the file they are in, or why there are none."""
    return find().status


def find() -> Found:
    """The kernels and what to say of them. The switch acts at any time; the rest is looked up once."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false"):
        return Found(None, f"off: {SWITCH}={os.environ[SWITCH]}")
    return _find()


@cache
def _find() -> Found:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return Found(None, "off: the kernels are for Linux on x86-64")
    if "avx2" not in _instructions():
        return Found(None, "off: this CPU has no AVX2")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    try:
        path = _folder() / f"{_key()}.so"
        if not _is_whole(path):
            state = f"{path} is damaged" if path.exists() else "not built"
            if compiler is None:
                return Found(None, f"off: {state}, and there is no C++ compiler (g++)")
            _build(compiler, path)
        # torch's own OpenMP threads serve the kernels: torch has to be loaded first
        import torch  # noqa: F401

        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home
        said = getattr(error, "stderr", None) or str(error)
        first = next((line for line in said.splitlines() if "error" in line), said.strip())
        return Found(None, f"off: building failed: {first[:200]}")
    loaded.luthier_instructions.restype = ctypes.c_char_p
    return Found(loaded, f"{loaded.luthier_instructions().decode()}, in {path}")


def _build(compiler: str, path: Path) -> None:
    """Compile into a temporary file and rename: processes that build at once do not meet.

    The file ends with its own hash: loading a file that was cut short or changed could end the process.
    """
    print(
        f"luthier: building the native kernels (once; {SWITCH}=0 switches them off)",
        file=sys.stderr,
        flush=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = [str(p) for p in sorted(SOURCES.glob("*.cpp"))]
        command = [compiler, *FLAGS, *sources, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        with made.open("ab") as file:  # a loader reads what the header names, no more
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether it is there and as it was built."""
    if not path.is_file():
        return False
    data = path.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _folder() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "luthier" / "native"


def _key() -> str:
    """Changes with the sources and with the instructions of the machine (homes are shared)."""
    digest = hashlib.sha256(" ".join((*FLAGS, *sorted(_instructions()))).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _instructions() -> frozenset[str]:
    """The flags of the CPU, as Linux tells them."""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
