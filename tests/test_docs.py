"""Everything that README and docs/ tell a user to type is run here, in miniature.

Each page has a folder of its own with a tiny model under the name of a real one and a little data. Its
blocks are taken from top to bottom: `console` blocks run line by line (what is shown below a command must be
its output, `...` stands for anything), `python` blocks are executed, `yaml` blocks are read as configs. HTML
comments do what a reader need not see: `<!-- run: COMMAND -->`, and `<!-- file: NAME -->` before a block, or
`<!-- file: NAME` with the content inside. No other kind of block but `text` may stand in a page. The processes of
`--nproc` are forked from one that has imported all; the launcher itself is tests/parallel/test_launching.py's.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main
from luthier.configfile import from_mapping
from luthier.configkeys import KEYS, SECTIONS
from luthier.interop.read import read_config
from tests.zoo_folders import zoo_folder

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
OWN = {
    "THUDM/chatglm3-6b": "chatglm2",
    "THUDM/glm-large-chinese": "glm_legacy",
    "Qwen/Qwen-7B-Chat": "qwen",
}

NOT_RUN = {  # beginnings of commands that are not run here, and why
    "make ": "it makes an environment of its own; CI runs `make test`, `make demo` is the demo",
    "pip install": "it needs a package index",
    "python scripts/demo_data.py": "tests/test_demo_data.py runs it",
    "python -m benchmarks.": "it needs the public data sets, and results files are committed",
}

CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima"},
    **{"Kenya": "Nairobi", "Egypt": "Cairo", "Chile": "Santiago", "Cuba": "Havana", "Iran": "Tehran"},
    **{"Norway": "Oslo", "Greece": "Athens", "Ghana": "Accra", "Nepal": "Kathmandu", "Fiji": "Suva"},
    **{"Latvia": "Riga", "Malta": "Valletta", "Qatar": "Doha", "Oman": "Muscat", "Mali": "Bamako"},
}  # fmt: skip
PAIRS = [(f"What is the capital of {c}?", f"{town}.") for c, town in CAPITALS.items()]


# ---- the folder that a page works in


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A folder with tiny models under the names that the pages use."""
    from luthier.models.load import save_model

    folder = tmp_path_factory.mktemp("models")
    first = folder / MODELS[0]
    save_model(tiny_model("llama", max_position_embeddings=8192), first, tiny_tokenizer())
    shutil.copytree(first, folder / MODELS[1])
    for name, family in OWN.items():
        zoo_folder(family, folder / name, positions=2048, roles=name.endswith("chatglm3-6b"))
    return folder


@pytest.fixture
def sandbox(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with models and data."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests/golden/data/paddlenlp_adapters", tmp_path / "paddle")
    pairs = [{"src": src, "tgt": tgt} for src, tgt in PAIRS]
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": src},
                {"role": "assistant", "content": tgt},
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for src, tgt in PAIRS * 3
    ]
    write_lines(tmp_path / "data/train.json", pairs[:16])
    write_lines(tmp_path / "data/dev.json", pairs[16:])
    write_lines(tmp_path / "questions.jsonl", [{"src": row["src"]} for row in pairs[:2]])
    write_lines(tmp_path / "chats.jsonl", chats)
    write_lines(tmp_path / "corpus.jsonl", [{"content": "one two three " * 9}] * 200)
    write_lines(tmp_path / "advertising/train.json", pairs[:9])
    write_lines(tmp_path / "advertising/dev.json", pairs[9:12])
    alpaca = [{"instruction": src, "input": "", "output": tgt} for src, tgt in PAIRS]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def forked(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the launcher: starting Python and importing all takes ten times as long as what a page shows."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/parallel"))
    from killed_ranks import Ranks  # pyright: ignore[reportMissingImports]

    started = count()

    def launch(words: list[str], processes: int, *_: Any, **__: Any) -> int:
        run = Ranks(list(words), processes, sandbox, next(started))
        codes = run.wait()
        print(run.text())
        return next((code for code in codes if code), 0) or 0

    monkeypatch.setattr("luthier.parallel.launch.launch", launch)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the blocks of a page


@dataclass(frozen=True)
class Block:
    """A fenced block or a comment: its kind, its text, its line, and the name of its file, if it has one."""

    kind: str
    text: str
    line: int
    file: str = ""


PART = re.compile(
    r"<!-- run: (?P<run>.*?) -->"
    r"|<!-- file: (?P<hidden>\S+)\n(?P<content>.*?)-->"
    r"|(?:<!-- file: (?P<file>\S+) -->\n+)?^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$",
    re.S | re.M,
)


def blocks(text: str) -> Iterator[Block]:
    """The parts of a page that do something, in order."""
    for match in PART.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["run"]:
            yield Block("console", f"$ {match['run']}\n", line)
        elif match["hidden"]:
            yield Block("file", match["content"], line, match["hidden"])
        else:
            name = match["file"] or ""
            if match["kind"] == "yaml" and (first := re.match(r"# (\S+\.yaml)\n", match["text"])):
                name = first[1]
            yield Block(match["kind"], match["text"], line, name)


