"""The command line: words -> config -> one recipe. No work is done here.

Heavy imports stand inside the commands, so that `luthier --help` and refusals of a bad config answer at
once. Whatever follows FILE is an override: `section.key=value`, `--section.key value`, or a foreign
file's own names. Errors are one paragraph on stderr; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from luthier import __version__
from luthier.errors import LuthierError, Refused, suggest, traced
from luthier.usage import LAUNCHED, USAGE, help_of

Command = Callable[[list[str]], Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 refused, 1 failed, 130/143 stopped.

    One of several processes ends here after an error (`_end`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except LuthierError as error:
        return _end(error, str(error), error.exit_code, debug)
    except KeyboardInterrupt as error:
        return _end(error, "stopped", 130, False)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    except Exception as error:
        text = (
            f"an unexpected error: {type(error).__name__}: {error}. What was saved before is intact. "
            "Run again with --debug for the traceback."
        )
        return _end(error, text, 1, debug)


def _end(error: BaseException, text: str, code: int, debug: bool) -> int:
    """Show an error, once in a run of several processes. One of several leaves at once, so that its launcher ends
    the others: what would be let go of on the way out may wait for processes that are gone."""
    from luthier.parallel.world import note, processes, tells

    note(error)
    if tells(error):
        if debug:
            traceback.print_exception(error)
        print(f"luthier: {text}", file=sys.stderr, flush=True)
    if processes() > 1:
        with contextlib.suppress(OSError, ValueError):  # nobody reads on
            sys.stdout.flush()
        os._exit(code)
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] in ("--version", "version"):
        print(f"luthier {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise Refused(
            f"command '{name}'",
            f"known: {', '.join(COMMANDS)}",
            suggest(name, COMMANDS) or "see luthier --help",
        )
    if {"-h", "--help"} & set(rest):
        print(help_of(name), end="")
        return 0
    if name in LAUNCHED:
        restarts, rest = _take_option(rest, "--max-restarts", 0)
        processes, rest = _take_option(rest, "--nproc", 1)
        if restarts and name != "finetune":
            raise Refused(
                f"luthier {name} --max-restarts {restarts}",
                "only finetune leaves checkpoints to go on from",
                "leave it out",
            )
        if processes > 1 or restarts:
            if name == "verify" and rest[:1] == ["resume"]:  # it starts the runs itself
                verify(rest, processes)
                return 0
            if name == "verify" and rest[:1] != ["layout"]:
                raise Refused(
                    f"luthier verify {' '.join(rest[:1])} --nproc {processes}",
                    "each process would check the same alone; only `verify layout` compares several",
                    "leave --nproc out, or luthier verify layout FILE --nproc 2",
                )
            return _launch(name, rest, processes, restarts)
    COMMANDS[name](rest)
    return 0


def _no_words(name: str, words: list[str]) -> None:
    if words:
        raise Refused(f"luthier {name} {words[0]}", "it takes no argument", f"luthier {name}")


def _launch(name: str, words: list[str], processes: int, restarts: int) -> int:
    """Run the command in several processes, after whatever the config alone tells is refused."""
    from luthier.parallel.degrees import check_processes, fewer
    from luthier.parallel.launch import launch

    resolved = _config(name, words[1:] if name == "verify" else words, processes=processes)
    config = resolved.config
    with traced(resolved.origins):
        check_processes(config, processes)
    if not restarts:
        return launch([name, *words], processes)
    from luthier.train.ending import check_restarts, newest_in

    check_restarts(config.checkpoint.every, restarts)
    return launch(
        [name, *words],
        processes,
        restarts,
        fewer=lambda number: fewer(config, number),
        newest=lambda: newest_in(config.output),
    )


def _config(
    name: str,
    words: list[str],
    defaults: dict[str, Any] | None = None,
    processes: int | None = None,
) -> Any:
    from luthier.interop.read import read_config, split_words

    files, overrides = split_words(words)
    if not files and not overrides:
        raise Refused(
            f"luthier {name}", "no FILE was given", f"luthier {name} run.yaml; see luthier example"
        )
    return read_config(files, overrides, defaults, processes)


def _take_option(words: list[str], option: str, default: int) -> tuple[int, list[str]]:
    """Take `--rows N` or `--rows=N` out of the words."""
    for i, word in enumerate(words):
        if word == option or word.startswith(f"{option}="):
            inline = word != option
            text = (
                word.partition("=")[2] if inline else (words[i + 1] if i + 1 < len(words) else "")
            )
            if not text.isdigit() or (int(text) < 1 and default > 0):
                raise Refused(f"{option} {text}".strip(), "it is no positive number", f"{option} 3")
            return int(text), words[:i] + words[i + (1 if inline else 2) :]
    return default, words


def _take_words(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """Take `--out NAME` or `--out=NAME` out of the words."""
    for i, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
        if word == option:
            if i + 1 == len(words):
                raise Refused(option, "no name follows it", f"{option} NAME")
            return words[i + 1], words[:i] + words[i + 2 :]
    return None, words


def finetune(words: list[str]) -> None:
    resolved = _config("finetune", words)
    from luthier.recipes import finetune as run

    with traced(resolved.origins):
        run(resolved)


def evaluate(words: list[str]) -> None:
    resolved = _config("evaluate", words)
    from luthier.use import evaluate as run

    with traced(resolved.origins):
        run(resolved)


def predict(words: list[str]) -> None:
    resolved = _config("predict", words)
    from luthier.use import predict as run

    with traced(resolved.origins):
        run(resolved)


def quantize(words: list[str]) -> None:
    resolved = _config("quantize", words, {"data.path": "none"})  # it reads no rows
    from luthier.compress import quantize_model as run

    run(resolved)


def show(words: list[str]) -> None:
    from luthier.configfile import show as render

    print(render(_config("show", words)), end="")


def preview(words: list[str]) -> None:
    rows, words = _take_option(words, "--rows", 3)
    resolved = _config("preview", words)
    from luthier.use import preview as run

    run(resolved, rows=rows)


def plan(words: list[str]) -> None:
    devices, words = _take_option(words, "--devices", 1)
    given: dict[str, str | None] = {}
    for name in ("device_memory", "layout", "device_flops", "bandwidth"):
        given[name], words = _take_words(words, f"--{name.replace('_', '-')}")
    resolved = _config("plan", words, {"data.path": "none", "output": "none"}, devices)
    from luthier.plan import plan as run

    with traced(resolved.origins):
        run(resolved, devices=devices, **given)


def tokenize(words: list[str]) -> None:
    out, words = _take_words(words, "--out")
    resolved = _config("tokenize", words)
    from luthier.use import tokenize as run

    run(resolved, out=out)


def verify(words: list[str], processes: int | None = None) -> None:
    from luthier.verify import CHECKS

    if not words or words[0] not in CHECKS:
        given = words[0] if words else "nothing"
        raise Refused(
            f"luthier verify {given}",
            f"checks: {', '.join(CHECKS)}",
            suggest(given, CHECKS) or "luthier verify data run.yaml",
        )
    resolved = _config(f"verify {words[0]}", words[1:], processes=processes)
    with traced(resolved.origins):
        CHECKS[words[0]](resolved, **({} if processes is None else {"processes": processes}))


MERGE_ALIASES = {
    "model_name_or_path": "base",
    "lora_path": "adapter",
    "vera_path": "adapter",
    "lokr_path": "adapter",
    "output_path": "out",
    "merge_model_path": "out",
    "merge_lora_model_path": "out",
    "merge_vera_model_path": "out",
    "merge_lokr_model_path": "out",
}


def merge(words: list[str]) -> None:
    """`BASE ADAPTER OUT`, or the suites' option names."""
    parser = argparse.ArgumentParser(prog="luthier merge", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    for alias in MERGE_ALIASES:
        parser.add_argument(f"--{alias}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu", "cuda", "auto"])
    parser.add_argument("--safe_serialization", default="true")
    parser.add_argument("--low_gpu_mem", default=None)
    parser.add_argument("--quantized", action="store_true")
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise Refused("luthier merge", str(error), "luthier merge BASE ADAPTER OUT") from error
    if unknown:
        raise Refused(
            f"luthier merge {unknown[0]}",
            "there is no such option",
            "luthier merge BASE ADAPTER OUT [--device cpu|gpu|auto] [--quantized]",
        )
    if str(args.safe_serialization).lower() not in ("true", "1", "yes"):
        raise Refused(
            f"--safe_serialization {args.safe_serialization}",
            "merged models are written as safetensors only",
            "leave the option out",
        )
    found: dict[str, str] = dict(zip(("base", "adapter", "out"), args.paths, strict=False))
    for alias, target in MERGE_ALIASES.items():
        value = getattr(args, alias)
        if value is not None:
            if target in found and found[target] != value:
                raise Refused(
                    f"--{alias} {value}",
                    f"{target} was given as {found[target]} too",
                    "give it once",
                )
            found[target] = value
    if len(args.paths) > 3 or not {"adapter", "out"} <= found.keys():
        raise Refused(
            "luthier merge " + " ".join(args.paths),
            "it takes three folders",
            "luthier merge BASE ADAPTER OUT",
        )
    if args.quantized:
        from luthier.merge_quantized import merge_quantized as run
    else:
        from luthier.exchange import merge as run
    device = "cuda" if args.device == "gpu" else str(args.device)
    run(found.get("base"), found["adapter"], found["out"], device=device)


