"""Make what the docs take from code and results files.

README and docs/reference/families.md: the support table of tests/conformance/results.json.
docs/reference: config.md and config.schema.json from luthier/config.py, paddlenlp.md from its table. The
tables in docs/tasks/packing.md, adapters.md, quantize.md, long-documents.md, pretrain.md and speed.md from benchmarks/packing,
methods, quantize, attention_cost, pretraining and speed; that in several-devices.md by layout_table.py. `--check` writes
nothing and fails when a file is not what the code says; CI runs that.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

from luthier.configfile import json_schema
from luthier.configkeys import KEYS, SECTIONS, expected
from luthier.configtext import dump_value
from luthier.interop.paddlenlp_keys import ALIASES, CODE_DEFAULTS, INERT, JOBS, OFF, PARALLEL, READ

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
PACKING = ROOT / "docs" / "tasks" / "packing.md"
ADAPTERS = ROOT / "docs" / "tasks" / "adapters.md"
RESULTS = ROOT / "benchmarks" / "packing" / "results"
LONG = ROOT / "docs" / "tasks" / "long-documents.md"
COSTS = ROOT / "benchmarks" / "attention_cost" / "results"
COST_MARKS = (
    "<!-- attention table: python scripts/reference.py -->",
    "<!-- end of attention table -->",
)
PRETRAINING = ROOT / "docs" / "tasks" / "pretrain.md"
FALLING = ROOT / "benchmarks" / "pretraining" / "results"
FALLING_MARKS = (
    "<!-- pretraining table: python scripts/reference.py -->",
    "<!-- end of pretraining table -->",
)
METHODS = ROOT / "benchmarks" / "methods" / "results"
SPEED = ROOT / "docs" / "tasks" / "speed.md"
SPEEDS = ROOT / "benchmarks" / "speed" / "results"
SPEED_MARKS = (
    "<!-- speed tables: python scripts/reference.py -->",
    "<!-- end of speed tables -->",
)
METHOD_MARKS = (
    "<!-- methods table: python scripts/reference.py -->",
    "<!-- end of methods table -->",
)
QUANTISING = ROOT / "docs" / "tasks" / "quantize.md"
QUANTISED = ROOT / "benchmarks" / "quantize" / "results"
QUANTISE_MARKS = (
    "<!-- quantise table: python scripts/reference.py -->",
    "<!-- end of quantise table -->",
)
PLANNING = ROOT / "docs" / "tasks" / "plan.md"
LAYOUTS = runpy.run_path(str(ROOT / "scripts" / "layout_table.py"))
PLANNED = ROOT / "benchmarks" / "plan"
PLAN_MARKS = ("<!-- plan table: python scripts/reference.py -->", "<!-- end of plan table -->")
README = ROOT / "README.md"
SUPPORT = ROOT / "tests" / "conformance" / "results.json"
SUPPORT_MARKS = (
    "<!-- support table: python scripts/reference.py -->",
    "<!-- end of support table -->",
)
# column -> the checks of tests/conformance that it needs
COLUMNS = {
    "pretrain": ("pretrain_run", "packed"),
    "full": ("packed", "padded", "recomputed", "saved", "full_run"),
    "LoRA": ("lora_gradients", "lora_run", "lora", "dora", "pissa", "mixer"),
    "other adapters": (
        "mora",
        "vera",
        "lokr",
        "ia3",
        "reft",
        "mora_type1",
        "vera_paddlenlp",
        "lokr_both",
        "reft_tiny",
    ),
    "prefix, prompt": ("prefix", "prompt", "prefix_network"),
    "quantised base": ("nf4", "fp4", "int8", "int4"),
    "generation": ("generation",),
}
FAMILIES = """\
# Families

Made by `scripts/reference.py` from `tests/conformance/results.json`, which `make support` writes; do not edit. Each
row is a tiny random model, each cell what became of the checks of `tests/conformance` that are named below.
`chatglm`, `chatglm2` (ChatGLM3 too), `glm_legacy` (the GLM that fills blanks) and `qwen` (the first generation) are the
[families that transformers lacks](../tasks/chatglm-glm-qwen.md); `glm` and `glm4` are GLM-4.

