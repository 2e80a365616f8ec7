"""PaddleNLP's merge_lora_params.py: `luthier merge` by its options.

    python merge_lora_params.py --model_name_or_path BASE --lora_path ADAPTER --output_path OUT

OUT is also taken as `--merge_lora_model_path` (2.7, 2.8) or `--merge_model_path` (2.6).
"""

import sys

from luthier.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["merge", *sys.argv[1:]]))
