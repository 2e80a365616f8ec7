"""PaddleNLP's merge_tp_params.py: `luthier convert` by its options.

    python merge_tp_params.py --model_name_or_path FOLDER [--output_path OUT] [--device cpu]

FOLDER has the parts `model_state.tpXX[_ppYY].pdparams` of all ranks; OUT, FOLDER/merged where it is not given, becomes
a Hugging Face folder. How many ranks there were (`--tp`, `--pp`) is told by the files.
"""

import argparse

from luthier.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_path")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu", "auto"))
    for degree in ("tp", "pp"):
        name = {"tp": "tensor", "pp": "pipeline"}[degree]
        parser.add_argument(f"--{degree}", f"--{name}_parallel_degree", type=int)
    given = parser.parse_args()
    source = given.model_name_or_path
    raise SystemExit(main(["convert", source, given.output_path or f"{source}/merged"]))