"""
MARKS = ("<!-- packing table: python scripts/reference.py -->", "<!-- end of packing table -->")
SETS = {"advertisegen": "AdvertiseGen", "alpaca": "Alpaca demo"}
HEAD = """\
# Configuration

Made by `scripts/reference.py` from `luthier/config.py`; do not edit. Keys stand in sections of a YAML or
JSON file, or on the command line as `section.key=value`. `luthier show FILE` prints the resolved
configuration and where each value comes from.
"""


def reference() -> str:
    """The page: one table per section, the keys without a section first."""
    plain = [key for key in KEYS if "." not in key]
    parts = [HEAD, *_table(plain)]
    for name in SECTIONS:
        parts += [f"\n## {name}\n", *_table([key for key in KEYS if key.startswith(f"{name}.")])]
    return "\n".join(parts) + "\n"


def _table(keys: list[str]) -> list[str]:
    rows = [_row(key) for key in keys]
    return ["| key | values | default | meaning |", "|---|---|---|---|", *rows]


def _row(key: str) -> str:
    info = KEYS[key]
    default = info.get_default(call_default_factory=True, validated_data={})
    if info.is_required():
        shown = "required"
    else:
        plain = list(default) if isinstance(default, tuple) else default
        shown = "" if plain is None else f"`{dump_value(plain)}`"
    cells = [f"`{key}`", expected(key), shown, info.description or ""]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


PADDLENLP = """\
# PaddleNLP's arguments

Made by `scripts/reference.py` from `luthier/interop/paddlenlp_keys.py`; do not edit. Argument files of
PaddleNLP's fine-tuning scripts (2.6.1 to 3.0.0b4) run as they are, and `luthier show FILE` prints what
each argument becomes. Where PaddleNLP's published document and its code have different defaults, the
document's holds.

## Translated

| argument | default | the code's default, where it differs |
|---|---|---|
"""


def arguments() -> str:
    """The page of PaddleNLP's arguments: translated, inert, off in one process, refused."""
    rows = [
        f"| `{name}` | {'' if default is None else f'`{dump_value(default)}`'} | {CODE_DEFAULTS.get(name, '')} |"
        for name, (_, default) in READ.items()
    ]
    parts = [PADDLENLP + "\n".join(rows)]
    parts += ["## Other spellings", ", ".join(f"`{a}` = `{b}`" for a, b in sorted(ALIASES.items()))]
    parts += ["## Accepted: they cannot change a result here", _listed(INERT)]
    parts += ["## Off in one process", _listed(PARALLEL)]
    parts += ["## Refused when switched on"]
    refused = [f"| `{name}` | {s.why} | {s.do} |" for name, s in sorted(OFF.items())]
    parts += ["\n".join(["| argument | why | instead |", "|---|---|---|", *refused])]
    parts += ["## Refused: other jobs"]
    jobs = [f"| {job} | {_listed(names)} |" for job, names in JOBS]
    parts += ["\n".join(["| job | arguments |", "|---|---|", *jobs])]
    return "\n\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def packing() -> str:
    """The page with the table of padding shares between its marks; one table per results file."""
    return _between(PACKING, MARKS, [_padding(path) for path in sorted(RESULTS.glob("*.json"))])


