"""The speed benchmark's own logic: turns, absent and failing peers, rows given to peers, tables, the GPU script."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.speed import __main__ as speed
from benchmarks.speed import bare, contest, gpu, jobs, peers, shapes, table, workload
from benchmarks.speed.runners import watch
from luthier.batch import IGNORE, Batch

ROOT = Path(__file__).resolve().parents[2]
WORK = workload.Work(
    {"words": ["run.json", "a=1"], "batch": 1, "micro_batch": 1}, [100, 100], [60, 60], 2e9, 0.0
)


def turn(seconds: float, tokens: int = 100, supervised: int = 60) -> dict[str, Any]:
    step = {"seconds": seconds, "compute": seconds, "loss": 1.5}
    step |= {"tokens": tokens, "slots": 2 * tokens, "supervised": supervised}
    return {"steps": [step, step], "first": 3.0, "memory_loaded": 10**9, "memory_peak": 2 * 10**9,
            "versions": {"torch": "x"}}  # fmt: skip


def place(name: str, python: str | None = "python", absent: str | None = None) -> contest.Place:
    return contest.Place(peers.Contestant(name, "run", None, "about"), python, absent)


def hold(held: list[contest.Place], repeats: int, runner: Any, tmp_path: Path) -> list[Any]:
    rate = iter(range(1, 99))
    return contest.hold(
        held,
        WORK,
        "lora",
        tmp_path,
        repeats=repeats,
        limit=1,
        rate=lambda: {"all": float(next(rate))},
        say=lambda text: None,
        runner=runner,
    )


# ---- turns


def test_every_other_turn_goes_the_other_way_round(tmp_path: Path) -> None:
    seen: list[str] = []

    def runner(contestant: peers.Contestant, *args: Any) -> dict[str, Any]:
        seen.append(contestant.name)
        return turn(1.0)

    held = [place("luthier"), place("b"), place("gone", None, "why"), place("c")]
    rates = hold(held, 3, runner, tmp_path)
    assert seen == ["luthier", "b", "c", "c", "b", "luthier", "luthier", "b", "c"]
    assert [rate["all"] for rate in rates] == [1.0, 2.0, 3.0]  # measured in every turn
    assert [len(p.turns) for p in held] == [3, 3, 0, 3]


def test_a_contestant_that_failed_is_listed_and_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def runner(contestant: peers.Contestant, *args: Any) -> dict[str, Any]:
        calls.append(contestant.name)
        return {"failed": "exit 1: no memory"} if contestant.name == "b" else turn(1.0)

    held = [place("luthier"), place("b")]
    rates = hold(held, 3, runner, tmp_path)
    assert calls == ["luthier", "b", "luthier", "luthier"]
    rows = contest.summary(held, WORK, rates, 1)
    assert rows[1]["failed"] == "exit 1: no memory"
    assert "tokens_per_second" in rows[0]


def test_a_run_gets_its_overrides_its_own_folder_and_the_time_of_its_start(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []

    def runner(contestant: Any, python: Any, job: dict[str, Any], limit: Any) -> dict[str, Any]:
        jobs.append(job)
        return turn(1.0)

    way = peers.Contestant("luthier, other", "run", None, "", {"overrides": ["train.compile=true"]})
    hold([contest.Place(way, "python")], 2, runner, tmp_path)
    assert jobs[0]["config"][:3] == ["run.json", "a=1", "train.compile=true"]
    assert jobs[0]["work"] != jobs[1]["work"]
    assert jobs[0]["started"] < jobs[1]["started"]


# ---- who is there


def test_absent_peers_are_listed_with_what_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUTHIER_PEER_TRL", raising=False)
    found = {p.contestant.name: p for p in contest.places(peers.CONTESTANTS, {}, tmp_path, False)}
    assert found["luthier"].python == sys.executable
    assert found["TRL, best"].python is None
    assert "--setup FOLDER --only-peers trl" in (found["TRL, best"].absent or "")
    assert found["Unsloth"].absent == "it needs a GPU"
    assert set(found) == {c.name for c in peers.CONTESTANTS}  # nobody is left out


def test_a_peer_is_found_by_argument_by_variable_and_by_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "trl" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.touch()
    monkeypatch.delenv("LUTHIER_PEER_TRL", raising=False)
    assert peers.python_of("trl", {}, tmp_path)[0] == str(made)
    monkeypatch.setenv("LUTHIER_PEER_TRL", sys.executable)
    assert peers.python_of("trl", {}, tmp_path)[0] == sys.executable
    assert peers.python_of("trl", {"trl": str(made)}, None)[0] == str(made)
    assert peers.python_of("trl", {"trl": "/nowhere/python"}, None)[0] is None
    with pytest.raises(SystemExit, match="known environments"):
        peers.python_words(["tlr=python"])


def test_an_environment_without_its_package_is_said_to_be_so() -> None:
    assert "torchtune is not installed" in (peers.broken(sys.executable, "torchtune") or "")


def test_only_luthier_sees_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    theirs = peers.environment_of({"threads": 2, "contestant": "TRL, best"})
    assert "PYTHONPATH" not in theirs
    assert theirs["OMP_NUM_THREADS"] == "2"
    ours = peers.environment_of({"threads": 2, "contestant": "luthier, compiled"})
    assert ours["PYTHONPATH"] == str(ROOT)


def test_a_way_may_have_variables_of_its_own() -> None:
    """Words in capitals behind `--also` are of the process, all others of the config."""
    args = speed.parse(["--also", "plain:LUTHIER_NATIVE=0,train.compile=true"])
    (way,) = (c for c in jobs.chosen(args, "lora") if c.name == "luthier, plain")
    assert way.options["overrides"] == ["train.compile=true"]
    (alone,) = (c for c in jobs.chosen(args, "lora") if c.name == "luthier, torch alone")
    for options in (way.options, alone.options):
        found = peers.environment_of({"threads": 2, "contestant": "luthier", "options": options})
        assert found["LUTHIER_NATIVE"] == "0"


def test_a_runner_that_dies_or_hangs_is_a_failure_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "RUNNERS", tmp_path)
    (tmp_path / "dies.py").write_text("raise SystemExit('no such model')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    job = {"work": str(tmp_path / "w"), "result": str(tmp_path / "r"), "threads": 1}
    job["contestant"] = "x"
    dies = peers.run(peers.Contestant("x", "dies", None, ""), sys.executable, job, 30)
    assert dies["failed"] == "exit 1: no such model"
    hangs = peers.run(peers.Contestant("x", "hangs", None, ""), sys.executable, job, 0.5)
    assert "more than" in hangs["failed"]


# ---- figures


def test_summary_compares_within_a_turn_and_gives_the_share_of_the_limit(tmp_path: Path) -> None:
    held = [place("luthier"), place("b")]
    held[0].turns = [turn(1.0), turn(2.0)]
    held[1].turns = [turn(4.0), turn(4.0, supervised=50)]
    rates = [{"all": 4.0}, {"all": 2.0}]  # GFLOP/s; a step needs 2
    first, second = contest.summary(held, WORK, rates, 1)
    assert first["tokens_per_second"] == {"median": 75.0, "min": 50.0, "max": 100.0}
    assert second["luthier_is_faster_by"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert first["share_of_product_limit"]["median"] == 0.5
    assert first["padding_share"] == 0.5
    assert first["same_rows"] and not second["same_rows"]  # other supervised tokens


def test_the_page_lists_absent_and_failed_ones_and_says_whose_rows() -> None:
    held = [place("luthier"), place("b"), place("c", None, "not installed; install: x")]
    held[0].turns, held[1].turns = [turn(1.0)], [turn(4.0, supervised=50)]
    job = {"job": "lora", "model": "m", "length": 2048, "batch": 1, "rates": [{"all": 4.0}]}
    job |= {"tokens_per_step": [100, 100], "flops_per_step": 2e9}
    job["table"] = contest.summary(held, WORK, job["rates"], 1)
    job["table"].append({"contestant": "d", "failed": "exit 1: a | b"})
    found = {"jobs": [job], "config": {"dtype": "bfloat16", "steps": 2, "warm": 1}}
    found |= {"versions": {"torch": "2", "transformers": "5"}, "commit": "c" * 40, "device": "cpu"}
    page = table.page(found, "cpu.json")
    assert "| luthier | 100 | 1.00 | 50% | 1.00 | 2.00 (1.00) | 3.0 | 1.500 |" in page
    assert "| b | 25 | 4.00 | 12% | 4.00 | 2.00 (1.00) | 3.0 | 1.500 (its own rows) |" in page
    assert "| c | absent: not installed; install: x |" in page
    assert "| d | failed: exit 1: a / b |" in page
    assert "would make 200 tokens/s" in page


def test_flops_are_those_that_torch_counts(tiny_model: Callable[..., Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama")
    ids = torch.arange(24)[None] + 3
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    shape = workload.Shape.of(model.config)
    products = shape.flops(24, 24, frozen=True) / 2  # forward alone
    scores = (
        4 * 24 * 24 * shape.heads * shape.head_dim * shape.layers
    )  # eager does not leave half out
    rotary = counter.get_total_flops() - products - scores
    assert 0 <= rotary < 0.01 * products
    assert shape.flops(24, 24, frozen=False) == 3 * products
    assert gpu.flops_per_token(gpu.TINY, "full") * 7 == pytest.approx(
        workload.Shape.of(gpu.LlamaConfig(**gpu.TINY)).flops(7, 7, frozen=False)
    )


# ---- what peers are given


def made(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, *overrides: str) -> workload.Work:
    from luthier.models.load import save_model

    save_model(tiny_model("llama"), tmp_path / "model", tiny_tokenizer())
    rows = [
        {"messages": [{"role": "user", "content": f"say {i} " + "la " * (i % 7)},
                      {"role": "assistant", "content": f"{i} it is"}]}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    numbers = {"length": 128, "batch": 2, "micro_batch": 1, "steps": 3, "rank": 4, "lr": 1e-3}
    words = {"dtype": "float32", "device": "cpu", "seed": 1, "threads": 1, "quantize": None}
    return workload.make(tmp_path / "made", "lora", {**settings, **numbers, **words}, overrides)


@pytest.fixture
def job(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> workload.Work:
    return made(tmp_path, tiny_model, tiny_tokenizer)


def test_work_is_that_of_the_layers_which_are_trained(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    whole = made(tmp_path, tiny_model, tiny_tokenizer)
    one = made(tmp_path, tiny_model, tiny_tokenizer, "model.num_layers=1")
    assert one.attention_flops == pytest.approx(whole.attention_flops / 2)
    assert one.flops < whole.flops


def test_peers_get_the_very_rows_with_labels_as_they_expect_them(job: workload.Work) -> None:
    rows = watch.rows(job.job)
    assert len(rows) == 6
    assert [len(step) for step in watch.steps(job.job)] == [2, 2, 2]
    for row in rows:
        assert sum(row["lengths"]) == len(row["ids"]) <= 128
        assert len(row["lengths"]) > 1
        for ids, label in zip(row["ids"], row["labels"], strict=True):
            assert label in (ids, IGNORE)  # not shifted
        starts = [sum(row["lengths"][:d]) for d in range(len(row["lengths"]))]
        assert all(row["labels"][s] == IGNORE for s in starts)  # no document predicts the next
    counts = [watch.counts(step) for step in watch.steps(job.job)]
    assert counts == list(zip(job.tokens, job.supervised, strict=True))
    documents = watch.conversations(job.job)
    assert len(documents) == sum(len(row["lengths"]) for row in rows)
    assert documents[0][0]["role"] == "user"


def test_labels_are_unshifted_within_documents_and_padding_is_left_out() -> None:
    batch = Batch(
        torch.tensor([[5, 6, 7, 8, 9, 0]]),
        torch.tensor([[6, 7, IGNORE, 9, IGNORE, IGNORE]]),
        torch.tensor([[0, 1, 2, 0, 1, 0]]),
        torch.tensor([[0, 0, 0, 1, 1, -1]]),
        (0,),
    )
    (row,) = workload.unpack(batch)
    assert row == {"ids": [5, 6, 7, 8, 9], "labels": [IGNORE, 6, 7, IGNORE, 9], "lengths": [3, 2]}


def test_long_documents_fit_with_their_end(job: workload.Work) -> None:
    folder = Path(job.job["model"]).parent
    words = ["--model", job.job["model"], "--data", str(folder / "rows.jsonl"), "--length", "128"]
    pool = shapes.token_pool(speed.parse(words), 4096)
    tokenizer = AutoTokenizer.from_pretrained(job.job["model"])
    for number in range(3):
        ids = tokenizer(pool(number, 2048), add_special_tokens=False)["input_ids"]
        assert 1900 < len(ids) < 2048


@pytest.mark.long
def test_luthier_and_plain_transformers_start_from_the_same_loss(
    job: workload.Work, tmp_path: Path
) -> None:
    held = [
        contest.own(c) for c in peers.CONTESTANTS if c.name in ("luthier", "transformers + PEFT")
    ]
    rates = contest.hold(
        held, job, "lora", tmp_path, repeats=1, limit=300,
        rate=lambda: {"all": 1.0}, say=print,
    )  # fmt: skip
    ours, theirs = contest.summary(held, job, rates, 1)
    assert ours["same_rows"] and theirs["same_rows"]
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-5)
    assert ours["losses"][2] != ours["losses"][0]
    assert ours["memory_peak"] >= ours["memory_loaded"] > 0
    assert 0 < ours["first_step_after"]["median"] < 300


# ---- the GPU script


def test_the_gpu_script_runs_every_kind_of_case_at_tiny_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(tmp_path / "gpu.json", tiny=True, quantize=None) == 0
    assert not (tmp_path / "gpu.json").exists()  # a CPU's figures are none of a GPU's
    head, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    page = table.page(
        {**head, "table": [*rows, {**rows[2], "failed": "out of memory"}]}, "gpu.json"
    )
    assert "| lora, 1 x 256, recompute layer | " in page
    assert "| lora, 2 x 256 | out of memory | | |" in page
    assert page.count(" ms (") == 2
    assert [row["kind"] for row in rows] == ["head", "head", "step", "step", "step"]
    assert not [row for row in rows if "failed" in row]
    plain, recomputed, full = rows[2:]
    assert plain["tokens_per_step"] > 0.9 * 512
    assert plain["mfu"] is None  # no peak is known of this device
    assert recomputed["losses"][0] == pytest.approx(full["losses"][0], rel=1e-3)


def test_the_gpu_script_says_so_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(tmp_path / "gpu.json", tiny=False, quantize=None) == 2
    assert "no figure" in capsys.readouterr().out


def test_a_case_that_breaks_does_not_cost_the_others() -> None:
    def memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError

    assert gpu.attempt(memory) == {"failed": "out of memory"}
    assert gpu.attempt(lambda: {"a": 1}) == {"a": 1}
    assert "KeyError" in gpu.attempt(lambda: {}["x"])["failed"]


def test_rows_of_the_gpu_script_are_full_and_documents_stay_apart() -> None:
    (first, *_) = gpu.rows(gpu.Case("lora", 512, 2), 100, 3)
    real = first.document_ids >= 0
    assert float(real.float().mean()) > 0.95
    assert int((first.position_ids == 0)[real].sum()) == gpu.num_documents(first) > 2
    last = real & (first.document_ids != first.document_ids.roll(-1, 1))
    assert bool((first.labels[last] == IGNORE).all())
    answered = first.labels != IGNORE
    assert torch.equal(first.labels[answered], first.input_ids.roll(-1, 1)[answered])


@pytest.mark.long
def test_the_gpu_script_runs_without_pydantic() -> None:
    """In the bare environment of the GPU machine: torch, transformers and this checkout."""
    code = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):  # absent to imports and to those who look for a package, as if never installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("pydantic", "pydantic_core", "peft", "rich", "tensorboard")
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv = ["speed", "--gpu", "--tiny"]
import runpy
runpy.run_module("benchmarks.speed", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-2000:]
    assert rows[0]["pydantic"] is False
    assert not [row for row in rows if "failed" in row]


def test_the_stand_in_for_pydantic_keeps_defaults_and_refuses_unknown_names() -> None:
    class Base(bare.BaseModel):
        a: int = bare.field(1, ge=0)
        b: dict[str, int] = bare.field(default_factory=dict)

    class Derived(Base):
        c: str

    made: Any = Derived(c="x", a=2)
    assert (made.a, made.b, made.c, made.model_fields_set) == (2, {}, "x", {"a", "c"})
    assert Derived.model_fields["a"].get_default() == 1
    assert made.model_copy({"a": 3}).c == "x"
    with pytest.raises(TypeError, match="has no d"):
        Base(d=1)
    assert bare.stand_in() is False  # pydantic is here
