"""ReFT beyond the contract: positions, orthonormality, packing, generation of every kind, files, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import FAMILIES, METHODS, error, fill, options, run
from torch import Tensor

from luthier.adapters import (
    ReFT,
    adapter_parameters,
    adapters_of,
    attach,
    detach,
    load_adapter,
    retract,
    save_adapter,
)
from luthier.adapters.reft import orthonormal
from luthier.adapters.reft_places import find_positions
from luthier.batch import IGNORE, Batch, Layout, layout_scope
from luthier.errors import Failed, Refused
from luthier.models.generate import GenerateOptions, generate
from luthier.models.stage import Stage, decoder_layers

ROWS = [name for name, row in METHODS.items() if row.options["method"] == "reft"]
each_row = pytest.mark.parametrize("row", ROWS)
each_family = pytest.mark.parametrize("family", (*FAMILIES, "bloom"))
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [5, 6, 7]]


def edited(tiny_model: Any, row: str, family: str = "llama", **changes: Any) -> Any:
    model = tiny_model(family)
    attach(model, options(row, **changes), seed=1)
    fill(model, size=0.3)
    return model


def documents(*pieces: tuple[list[int], list[int]]) -> Batch:
    """One row of documents, each a prompt and its answer, of which all is supervised."""
    ids, labels, positions, numbers = [], [], [], []
    for number, (prompt, answer) in enumerate(pieces):
        tokens = prompt + answer
        shifted = [*tokens[1:], IGNORE]
        ids += tokens
        labels += [IGNORE] * (len(prompt) - 1) + shifted[len(prompt) - 1 :]
        positions += range(len(tokens))
        numbers += [number] * len(tokens)
    tensors = (torch.tensor([x]) for x in (ids, labels, positions, numbers))
    return Batch(*tensors, rows=(0,))


def test_positions_of_a_prompt() -> None:
    for positions, length, first, last in (
        ("f7+l7", 20, (0, 7), (13, 20)),
        ("f7+l7", 8, (0, 4), (4, 8)),
        ("f7+l7", 5, (0, 2), (3, 5)),
        ("f7+l2", 1, (0, 0), (1, 1)),
        ("f3", 9, (0, 3), (9, 9)),
        ("l3", 9, (0, 0), (6, 9)),
    ):
        assert find_positions(positions, length) == (range(*first), range(*last))


@each_row
def test_only_the_tokens_asked_for_change(tiny_model: Any, row: str) -> None:
    """One layer's output, on two packed documents of 7 + 3 and 2 + 4 tokens and padding."""
    model = edited(tiny_model, row, layers="0")
    batch = documents(
        ([3, 4, 5, 6, 7, 8, 9], [10, 11, 12]), ([13, 14], [15, 16, 17, 18]), ([0], [])
    )
    batch.document_ids[0, -1] = -1
    outputs = []
    for _ in range(2):
        seen: list[Tensor] = []
        handle = decoder_layers(model)[0].register_forward_hook(lambda *a, s=seen: s.append(a[2]))
        run(model, batch)
        handle.remove()
        outputs.append(seen[0])
        if adapters_of(model):
            detach(model)
    changed = (outputs[0] != outputs[1]).any(-1)[0].nonzero().flatten().tolist()
    assert (
        changed
        == {
            "reft": [0, 1, 2, 5, 6, 10, 11],
            "reft_tied": [0, 1, 4, 5, 6, 10, 11],
            "reft_direft": [4, 5, 6, 11],
            "reft_tiny_all": list(range(17)),
        }[row]
    )


def test_first_and_last_tokens_have_an_edit_each_or_one(tiny_model: Any) -> None:
    def names(**changes: Any) -> set[str]:
        model = tiny_model("llama")
        attach(model, options("reft", layers=(0,), **changes), seed=1)
        return {n.removeprefix("model.layers.0.adapter.") for n in adapter_parameters(model)}

    kinds = ("subspace", "source", "source_bias")
    assert names() == {f"{part}.{kind}" for part in ("first", "last") for kind in kinds}
    assert names(tied=True) == {f"both.{kind}" for kind in kinds}
    assert names(positions="f7") == {f"first.{kind}" for kind in kinds}
    assert names(positions="l7", add_bias=False) == {"last.subspace", "last.source"}
    assert names(positions="all", form="tiny") == {
        f"all.{kind}" for kind in ("down", "up", "down_scale", "up_scale")
    }


