"""PoSE in a run: positions skip up to the window in training alone, whatever reads the rows."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from tiny_runs import resolved, rows_, tiny_config, write_data, write_rows

from luthier.assemble import build, evaluation_rows, open_data, open_text
from luthier.batch import IGNORE, Layout
from luthier.data.pose import paddlenlp
from luthier.errors import Failed, Refused
from luthier.models.stage import Stage
from luthier.recipes import finetune
from luthier.train.gates import check_batch
from luthier.verify.data import verify_data
from luthier.verify.packing import verify_packing

LENGTH, WINDOW = 48, 200
POSE = {"data__length": LENGTH, "data__pose": "paper", "data__pose_window": WINDOW}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Short and long texts, and a dev part."""
    folder = tmp_path_factory.mktemp("texts")
    words = [" ".join(f"word{(7 * i + k) % 90}" for k in range(4 + 9 * (i % 8))) for i in range(24)]
    write_rows(folder / "train.json", [{"text": w} for w in words])
    write_rows(folder / "dev.json", [{"text": w} for w in words[:5]])
    return folder


@pytest.fixture
def opened(model_folder, tmp_path):
    """Opens the data of a run on `folder`; closes the loaders."""
    loaders = []

    def make(folder, **keys):
        tree = tiny_config(model_folder("llama"), folder, tmp_path / "out", **{**POSE, **keys})
        config = resolved(tree).config
        text = open_text(config)
        data = open_data(config, text)
        loaders.append(data.loader)
        return config, text, data

    yield make
    for loader in loaders:
        loader.close()


def documents(batches):
    """(ids, labels, positions) of every document, as lists."""
    for batch in batches:
        for s in Layout.of(batch).segments:
            tensors = (batch.input_ids, batch.labels, batch.position_ids)
            yield tuple(t[s.row, s.start : s.stop].tolist() for t in tensors)


def epoch(data):
    return [b for step in islice(data.loader.step_batches(), 6) for b in step]


@pytest.mark.parametrize("form", ["paper", "paddlenlp"])
def test_positions_rise_below_the_window(form, texts, opened):
    _, _, data = opened(texts, data__pose=form)
    batches = epoch(data)
    for batch in batches:
        check_batch(batch, skips=True)
    assert any(len(Layout.of(b).segments) > len(b.rows) for b in batches)  # packed
    jumps = []
    for _, labels, positions in documents(batches):
        steps = np.diff(positions)
        assert positions[0] == 0 and positions[-1] < WINDOW and len(positions) <= LENGTH
        assert (steps >= 1).all() and (steps > 1).sum() <= 1  # two chunks
        jumps += [*steps[steps > 1]]
        if form == "paddlenlp":
            assert all(labels[i] == IGNORE for i in np.flatnonzero(steps > 1))
    assert len(jumps) > 5 and max(jumps) > LENGTH
    with pytest.raises(Failed, match="positions do not run"):
        for batch in batches:
            check_batch(batch)


def test_paddlenlps_rows_are_those_of_the_function(texts, opened):
    """Every token stands at its own place in its text."""
    _, text, data = opened(texts, data__pose="paddlenlp")
    encoder = data.train.encoder
    for index in range(24):
        (example,) = encoder.outcome(index).examples
        (message,) = encoder.messages(index)
        tokens = text.renderer.tokens
        whole = [*tokens.opening, *tokens.ended(message.text)]
        assert example.input_ids.tolist() == [whole[i] for i in example.positions]


def test_a_text_that_fits_keeps_its_positions_in_paddlenlps_form():
    ids, labels, places = paddlenlp([5, 6, 7], 8, [2], lambda low, high: low)
    assert (ids, labels, places) == ([5, 6, 7], [6, 7, 2], [0, 1, 2])


def test_the_window_bounds_paddlenlps_positions():
    """Its own code reads beyond its tables in a long text."""
    _, _, places = paddlenlp(range(900), 8, [2], lambda low, high: high, window=32)
    assert max(places) == 31
    assert max(paddlenlp(range(900), 8, [2], lambda low, high: high)[2]) == 898


@pytest.mark.parametrize("keys", [{"data__workers": 2}, {"data__lazy": True}], ids=str)
def test_neither_workers_nor_laziness_decide(keys, texts, opened):
    """Documents of the first epoch, alone in their rows, are those that each row gives by itself."""
    data = opened(texts, data__packing="none", **keys)[2]
    found = list(documents(epoch(data)))
    assert len(found) == 24
    assert sorted(found) == sorted(all_documents(opened, texts))


def all_documents(opened, texts):
    encoder = opened(texts)[2].train.encoder
    for index in range(24):
        for e in encoder.outcome(index).examples:
            yield e.input_ids.tolist(), e.labels.tolist(), e.positions.tolist()


