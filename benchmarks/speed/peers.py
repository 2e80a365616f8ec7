"""Who takes part in the speed benchmark, in which environment, and how that is made.

A peer lives in a Python environment of its own: `--peer NAME=PYTHON`, or the environment variable
`LUTHIER_PEER_NAME`, or NAME/bin/python of the folder `--peers`, which `--setup FOLDER` fills. One that is
not there is listed as absent, with the command that installs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNNERS = HERE / "runners"
TORCH = "2.13.0"  # the same for all: Luthier's own is in constraints.txt


@dataclass(frozen=True)
class Environment:
    """Packages of a peer. `without`: what is taken out again on a CPU. `proof`: a module that must import."""

    packages: tuple[str, ...]
    proof: str
    without: tuple[str, ...] = ()
    gpu: bool = False  # nothing to install where there is no GPU


ENVIRONMENTS = {
    "trl": Environment(
        (
            *("transformers==5.23.*", "peft==0.21.*", "trl==1.16.*"),
            *("datasets", "accelerate", "bitsandbytes>=0.50"),
        ),
        "trl",
    ),
    # the two come for CUDA only and do not load beside a CPU build of torch; text needs neither
    "llamafactory": Environment(
        ("llamafactory==0.9.5",), "llamafactory", without=("torchvision", "torchaudio")
    ),
    # 0.6.1 is its last release; newer torchao has no torchao.dtypes.nf4tensor
    "torchtune": Environment(("torchtune==0.6.1", "torchao==0.14.1"), "torchtune"),
    "liger": Environment(
        (
            *("transformers==5.23.*", "peft==0.21.*", "trl==1.16.*"),
            *("datasets", "accelerate", "bitsandbytes>=0.50", "liger-kernel>=0.8"),
        ),
        "liger_kernel",
        gpu=True,
    ),
    "unsloth": Environment(("unsloth", "unsloth_zoo"), "unsloth", gpu=True),
}


@dataclass(frozen=True)
class Contestant:
    """One way to train: a runner of `runners/` in an environment (None: this one)."""

    name: str
    runner: str
    environment: str | None
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    jobs: tuple[str, ...] = ("lora", "full")
    gpu: bool = False


LUTHIER = "luthier"
CONTESTANTS = (
    Contestant(LUTHIER, "run_luthier", None, "defaults", jobs=("lora", "full", "qlora")),
    Contestant(
        "luthier, compiled",
        "run_luthier",
        None,
        "train.compile=true",
        {"overrides": ["train.compile=true"]},
    ),
    Contestant(
        "luthier, torch alone",
        "run_luthier",
        None,
        "without its native kernels",
        {"environment": {"LUTHIER_NATIVE": "0"}},
    ),
    Contestant(
        "TRL, best",
        "run_trl",
        "trl",
        "bf16 base, no checkpointing, fused AdamW, padding-free",
        {"best": True},
    ),
    Contestant(
        "TRL, default",
        "run_trl",
        "trl",
        "float32 base under bf16 autocast, checkpointing, 8 padded conversations a step",
        {"best": False},
    ),
    Contestant(
        "transformers + PEFT",
        "run_transformers",
        "trl",
        "plain loop, sdpa with a mask of documents; nf4 by bitsandbytes",
        jobs=("lora", "full", "qlora"),
    ),
    Contestant(
        "LLaMA-Factory",
        "run_llamafactory",
        "llamafactory",
        "packing (documents see each other), bf16 base, no checkpointing",
    ),
    Contestant("torchtune", "run_torchtune", "torchtune", "single-device recipe, packed rows"),
    Contestant(
        "TRL + Liger", "run_trl", "liger", "as TRL's best", {"best": True, "liger": True}, gpu=True
    ),
    Contestant(
        "Unsloth",
        "run_unsloth",
        "unsloth",
        "its FastLanguageModel in TRL's trainer",
        jobs=("lora", "full", "qlora"),
        gpu=True,
    ),
)


def python_of(
    environment: str | None, given: Mapping[str, str], folder: Path | None
) -> tuple[str | None, str]:
    """Path of the environment's Python (None: absent) and the command that would install it."""
    if environment is None:
        return sys.executable, ""
    command = f"python -m benchmarks.speed --setup FOLDER --only-peers {environment}"
    variable = os.environ.get(f"LUTHIER_PEER_{environment.upper()}")
    found = given.get(environment) or variable
    if found is None and folder is not None:
        found = str(folder / environment / "bin" / "python")
    if found is None or not Path(found).is_file():
        return None, command
    return found, command