@each_row
@each_family
def test_packed_documents_are_edited_as_if_alone(tiny_model: Any, row: str, family: str) -> None:
    model = edited(tiny_model, row, family)
    pieces = [([3, 4, 5, 6, 7, 8], [9, 10]), ([11, 12, 13], [14]), ([15] * 9, [16, 17, 18])]
    packed = run(model, documents(*pieces))
    (packed * torch.linspace(-1, 1, packed.shape[1])[:, None]).sum().backward()
    grads = [p.grad for p in adapter_parameters(model).values()]
    model.zero_grad()
    start, weights = 0, torch.linspace(-1, 1, packed.shape[1])[:, None]
    for piece in pieces:
        alone = run(model, documents(piece))
        stop = start + alone.shape[1]
        assert error(packed[:, start:stop], alone) < 1e-6
        (alone * weights[start:stop]).sum().backward()
        start = stop
    for packed_grad, parameter in zip(grads, adapter_parameters(model).values(), strict=True):
        assert packed_grad is not None and parameter.grad is not None
        assert error(packed_grad, parameter.grad) < 1e-5  # sums of terms that partly cancel


@each_row
@each_family
@torch.no_grad()
def test_plain_calls_give_what_the_stage_gives(tiny_model: Any, row: str, family: str) -> None:
    """A prompt that is padded on either side, or given as embeddings, against the same one in a layout."""
    model = edited(tiny_model, row, family)
    long, short = list(range(3, 12)), list(range(20, 25))
    pad = [0] * 4
    ids = {"left": [long, pad + short], "right": [long, short + pad]}
    wanted = [run(model, documents((p, [])))[0] for p in (long, short)]
    for side, rows in ids.items():
        tokens = torch.tensor(rows)
        mask = (tokens > 0).long()
        # as `generate` makes them
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        embeddings = model.get_input_embeddings()(tokens)
        for given in ({"input_ids": tokens}, {"inputs_embeds": embeddings}):
            more = {} if family == "bloom" else {"position_ids": positions}
            logits = model(**given, attention_mask=mask, **more).logits
            own = slice(4, 9) if side == "left" else slice(0, 5)
            assert error(logits[0], wanted[0]) < 1e-6
            assert error(logits[1, own], wanted[1]) < 1e-6


@each_row
@each_family
def test_generation(tiny_model: Any, row: str, family: str) -> None:
    """Left-padded micro-batches with a cache, without one, and beams: as one prompt at a time in the stage."""
    model = edited(tiny_model, row, family)
    options = GenerateOptions(6)
    found = generate(model, PROMPTS, options, pad_id=0, stop_ids=(), micro_batch=3)
    stage, answers = Stage(model), []
    for prompt in PROMPTS:
        answer: list[int] = []
        with torch.no_grad():
            for _ in range(6):
                hidden = stage(documents((list(prompt), answer)))  # [1, S, D]
                answer.append(int(stage.head(hidden[0, -1:]).argmax()))
        answers.append(answer)
    assert found == answers
    detach(model)
    assert found != generate(model, PROMPTS, options, pad_id=0, stop_ids=(), micro_batch=3)


@each_row
@each_family
def test_generate_without_a_cache_gives_the_same(tiny_model: Any, row: str, family: str) -> None:
    model = edited(tiny_model, row, family)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
    given = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "pad_token_id": 0}
    for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        with_cache, without = (
            model.generate(ids, use_cache=cached, **given, **more) for cached in (True, False)
        )
        assert torch.equal(with_cache, without)


