"""Make the virtual environment with everything that `make demo` and `make test` need.

Standard library only. A CPU build of torch is taken where no NVIDIA GPU is visible: it is ten times
smaller. Where neither the configured package index nor PyTorch's own offers one, the plain build is
taken, and that is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"  # the patch of the series in constraints.txt
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(target: str) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this script runs before anything is checked
        print(f"Luthier needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.")
        print("Name another one: make setup PYTHON=python3.12")
        return 2
    folder = ROOT / target
    if not (folder / "bin" / "python").exists():
        print(f"making {target}", flush=True)
        venv.create(folder, with_pip=True, symlinks=os.name != "nt", clear=folder.exists())
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    os.environ["PIP_ROOT_USER_ACTION"] = "ignore"  # it is an environment of its own
    constraints = ["-c", str(ROOT / "constraints.txt")]
    if not has_gpu() and sys.platform == "linux" and not has_torch(folder):
        print("no GPU here: taking the CPU build of torch", flush=True)
        wanted = f"torch=={TORCH}+cpu"
        attempts = [[wanted], [wanted, "--extra-index-url", CPU_INDEX, "--retries", "1"]]
        if not any(run([*pip, "install", "-q", *attempt], quiet=True) for attempt in attempts):
            print(
                "no CPU build of torch was found: taking the plain one (a large download)",
                flush=True,
            )
    print("installing luthier and the test extras", flush=True)
    if not run([*pip, "install", "-q", *constraints, "-e", f"{ROOT}[test]"]):
        print("installing failed; the lines above say why. `make setup` tries again.")
        return 1
    # built here, so that no first run waits; without a compiler it says so, and torch computes instead
    code = "from luthier import native; print('native kernels:', native.status())"
    run([str(folder / "bin" / "python"), "-c", code])
    return 0


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and run(["nvidia-smi", "-L"], quiet=True)


def has_torch(folder: Path) -> bool:
    return run([str(folder / "bin" / "python"), "-c", "import torch"], quiet=True)


def run(command: list[str], *, quiet: bool = False) -> bool:
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
