"""The cluster files under examples/: they parse, and the commands in them are Luthier's own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_config

from luthier.cli import LAUNCHED, _take_option
from luthier.configfile import read

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path, tmp_path, tmp_path / "out")))
    return path


def overrides_of(words: list[str], file: str, run_file: Path) -> dict[str, object]:
    """What the words after `luthier` change, once they were read as the command line reads them."""
    assert words[0] in LAUNCHED
    restarts, words = _take_option(words, "--max-restarts", 0)
    processes, words = _take_option(words, "--nproc", 1)
    assert words[1] == file
    config = read([run_file], words[2:]).config
    return {"resume": config.checkpoint.resume, "restarts": restarts, "processes": processes}


def test_the_slurm_script(run_file: Path) -> None:
    text = (EXAMPLES / "slurm.sh").read_text("utf-8")
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(EXAMPLES / "slurm.sh")], check=True)
    joined = text.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if line.startswith("srun ")]
    torchrun, _, luthier = line.rstrip("& ").partition(" -m luthier ")
    found = overrides_of(shlex.split(luthier), "$file", run_file)
    assert found["resume"] == "auto"
    from torch.distributed.run import get_args_parser

    words = shlex.split(torchrun)[3:] if "--kill-on-bad-exit" in torchrun else []
    args = get_args_parser().parse_args([*words, "-m", "luthier"])
    assert args.max_restarts == 3 and args.nproc_per_node == "8" and args.rdzv_backend == "c10d"
    # the time to save is given, and the script is the one that is told
    assert re.search(r"^#SBATCH --signal=B:TERM@\d+$", text, re.MULTILINE)


def test_the_kubernetes_job(run_file: Path) -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text("utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == "luthier"
    found = overrides_of(container["command"][1:], "/runs/run.yaml", run_file)
    assert found == {"resume": "auto", "restarts": 3, "processes": 4}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == found["processes"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