def python_words(words: list[str]) -> dict[str, str]:
    """NAME=PYTHON words as a mapping."""
    found = dict(word.split("=", 1) for word in words)
    unknown = found.keys() - ENVIRONMENTS.keys()
    if unknown:
        known = ", ".join(ENVIRONMENTS)
        raise SystemExit(f"--peer {', '.join(sorted(unknown))}: known environments are {known}")
    return found


def broken(python: str, environment: str | None) -> str | None:
    """Why the environment cannot take part, or None."""
    if environment is None:
        return None
    proof = ENVIRONMENTS[environment].proof
    command = [python, "-c", f"import importlib.util as u; assert u.find_spec('{proof}')"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    return None if done.returncode == 0 else f"{proof} is not installed in it"


def run(contestant: Contestant, python: str, job: dict[str, Any], limit: float) -> dict[str, Any]:
    """One run in a process of its own: what `runners/watch.py` wrote, or {"failed": why}."""
    work = Path(job["work"])
    work.mkdir(parents=True, exist_ok=True)
    path = work / "job.json"
    path.write_text(json.dumps(job), "utf-8")
    log = work / "output.txt"
    runner = RUNNERS / f"{contestant.runner}.py"
    with log.open("w") as sink:
        try:
            done = subprocess.run(
                [python, str(runner), str(path)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment_of(job),
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {limit:.0f} s"}
    result = Path(job["result"])
    if result.is_file():
        return json.loads(result.read_text("utf-8"))
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return {"failed": f"exit {done.returncode}: {' / '.join(lines[-3:])[-600:]}"}


def environment_of(job: Mapping[str, Any]) -> dict[str, str]:
    """Variables of a contestant's process: as many threads for each, nothing fetched, nothing reported.

    Only Luthier sees this checkout: a peer's environment has its own packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    kept |= {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1"}
    kept |= {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
    if job["contestant"].startswith(LUTHIER):
        kept["PYTHONPATH"] = str(HERE.parents[1])
    return kept | job.get("options", {}).get("environment", {})


def setup(folder: Path, only: list[str] | None, gpu: bool) -> int:
    """Make the peers' environments in `folder`; says what could not be made. 0 = all are there."""
    failed = 0
    for name, environment in ENVIRONMENTS.items():
        if (only and name not in only) or (environment.gpu and not gpu):
            continue
        home = folder / name
        print(f"{name}: {', '.join(environment.packages)}", flush=True)
        python = home / "bin" / "python"
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        torch = f"torch=={TORCH}" if gpu else f"torch=={TORCH}+cpu"
        index = [] if gpu else ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        attempts = [[torch], [torch, *index]]
        made = any(
            subprocess.run([*pip, *a], stderr=subprocess.DEVNULL).returncode == 0 for a in attempts
        )
        made = made and subprocess.run([*pip, torch, *environment.packages]).returncode == 0
        if made and environment.without and not gpu:
            remove = [str(python), "-m", "pip", "uninstall", "-q", "-y", *environment.without]
            subprocess.run(remove, check=False)
        why = broken(str(python), name) if made else "pip failed; its lines are above"
        if why:
            failed += 1
            print(f"{name}: not made: {why}", flush=True)
            if not made:
                shutil.rmtree(home)
    return 1 if failed else 0