@dataclass
class Command:
    words: str
    shown: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether the page shows it being refused."""
        return any(line.startswith("luthier: ") for line in self.shown)


def commands(text: str) -> list[Command]:
    """`$ words`, each with the lines shown below it."""
    found: list[Command] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif line.strip():
            assert found, f"output without a command: {line}"
            found[-1].shown.append(line)
    return found


# ---- running them


def execute(words: list[str]) -> tuple[int, str]:
    """The exit code and the output of `luthier ...` or `python FILE ...`, run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if words[0] == "luthier":
            return main(words[1:]), out.getvalue()
        assert words[0] == "python" and words[1].startswith("scripts/"), f"cannot run {words}"
        script = ROOT / words[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *words[2:]])
            patch.syspath_prepend(str(script.parent))
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(script), run_name="__main__")
    return int(ended.value.code or 0), out.getvalue()


def run(command: Command) -> None:
    if command.words.startswith(tuple(NOT_RUN)):
        return
    words = shlex.split(command.words, comments=True)
    target = words.index(">") if ">" in words else len(words)
    code, output = execute(words[:target])
    assert code == (2 if command.refused else 0), f"$ {command.words}\nexit code {code}\n{output}"
    if target < len(words):
        Path(words[target + 1]).write_text(output)
    assert agrees("\n".join(command.shown), output), (
        f"$ {command.words}\nshown:\n{chr(10).join(command.shown)}\nfound:\n{output}"
    )


def agrees(shown: str, output: str) -> bool:
    """Whether `shown`, in which `...` stands for anything, is the output; white space does not count."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return not shown or re.fullmatch(".*".join(parts), " ".join(output.split()), re.S) is not None


def read_yaml(block: Block) -> None:
    """A whole config, which is also written to its file, or a part of one."""
    if block.file:
        Path(block.file).write_text(block.text)
        read_config([Path(block.file)])
        return
    whole: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o"}
    for name, below in yaml.safe_load(block.text).items():
        whole[name] = {**whole.get(name, {}), **below} if isinstance(below, dict) else below
    from_mapping(whole)


def do(block: Block, names: dict[str, Any]) -> None:
    """What a block says; `names` are those of the page's Python blocks."""
    match block.kind:
        case "console":
            for command in commands(block.text):
                run(command)
        case "python":
            exec(compile(block.text, f"<block at line {block.line}>", "exec"), names)
        case "yaml":
            read_yaml(block)
        case "file" | "json" if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        case kind:
            assert kind == "text", f"a block of kind '{kind}' is not checked by anything"


def walk(path: Path) -> None:
    """Do everything that a page says."""
    names: dict[str, Any] = {}
    for block in blocks(path.read_text("utf-8")):
        try:
            do(block, names)
        except BaseException as error:
            error.add_note(f"{path.relative_to(ROOT)}, block at line {block.line}")
            raise


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def does_something(path: Path) -> bool:
    return PART.search(path.read_text("utf-8")) is not None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("page", list(filter(does_something, PAGES)), ids=name_of)
def test_a_page_does_what_it_says(
    page: Path, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk(page)


# ---- what else must be true of the pages


ROW = re.compile(r"^\| `luthier (.*?)` \| (.*?) \| .* \|$", re.M)


def test_refusals_are_worded_as_the_page_says(sandbox: Path) -> None:
    page = DOCS / "tasks/errors.md"
    walk(page)
    rows = ROW.findall(page.read_text("utf-8"))
    assert len(rows) > 15
    for words, found in rows:
        code, output = execute(["luthier", *shlex.split(words)])
        assert code == 2 and agrees(f"...{found}...", output), f"{words}\n{found}\n{output}"


def test_every_example_reads_and_runs(sandbox: Path) -> None:
    """What `luthier example` prints trains; predicting needs a trained adapter, and the lora run gives one."""
    for name in ("lora", "predict", "chat", "mixture", "text", "full", "evaluate", "lazy-stream"):
        code, config = execute(["luthier", "example", name])
        Path("run.yaml").write_text(config)
        quick = ["evaluate.max_new_tokens=2", "log.sinks=[]"]
        if name in ("lora", "chat", "full", "evaluate"):
            quick += ["train.epochs=1"]
        if name in ("mixture", "text", "lazy-stream"):
            quick += ["train.steps=2", "data.workers=0"]
        job = "predict" if name == "predict" else "finetune"
        code, output = execute(["luthier", job, "run.yaml", *quick])
        assert code == 0, f"{name}: {output}"


NOT_KEYS = {"adapter.rang"}  # shown as refused


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "architecture.md"], ids=name_of)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    """`section.key` in code spans and blocks; names of files are not keys."""
    text = page.read_text("utf-8")
    code = " ".join(re.findall(r"`[^`\n]+`|^```.*?^```$", text, re.S | re.M))
    sections = "|".join(SECTIONS)
    found = set(re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_0-9]+(?![\w/(])", code))
    endings = (".json", ".jsonl", ".yaml", ".md", ".py", ".safetensors", ".gguf")
    assert {k for k in found - set(KEYS) - NOT_KEYS if not k.endswith(endings)} == set()


def test_every_page_is_in_the_menu_and_every_link_leads_somewhere() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = sorted(_leaves(menu))
    assert listed == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if "://" in name:
                continue
            place = (page.parent / name) if name else page
            if not place.exists() or (anchor and anchor not in _anchors(place)):
                broken.append(f"{name_of(page)}: {target}")
    assert broken == []


def _leaves(menu: Any) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    else:
        for item in menu.values() if isinstance(menu, dict) else menu:
            yield from _leaves(item)


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Markdown's own `toc` makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}