def convert(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="luthier convert", allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--base")
    usage = "luthier convert SOURCE OUT [--base BASE]"
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise Refused("luthier convert", str(error), usage) from error
    if unknown:
        raise Refused(f"luthier convert {unknown[0]}", "there is no such option", usage)
    if len(args.paths) != 2:
        raise Refused("luthier convert", f"{len(args.paths)} folders were given", usage)
    from luthier.exchange import convert as run

    run(*args.paths, base=args.base)


def example(words: list[str]) -> None:
    from importlib.resources import files

    folder = files("luthier") / "examples"
    names = sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )
    if not words:
        for name in names:
            first = (folder / f"{name}.yaml").read_text("utf-8").splitlines()[0]
            print(f"{name:<16}{first.lstrip('# ')}")
        print("\nluthier example NAME > run.yaml prints one.")
        return
    name = words[0].removesuffix(".yaml")
    if name not in names:
        raise Refused(f"example '{name}'", f"there are: {', '.join(names)}", suggest(name, names))
    print((folder / f"{name}.yaml").read_text("utf-8"), end="")


def schema(words: list[str]) -> None:
    _no_words("schema", words)
    from luthier.configfile import json_schema

    print(json.dumps(json_schema(), indent=2))


def env(words: list[str]) -> None:
    _no_words("env", words)
    from luthier.exchange import env as run

    run()


COMMANDS: dict[str, Command] = {
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "quantize": quantize,
    "merge": merge,
    "show": show,
    "plan": plan,
    "preview": preview,
    "tokenize": tokenize,
    "verify": verify,
    "convert": convert,
    "example": example,
    "schema": schema,
    "env": env,
}