def test_the_seed_decides(texts, opened):
    one, other = (list(all_documents(opened, texts)) for _ in range(2))
    assert one == other
    encoder = opened(texts, train__seed=43)[2].train.encoder
    places = [encoder.outcome(i).examples[0].positions.tolist() for i in range(24)]
    assert places != [positions for _, _, positions in one]


def test_conversations_skip_too_and_lose_nothing(opened, tmp_path):
    """What is trained is the same tokens as without."""
    folder = write_data(tmp_path / "chat")
    pose = opened(folder, data__length=128)[2]
    plain = opened(folder, data__length=128, data__pose="off", data__pose_window=None)[2]
    for i in range(24):
        a, b = (d.train.encoder.outcome(i).examples[0] for d in (pose, plain))
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        assert b.positions is None and a.positions[-1] >= len(a.input_ids) - 1


def test_evaluation_knows_nothing_of_it(texts, opened):
    config, text, data = opened(texts)
    for batch in evaluation_rows(config, text, data.dev):
        check_batch(batch)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_packed_is_alone(family, texts, opened, tiny_model, relative):
    """Hidden states against plain calls with the same positions; a window counts tokens, not positions."""
    _, _, data = opened(texts)
    model = tiny_model(family)
    stage, plain = Stage(model), tiny_model(family, attention="sdpa").base_model
    batch = next(data.loader.step_batches())[0]
    with torch.no_grad():
        hidden = stage(batch)
        for s in Layout.of(batch).segments:
            ids, places = (
                t[s.row, s.start : s.stop][None] for t in (batch.input_ids, batch.position_ids)
            )
            mask = torch.ones_like(ids)  # else transformers takes a jump for a border
            out = plain(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False)
            assert relative(hidden[s.row, s.start : s.stop], out[0][0]) < 2e-6


def test_a_run_resumes_with_the_same_positions(texts, model_folder, tmp_path):
    """Stopped after two of four steps and gone on: the same weights, bit for bit."""
    from safetensors.torch import load_file

    def run(name, **keys):
        tree = tiny_config(model_folder("llama"), texts, tmp_path / name, **{**POSE, **keys})
        finetune(tree)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    keys = {"checkpoint__every": 2, "evaluate__every": "never", "optim__schedule": "constant"}
    whole = run("whole", train__steps=4, **keys)
    run("cut", train__steps=2, **keys)
    again = run("cut", train__steps=4, checkpoint__resume="auto", **keys)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_verify_proves_such_runs(texts, model_folder, tmp_path):
    tree = tiny_config(model_folder("llama"), texts, tmp_path / "out", **POSE)
    verify_data(resolved(tree))
    verify_packing(resolved(tree))


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("llama", {"data__pose_window": None}, "needs data.pose_window"),
        ("llama", {"data__pose_window": 20}, "at least data.length=48"),
        ("llama", {"data__pose": None}, "pose_window has no meaning"),
        (
            "llama",
            {"data__pose_window": 1024},
            r"256 positions.*type=yarn model.rope_scaling.factor=4",
        ),
        ("llama", {"data__pose": "paddlenlp", "data__overlong": "split"}, "overlong=cut"),
        ("gpt2", {"data__pose_window": 1024}, "256 positions.*rotary positions only"),
        ("bloom", {}, "'bloom'. it has ALiBi"),
    ],
)
def test_what_means_nothing_is_refused(family, keys, words, texts, model_folder, tmp_path):
    tree = tiny_config(model_folder(family), texts, tmp_path / "out", **{**POSE, **keys})
    with pytest.raises(Refused, match=words):
        open_text(resolved(tree).config)


def test_paddlenlps_form_wants_texts(opened, tmp_path):
    folder = tmp_path / "chat"
    write_rows(folder / "train.json", rows_(8))
    with pytest.raises(Refused, match="rows of the format messages"):
        opened(folder, data__pose="paddlenlp", evaluate__every="never")


def test_off_may_be_written_as_yaml_reads_it(model_folder, texts, tmp_path):
    tree = tiny_config(model_folder("llama"), texts, tmp_path, data__pose=False)
    assert resolved(tree).config.data.pose == "off"


def test_a_stretched_run_reaches_the_window(texts, model_folder, tmp_path):
    """PoSE with YaRN, as it is used: the window is that of the stretched positions."""
    keys = {**POSE, "data__pose_window": 1024}
    keys["model__rope_scaling"] = {"type": "yarn", "factor": 4}
    tree = tiny_config(model_folder("llama"), texts, tmp_path / "out", **keys)
    finetune(tree)
    build(resolved(tree).config, train=False)
