"""PaddleNLP's merge_lokr_params.py: `luthier merge` by its options.

    python merge_lokr_params.py --model_name_or_path BASE --lokr_path ADAPTER --output_path OUT

OUT is also taken as `--merge_lokr_model_path`.
"""

import sys

from luthier.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["merge", *sys.argv[1:]]))
