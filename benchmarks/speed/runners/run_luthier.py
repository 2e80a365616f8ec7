"""`luthier finetune`, as a user types it, with a watch around its optimiser steps. Run as `python run_luthier.py JOB`.

`options`: `overrides`, a list of section.key=value beside those of the run.
"""

from __future__ import annotations

import sys
from typing import Any

import watch

from luthier.cli import main as luthier

seen = watch.Watch(sys.argv[1])


def main() -> None:
    from luthier import recipes
    from luthier.train import step

    plain, build = step.Updater.update, recipes.build

    def built(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        seen.loaded()
        return found

    def update(self: Any, micro_batches: Any, **kwargs: Any) -> Any:
        seen.begin()
        report = plain(self, micro_batches, **kwargs)
        slots = sum(batch.input_ids.numel() for batch in micro_batches)
        seen.end(report.loss, report.num_tokens, slots, report.num_supervised)
        return report

    step.Updater.update, recipes.build = update, built
    raise SystemExit(luthier(["finetune", *seen.job["config"]]))


if __name__ == "__main__":
    main()
