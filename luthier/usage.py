"""What `luthier --help` and `luthier COMMAND --help` print. The commands themselves are in `cli.py`."""

from __future__ import annotations

USAGE = """\
usage: luthier COMMAND ...

  finetune FILE [FILE] [section.key=value ...]   train, evaluate, save; FILE: YAML, JSON, PaddleNLP arguments
  evaluate FILE [...]                            loss, perplexity, accuracy (and BLEU/ROUGE) of the run's model
  predict  FILE [...]                            answer rows: JSON lines in, JSON lines out
  quantize FILE [...]                            the base in few bits: a folder that transformers opens
  merge    BASE ADAPTER OUT                      fold an adapter into its base, checked before it is published
  tokenize FILE [...] [--out NAME]               pretraining: tokenise ahead, or write NAME.bin and NAME.idx
  show     FILE [...]                            the resolved config and where each value comes from
  plan     FILE [...] [--devices N]              will it fit, which layout, how long a step; reads no weights
  preview  FILE [...] [--rows N]                 rows as coloured tokens: what is trained and what is not
  verify   CHECK FILE [...]                      prove on your model and data: data, packing, loss, layout, resume
  convert  SOURCE OUT                            GGUF, checkpoint, PaddleNLP adapter -> Hugging Face / PEFT folder
  example  [NAME]                                list ready configs, or print one
  schema                                         JSON schema of the config, for editors
  env                                            versions and devices
  --version

  --nproc N [--max-restarts N] after finetune, evaluate, predict or verify layout/resume runs it in N processes.
  --debug after any command shows the traceback of an error.
"""
ABOUT = USAGE.splitlines()[2].index("train,")  # the column where what a command does begins
LAUNCHED = ("finetune", "evaluate", "predict", "verify")  # commands that several processes can run


def help_of(name: str) -> str:
    """What USAGE says of a command and, where it takes a config, the keys."""
    first = next(line for line in USAGE.splitlines() if line.split()[:1] == [name])
    usage, about = " ".join(first[:ABOUT].split()), first[ABOUT:]
    lines = [f"usage: luthier {usage}", f"  {about}"]
    if "FILE" in usage:
        from luthier.configkeys import SECTIONS  # it takes a moment

        lines += [
            "",
            "keys (luthier show FILE: their values; docs/reference/config.md: their meaning)",
        ]
        lines += [f"  {s}.  {' '.join(cls.model_fields)}" for s, cls in SECTIONS.items()]
        lines += ["  output"]
    if name in LAUNCHED:
        lines += ["", "--nproc N [--max-restarts N] runs it in N processes."]
    return "\n".join(lines) + "\n"
