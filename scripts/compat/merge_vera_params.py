"""PaddleNLP's merge_vera_params.py: `luthier merge` by its options.

    python merge_vera_params.py --model_name_or_path BASE --vera_path ADAPTER --output_path OUT

OUT is also taken as `--merge_vera_model_path`.
"""

import sys

from luthier.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["merge", *sys.argv[1:]]))
