"""Build the demo's data: questions about the standard library, answered by its own docstrings.

    python scripts/demo_data.py --output DIR [--train 1500] [--held-out 100]

writes DIR/train.json and DIR/dev.json, JSON lines of `src` (a question about one function, method or
class) and `tgt` (the first paragraph of its docstring). Rows, order and split depend on the Python
installation alone. No answer occurs twice, so none of the held-out ones is seen in training. It imports the
standard library's public modules, except those that would open a window, print or test.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

SHORTEST, LONGEST = 20, 400  # characters of an answer
SKIPPED = {
    *("antigravity", "this", "tkinter", "turtle", "turtledemo", "idlelib"),  # act when imported
    *("readline", "rlcompleter"),  # may write control codes to the terminal
    *("test", "tests", "lib2to3", "pydoc_data", "ensurepip"),  # not for users
    *("posix", "nt", "ntpath"),  # met as os and os.path
    "sysconfig",  # its defaults differ between an environment and its base
    "encodings",  # a hundred modules of one shape
    "distutils",  # replaced by setuptools where that is installed
}
PUBLIC_NAMES = {"builtins": "", "posixpath": "os.path."}
# a signature in the docstring's first line: `name(args)`, perhaps `-> result`
SIGNATURE = re.compile(r"^[\w.]+\([^()]*\)(?:\s*->\s*[\w\[\], .|]+)?(?:\s*(?:--|:)\s+|$)")
# defaults to show; others may hold an address, a path or a set, which differ between runs
PLAIN = re.compile(r"None|True|False|-?[\d.e+-]{1,12}|\(\)|b?'(?:[^/\\<]{0,16}|/)'")
# an answer worth learning: no example, no further signature, no heading of a list that is cut off
SENTENCE = re.compile(r"[A-Z](?!.*(?:>>>|->|=>)).*[^:]$")


def modules() -> Iterator[ModuleType]:
    """The public modules of the standard library, packages before their parts, in order of name."""
    waiting = sorted(sys.stdlib_module_names, reverse=True)
    while waiting:
        name = waiting.pop()
        last = name.rpartition(".")[2]
        if last.startswith("_") or last in SKIPPED:
            continue
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit):  # made for another platform, or its library is missing
            continue
        yield module
        parts = [part.name for part in pkgutil.iter_modules(getattr(module, "__path__", []))]
        waiting += sorted((f"{name}.{part}" for part in parts), reverse=True)


def subjects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Dotted name and object of the functions, classes and methods that `module` defines for users."""
    prefix = PUBLIC_NAMES.get(module.__name__, f"{module.__name__}.")
    exported = getattr(module, "__all__", ())
    classes = []
    for name, item in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(item) or inspect.isroutine(item)):
            continue
        if getattr(item, "__name__", name) != name:
            continue  # an alias
        origin = getattr(item, "__module__", None) or ""
        ours = f"{origin}.".startswith(f"{module.__name__}.")
        hidden = origin.startswith("_") or origin in SKIPPED
        if not ours and not (hidden and name in exported):
            continue  # imported from elsewhere; met there under its own name
        yield prefix + name, item
        if inspect.isclass(item):
            classes.append((prefix + name, item))
    for name, item in classes:  # after the functions: random.choice, not random.Random.choice
        for part, member in sorted(vars(item).items()):
            member = getattr(member, "__func__", member)  # of a class or static method
            if not part.startswith("_") and inspect.isroutine(member):
                yield f"{name}.{part}", member


def arguments(item: Any) -> str:
    """`(text, width=70, **kwargs)` without annotations, or nothing where Python does not know it."""
    try:
        signature = inspect.signature(item)
    except Exception:  # besides ValueError, whatever evaluating a built-in's defaults raises
        return ""
    shown = []
    for i, parameter in enumerate(signature.parameters.values()):
        if i == 0 and parameter.name in ("self", "cls", "type", "mcs"):
            continue
        if parameter.default is not parameter.empty and not PLAIN.fullmatch(
            repr(parameter.default)
        ):
            parameter = parameter.replace(default=...)
        shown.append(parameter.replace(annotation=parameter.empty))
    return str(inspect.Signature(shown)).replace("Ellipsis", "...")


def first_paragraph(text: str) -> str:
    """The first paragraph on one line, without a leading signature."""
    text = SIGNATURE.sub("", inspect.cleandoc(text)).strip()
    paragraph = re.split(r"\n\s*\n", text)[0]
    return re.sub(r"\s+", " ", paragraph).strip()


def collect() -> list[dict[str, str]]:
    """All rows, in an order that looks random and does not depend on the other rows."""
    rows: dict[str, dict[str, str]] = {}  # by the answer's words
    for module in modules():
        for name, item in subjects(module):
            doc = item.__doc__
            answer = first_paragraph(doc) if isinstance(doc, str) else ""
            if not SHORTEST <= len(answer) <= LONGEST or not SENTENCE.match(answer):
                continue
            if inspect.isclass(item):
                question = f"What is the class `{name}`?"
            else:
                question = f"What does `{name}{arguments(item)}` do?"
            words = " ".join(re.findall(r"\w+", answer.casefold()))
            rows.setdefault(words, {"src": question, "tgt": answer})
    return sorted(rows.values(), key=lambda row: hashlib.sha256(row["src"].encode()).digest())


def build(output: Path, num_train: int, num_held_out: int) -> tuple[int, int]:
    """Write train.json and dev.json; returns their numbers of rows (training takes what there is)."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            rows = collect()
    parts = {
        "dev": rows[:num_held_out],
        "train": rows[num_held_out : num_held_out + num_train],
    }
    if not parts["train"]:
        raise SystemExit(
            f"{num_held_out} held-out rows and at least one for training were asked for. This Python has "
            f"{len(rows)} docstrings to ask about. Ask for fewer."
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (output / f"{name}.json").write_text(lines, encoding="utf-8")
    return len(parts["train"]), len(parts["dev"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's data set from docstrings.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=1500, help="training rows (default 1500)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out rows (default 100)")
    options = parser.parse_args()
    if min(options.train, options.held_out) < 1:
        parser.error("--train and --held-out take positive numbers")
    num_train, num_held_out = build(options.output, options.train, options.held_out)
    print(f"{options.output}: {num_train} training rows, {num_held_out} held-out rows")


if __name__ == "__main__":
    main()
