"""PaddleNLP's finetune_generation.py (2.6 to 2.8), the earlier name of run_finetune.py.

Also takes `--config FILE --lora FILE`, which its documents print.
"""

import sys

from run_finetune import run

if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