@each_row
def test_first_values_depend_on_seed_and_layer_alone(tiny_model: Any, row: str) -> None:
    def values(dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> dict[str, Any]:
        model = tiny_model("llama", dtype)
        attach(model, options(row, **changes), seed=seed)
        return {n: p.detach().float() for n, p in adapter_parameters(model).items()}

    first, other = values(), values(seed=2)
    for same in (values(torch.bfloat16), values(torch.float64), values(layers="1")):
        assert all(torch.equal(first[name], value) for name, value in same.items())
    drawn = {n: v for n, v in first.items() if not torch.equal(v, other[n])}
    assert all(v.unique().numel() == 1 for n, v in first.items() if n not in drawn)
    for kind in {n.rpartition(".")[2] for n in drawn}:  # no two edits begin alike
        alike = [v.flatten()[0].item() for n, v in drawn.items() if n.endswith(f".{kind}")]
        assert len(set(alike)) == len(alike) == 2 * (2 if row == "reft" else 1)


def test_a_batch_without_prompts_gives_gradients_of_zero(tiny_model: Any) -> None:
    """So that every micro-batch gives each parameter a gradient."""
    model = edited(tiny_model, "reft")
    run(model, documents(([3], [4, 5]), ([6], [7]))).square().mean().backward()
    for parameter in adapter_parameters(model).values():
        assert parameter.grad is not None and not parameter.grad.any()


@each_family
def test_the_first_tokens_edit_of_the_last_layer_may_idle(tiny_model: Any, family: str) -> None:
    """Answers are read from the last token of the prompt on: what the last layer gives before is not used."""
    model = edited(tiny_model, "reft", family)
    batch = documents((list(range(3, 13)), [13, 14]))
    supervised = batch.labels != IGNORE
    run(model, batch)[supervised].square().mean().backward()
    for path, adapter in adapters_of(model).items():
        idle = {n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
        assert idle == adapter.may_idle, path
    assert adapter.may_idle == {f"first.{n}" for n in ("subspace", "source", "source_bias")}


def test_r_stays_orthonormal(tiny_model: Any, random_batch: Any) -> None:
    model = tiny_model("llama")
    adapters = attach(model, options("reft"), seed=1)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.1)
    for step in range(5):
        run(model, random_batch(seed=step)).square().mean().backward()
        optimizer.step()
        bases = [
            a.get_parameter(f"{part}.subspace")
            for a in adapters.values()
            for part in ("first", "last")
        ]
        assert all(error(r.T @ r, torch.eye(4)) > 1e-2 for r in bases)
        retract(model)
        # rank x a few roundings
        assert all(error(r.T @ r, torch.eye(4)) < 1e-6 for r in bases)
        optimizer.zero_grad()


def test_other_forms_are_free(tiny_model: Any) -> None:
    for form in ("noreft", "direft", "tiny"):
        model = tiny_model("llama")
        attach(model, options("reft", form=form), seed=1)
        with torch.no_grad():
            values = [p.mul_(2).clone() for p in adapter_parameters(model).values()]
        retract(model)
        assert all(map(torch.equal, adapter_parameters(model).values(), values))


def test_orthonormal_keeps_the_span_and_what_is_orthonormal() -> None:
    draw = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = orthonormal(draw)
    assert error(q @ (q.T @ draw), draw) < 1e-14
    assert error(orthonormal(q), q) < 1e-14
    assert error(orthonormal(-q), -q) < 1e-14
    near = q + 1e-4 * draw  # moves no further than the step itself
    assert (orthonormal(near) - q).norm() < 1.5 * (near - q).norm()


@each_row
@pytest.mark.parametrize("act_fn", ["linear", "relu"])
def test_gradients_are_finite_differences(row: str, act_fn: str, tiny_model: Any) -> None:
    """Of a layer's edits in a layout; R as a free matrix."""
    tiny = METHODS[row].options.get("form") == "tiny"
    if tiny and act_fn == "relu":
        pytest.skip("tiny has no act")
    model = tiny_model("llama", torch.float64, hidden_size=8, intermediate_size=8)
    changes = {} if tiny else {"act_fn": act_fn}
    attach(model, options(row, rank=2, layers="0", **changes), seed=1)
    fill(model, size=0.5)
    (adapter,) = adapters_of(model).values()
    mine = list(adapter_parameters(model).values())
    h = torch.randn(
        1, 9, 8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1)
    )
    batch = documents(([3] * 5, [4]), ([5] * 2, [6]))
    with layout_scope(Layout.of(batch)):
        assert torch.autograd.gradcheck(lambda h, *_: adapter.after(h, h), (h, *mine))