def support() -> str:
    """A row a family, a column a capability, from the results of the conformance suite."""
    found = json.loads(SUPPORT.read_text("utf-8"))
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, checks in found["families"].items():
        cells = []
        for needed in COLUMNS.values():
            failed = [check for check in needed if checks.get(check) != "passed"]
            cells.append("yes" if not failed else f"no: {', '.join(failed)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*lines, "", f"Measured with {versions}."]) + "\n"


def families() -> str:
    """The page of the families: the table, and what its columns need."""
    needs = [f"- {name}: {_listed(checks)}" for name, checks in COLUMNS.items()]
    return FAMILIES + support() + "\n## Checks\n\n" + "\n".join(needs) + "\n"


def adapters() -> str:
    """The page with the tables of the methods' learning and speed between its marks."""
    tables = [_learning(path) for path in sorted(METHODS.glob("learning-*.json"))]
    tables += [_speed(path) for path in sorted(METHODS.glob("speed-*.json"))]
    return _between(ADAPTERS, METHOD_MARKS, tables)


def quantising() -> str:
    """The page with the tables of what each quantised form costs between its marks."""
    tables = [_quality(path) for path in sorted(QUANTISED.glob("quality-*.json"))]
    tables += [_errors(path) for path in sorted(QUANTISED.glob("cpu.json"))]
    return _between(QUANTISING, QUANTISE_MARKS, tables)


def _quality(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    table, config = found["tables"]["quality"], found["config"]
    lines = [
        "| form | bits | error | perplexity, Alpaca | perplexity, C4 |",
        "|---|---|---|---|---|",
    ]
    for r in table:
        bits = "" if r["form"] == "none" else f"{r['bits']:.2f}"
        error = "" if r["form"] == "none" else f"{r['error']:.2%}"
        name = "the model itself" if r["form"] == "none" else r["form"]
        lines.append(f"| {name} | {bits} | {error} | {r['alpaca']:.3f} | {r['c4']:.3f} |")
    lines += [
        "",
        f"{config['quality']} in float32, the last {config['rows']} rows of each [data set](data-sets.md) cut at "
        f"{config['length']} tokens: {table[0]['alpaca_tokens']:,} tokens of answers and {table[0]['c4_tokens']:,} of "
        f"documents, the same for all. A small sample: it orders forms that lie far apart. Bits per weight with scales; "
        f"error of the model's weights, relative Frobenius norm. `benchmarks/quantize/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def _errors(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    table = found["tables"]["error"]
    kinds = [key for key in table[0] if key not in ("form", "bits")]
    lines = [f"| form | bits | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for r in table:
        lines.append(
            f"| {r['form']} | {r['bits']:.2f} | {' | '.join(f'{r[k]:.2%}' for k in kinds)} |"
        )
    lines += [
        "",
        "Error of fixed random matrices [1024, 1024] by how their numbers are distributed; "
        f"`benchmarks/quantize/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def long_documents() -> str:
    """The page with the tables of what attention costs between its marks; one table per results file."""
    return _tables(LONG, COST_MARKS, COSTS)


def pretraining() -> str:
    """The page with the falling losses between its marks; one table per results file."""
    return _tables(PRETRAINING, FALLING_MARKS, FALLING)


def _tables(page: Path, marks: tuple[str, str], results: Path) -> str:
    """A page with one table per results file of a benchmark, by the benchmark's own `table`."""
    table = runpy.run_path(str(results.parent / "table.py"))["table"]
    paths = sorted(results.glob("*.json"))
    return _between(page, marks, [table(json.loads(p.read_text("utf-8")), p.name) for p in paths])


def speed() -> str:
    """The page with the tables of the speed benchmark between its marks, one block per results file."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "speed" / "table.py"))
    paths = sorted(SPEEDS.rglob("*.json"))
    found = {str(path.relative_to(SPEEDS)): json.loads(path.read_text("utf-8")) for path in paths}
    newest = [made["page"](facts, name) for name, facts in found.items() if "/" not in name]
    return _between(SPEED, SPEED_MARKS, [*newest, made["runs"](found)])


def planning() -> str:
    """The page with predicted and measured memory between its marks."""
    table = runpy.run_path(str(PLANNED / "__main__.py"))["table"]
    found = json.loads((PLANNED / "results" / "cpu.json").read_text("utf-8"))
    return _between(PLANNING, PLAN_MARKS, [table(found)])


def _between(page: Path, marks: tuple[str, str], tables: list[str]) -> str:
    before, rest = page.read_text("utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    return f"{before}{marks[0]}\n\n" + "\n".join(tables) + f"\n{marks[1]}{after}"


def _learning(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    lines = [
        "| method | held-out loss | BLEU-4 | ROUGE-L | trained | tokens/s | peak memory, GB | folder, MB | rate |",
        "|---" * 9 + "|",
    ]
    for r in found["table"]:
        if r["method"] == "base":
            lines.append(
                f"| the base | {r['loss']:.3f} | {r['bleu4']:.3f} | {r['rougel']:.3f} | | | | | |"
            )
            continue
        rate = next(o.partition("=")[2] for o in r["options"] if o.startswith("optim.lr="))
        lines.append(
            f"| {r['method']} | {r['loss']:.3f} | {r['bleu4']:.3f} | {r['rougel']:.3f} | {r['trained']:,} "
            f"| {r['tokens_per_second']:.0f} | {r['peak_memory'] / 1e9:.2f} | {r['folder_bytes'] / 1e6:.2f} | {rate} |"
        )
    config = found["config"]
    lines += [
        "",
        f"{config['steps']} optimiser steps on the demo's data, {config['model']} in bfloat16, the same batches of 2 x 256 tokens for all, "
        f"{config['rows']} held-out rows; {found['device']}, torch {found['versions']['torch']}. One run each: differences "
        f"of a few thousandths are chance. Tokens per second and memory are of whole runs on a shared machine. "
        f"`benchmarks/methods/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def _speed(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    lines = [
        "| a step of | times the frozen base's | spread | peak memory, GB |",
        "|---|---|---|---|",
    ]
    names = {
        "frozen": "the frozen base: forward and input gradients",
        "peft": "PEFT's LoRA in the same stage",
    }
    names["peft, plain transformers"] = "PEFT's LoRA, transformers' forward and loss"
    for r in found["table"]:
        low, high = r["of_frozen_spread"]
        lines.append(
            f"| {names.get(r['method'], r['method'])} | {r['of_frozen']:.2f} | {low:.2f} to {high:.2f} "
            f"| {r['peak_memory'] / 1e9:.2f} |"
        )
    config = found["config"]
    shape = "two layers of a 1B Llama's shape" if config["shape"] == "1b" else config["model"]
    lines += [
        "",
        f"{shape}, bfloat16, one row of 512 tokens in 8 documents, {config['repeats']} turns in alternating order, each in a "
        f"process of its own; {found['device']}, torch {found['versions']['torch']}, PEFT {found['versions']['peft']}. "
        f"`benchmarks/methods/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def _padding(path: Path) -> str:
    found = json.loads(path.read_text("utf-8"))
    config, versions = found["config"], found["versions"]
    methods = list(dict.fromkeys(r["method"] for r in next(iter(found["tables"].values()))))
    lines = [f"| data set | length | {' | '.join(methods)} |", "|---" * (2 + len(methods)) + "|"]
    for name, table in found["tables"].items():
        for length in dict.fromkeys(r["length"] for r in table):
            shares = {
                r["method"]: f"{r['padding_of_batches']:.2%} ({r['padding_of_full_rows']:.2%})"
                for r in table
                if r["length"] == length
            }
            cells = " | ".join(shares[method] for method in methods)
            lines.append(f"| {SETS[name]} | {length:,} | {cells} |")
    lines += [
        "",
        f"Measured by `python -m benchmarks.packing` with the tokenizer of {config['tokenizer']}, batches of "
        f"{config['micro_batch']} rows, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"`benchmarks/packing/results/{path.name}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the reference pages.")
    parser.add_argument("--check", action="store_true", help="fail if a file is out of date")
    check = parser.parse_args().check
    files = {
        FOLDER / "config.md": reference(),
        FOLDER / "paddlenlp.md": arguments(),
        PACKING: packing(),
        ADAPTERS: adapters(),
        QUANTISING: quantising(),
        README: _between(README, SUPPORT_MARKS, [support()]),
        FOLDER / "families.md": families(),
        LONG: long_documents(),
        PRETRAINING: pretraining(),
        PLANNING: planning(),
        LAYOUTS["PAGE"]: LAYOUTS["page"](),
        SPEED: speed(),
        FOLDER / "config.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }
    stale = [p for p, text in files.items() if not p.is_file() or p.read_text("utf-8") != text]
    if check:
        for path in stale:
            print(f"{path} is out of date; run: make docs", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path], "utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
