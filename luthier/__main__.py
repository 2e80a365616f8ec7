"""`python -m luthier` is the command line."""

import os
import sys

from luthier.cli import main
from luthier.parallel.world import processes

if __name__ == "__main__":
    code = main()
    if code and processes() > 1:
        # no farewell to processes that may be gone: leave at once, so that the launcher ends them
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)
