"""PaddleNLP's run_pretrain.py: the same command line, run by Luthier.

python run_pretrain.py pretrain_argument.json [--key value ...]
python run_pretrain.py --model_name_or_path M --input_dir D --max_steps 100 --output_dir O ...
"""

import sys

from run_finetune import run

if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
