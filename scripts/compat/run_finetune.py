"""PaddleNLP's run_finetune.py: the same command line, run by Luthier.

    python run_finetune.py lora_argument.json [--key value ...]
    python run_finetune.py --model_name_or_path M --dataset_name_or_path D --output_dir O ...

`do_train`, `do_eval` and `do_predict` decide which of finetune, evaluate and predict are run.
"""

import sys

from luthier.cli import main
from luthier.interop.read import commands


def run(words: list[str]) -> int:
    """Run the commands in their order; the first that fails ends it with its exit code."""
    for command in commands(words):
        if code := main(command):
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