def test_the_first_output_with_relu(tiny_model: Any, random_batch: Any) -> None:
    """Unchanged where a form allows it; loreft takes away what relu cuts off of R^T h, and no more."""
    for form in ("direft", "noreft", "loreft"):
        model, batch = tiny_model("llama"), random_batch()
        before = run(model, batch)
        adapters = attach(model, options("reft", form=form, act_fn="relu"), seed=1)
        after = run(model, batch)
        assert torch.equal(after, before) == (form != "loreft")
        after.square().mean().backward()
        for adapter in adapters.values():
            zero = {n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
            assert zero == adapter.zero_at_start
    edit = next(iter(adapters.values())).get_submodule("first")
    h = torch.randn(5, 64)
    low = h @ edit.get_parameter("subspace")
    wanted = -low.clamp_max(0) @ edit.get_parameter("subspace").T
    assert error(edit(h), wanted) < 1e-5


def test_small_edits_survive_half_precision(tiny_model: Any) -> None:
    """W h and R^T h are nearly the same at the start: their difference is taken before any product."""
    model = tiny_model("llama", torch.bfloat16)
    attach(model, options("reft"), seed=1)
    fill(model, size=1e-4)
    edit = next(iter(adapters_of(model).values())).get_submodule("first")
    h = torch.randn(100, 64).bfloat16()
    assert (
        error(edit(h), edit(h.float())) < 2**-7
    )  # two products, each rounded to 2^-9, and R to 2^-9


def test_dropout_is_of_the_edited_tokens_alone(tiny_model: Any) -> None:
    model = edited(tiny_model, "reft", dropout=0.5, layers="0")
    batch = documents(([3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13]))
    adapter = next(iter(adapters_of(model).values()))
    h = torch.randn(1, 11, 64)
    with layout_scope(Layout.of(batch)):
        plain = adapter.after(h, h)
        model.train()
        dropped = adapter.after(h, h)
    places = [0, 1, 2, 7, 8]
    others = [i for i in range(11) if i not in places]
    assert torch.equal(dropped[:, others], h[:, others])
    kept = dropped[:, places] != 0
    torch.testing.assert_close(dropped[:, places][kept], 2 * plain[:, places][kept])
    assert 0.4 < kept.float().mean() < 0.6


def test_what_is_written_is_enough_without_our_own_facts(
    tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    for number, row in enumerate(ROWS):
        folder = tmp_path / str(number)
        wanted = options(row, layers="1", dropout=0.25)
        model, batch = edited(tiny_model, row, layers="1", dropout=0.25), random_batch()
        save_adapter(model, folder, wanted, "base", None)
        fields = json.loads((folder / "adapter_config.json").read_text())
        assert fields["peft_type"] == "LUTHIER_REFT"
        (folder / "luthier.json").unlink()
        again = tiny_model("llama")
        loaded = load_adapter(again, folder, trainable=True)
        assert torch.equal(run(again, batch), run(model, batch))
        assert loaded.config.model_copy(update={"form": wanted.form_}) == wanted.model_copy(
            update={"form": wanted.form_}
        )
        fields["rank"] = 0
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        with pytest.raises(Refused, match="no options of ReFT"):
            load_adapter(tiny_model("llama"), folder)


def test_a_copy_generates_on_its_own(tiny_model: Any) -> None:
    model = edited(tiny_model, "reft")
    fill(model, seed=1, size=1.0)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    before = model.generate(ids, **given)
    twin = copy.deepcopy(model)
    detach(model)
    assert torch.equal(twin.generate(ids, **given), before)
    assert not torch.equal(model.generate(ids, **given), before)
    detach(twin)
    for each in (model, twin):
        assert "generate" not in vars(each)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())


def test_a_layer_alone_is_refused(tiny_model: Any) -> None:
    model = edited(tiny_model, "reft")
    adapter = adapters_of(model)["model.layers.0"]
    h = torch.randn(1, 4, 64)
    with pytest.raises(Failed, match="outside of a forward of its model"):
        adapter.after(h, h)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 65}, "adapter.rank=65. hidden states have 64 dimensions"),
        ({"layers": "0-2"}, "layer 2. the model has 2 decoder layers"),
        ({"alpha": 16}, "adapter.alpha=16"),
        ({"targets": "q_proj"}, "adapter.targets=q_proj"),
        ({"form": "tiny", "act_fn": "relu"}, "adapter.act_fn=relu with adapter.form=tiny"),
        ({"form": "tiny", "add_bias": False}, "adapter.add_bias=False with adapter.form=tiny"),
    ],
)
def test_bad_options_are_refused(tiny_model: Any, changes: dict[str, Any], match: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(Refused, match=match):
        attach(model, options("reft", **changes), seed=1)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_positions_beyond_the_length_are_refused() -> None:
    for positions in ("f9", "l9", "f1+l9"):
        config = options("reft", positions=positions)
        with pytest.raises(Refused, match=r"prompts have 8 tokens at most \(data.length\)"):
            ReFT.check_length(config, 8, None)
        ReFT.check_length(config, 9, None)
    ReFT.check_length(options("reft", positions="all"), 1, None)
