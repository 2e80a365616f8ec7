"""Packed rows mean what their documents mean alone, for every family: hidden states, logits, loss, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from luthier import seeding
from luthier.batch import IGNORE, PADDING, Layout
from luthier.errors import Failed, Refused
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.families import Family
from luthier.models.recompute import _ATTENTION, compile_layers, set_recompute
from luthier.models.stage import Stage, check_stage

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom")
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]  # rows of 15, so the second one has padding
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def _gradients(model):
    """Name -> gradient; without those that are zero by mathematics, where only rounding is left.

    The softmax does not see a shift of all scores of a query, so OPT's bias of the keys has no gradient.
    """
    zero = "k_proj.bias" if model.config.model_type == "opt" else "nothing"
    found = {n: p.grad for n, p in model.named_parameters() if zero not in n}
    assert all(g is not None for g in found.values())
    return found


def _loss(stage, batch):
    """Summed cross entropy over the supervised positions."""
    hidden = stage(batch)
    keep = batch.labels != IGNORE
    return hidden, F.cross_entropy(stage.head(hidden[keep]), batch.labels[keep], reduction="sum")


def _alone(model, batch):
    """(Segment, hidden states, logits) of each document in a plain call of its own."""
    for s in Layout.of(batch).segments:
        ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        yield s, out.hidden_states[-1][0], out.logits[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family, dtype, tiny_model, random_batch, relative, monkeypatch):
    if dtype == torch.float64:
        # some norms (gemma2) compute in float32 whatever they are given; here they shall not
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model, other = tiny_model(family, dtype), tiny_model(family, dtype)
    stage = Stage(model)
    hidden, loss = _loss(stage, batch)
    loss.backward()
    total = torch.zeros((), dtype=dtype)
    for s, alone, logits in _alone(other, batch):
        mine = hidden[s.row, s.start : s.stop]
        assert relative(mine, alone) < TOLERANCE[dtype]
        assert relative(stage.head(mine), logits) < TOLERANCE[dtype]
        labels = batch.labels[s.row, s.start : s.stop]
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    total.backward()
    assert relative(loss, total) < TOLERANCE[dtype]
    reference = _gradients(other)
    for name, gradient in _gradients(model).items():
        assert relative(gradient, reference[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_rows_of_plain_transformers(family, tiny_model, random_batch, relative):
    """Against transformers' eager attention, padding mask and own loss.

    With `math`, which multiplies what eager attention multiplies: in float32 each of the two is about 1e-6
    off the exact gradients, and another kernel adds its own rounding. `test_attention` ties the kernels
    to `math` in float64.
    """
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model, plain = tiny_model(family), tiny_model(family, attention="eager")
    install(model, "math")
    hidden, loss = _loss(Stage(model), batch)
    loss.backward()
    segments = Layout.of(batch).segments
    width = max(s.stop - s.start for s in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, s in enumerate(segments):
        length = s.stop - s.start
        ids[i, :length] = batch.input_ids[s.row, s.start : s.stop]
        # transformers shifts labels itself
        labels[i, 1:length] = batch.labels[s.row, s.start : s.stop - 1]
        mask[i, :length] = 1
    out = plain(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    (out.loss * batch.num_supervised).backward()
    assert relative(loss, out.loss * batch.num_supervised) < 1e-6
    stage = Stage(model)
    for i, s in enumerate(segments):
        logits = stage.head(hidden[s.row, s.start : s.stop])
        assert relative(logits, out.logits[i, : s.stop - s.start]) < 1e-6
    reference = _gradients(plain)
    for name, gradient in _gradients(model).items():
        assert relative(gradient, reference[name]) < 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_see_each_other_bitwise(family, tiny_model, random_batch):
    """Changing one document (or padding) leaves every bit of the others, forward and backward."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model = tiny_model(family)
    stage = Stage(model)

    def run(ids):
        embedded = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: embedded.append(out.requires_grad_().retain_grad() or out)
        )
        hidden = stage(replace(batch, input_ids=ids))
        hook.remove()
        real = batch.document_ids != PADDING
        hidden.masked_fill(~real[..., None], 0).sin().sum().backward()
        return hidden.detach(), embedded[0].grad

    before = run(batch.input_ids)
    for row, document in ((0, 0), (0, 1), (1, 1), (1, PADDING), (2, 0)):
        here = torch.zeros_like(batch.document_ids, dtype=torch.bool)
        here[row] = batch.document_ids[row] == document
        changed = batch.input_ids.clone()
        changed[here] = (changed[here] + 17) % 300 + 3
        for old, new in zip(before, run(changed), strict=True):
            assert torch.equal(old[~here], new[~here])
            assert document == PADDING or not torch.equal(old[here], new[here])


@pytest.mark.parametrize("kernel", ["math", "sdpa", "flex"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt", "bloom"])
def test_every_cpu_kernel_leaves_padding_finite(family, kernel, tiny_model, random_batch):
    model = tiny_model(family)
    install(model, kernel)
    with torch.no_grad():
        assert Stage(model)(random_batch(lengths_per_row=[[3], [16]])).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_no_bit(family, tiny_model, random_batch):
    """With dropout: a recomputed layer must find the layout, and drop the same units."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    found = {}
    for mode in ("none", "layer", "selective"):
        model = tiny_model(family, dropout=0.2)
        seed_dropout(model, 7)
        stage = Stage(model).train()
        set_recompute(stage, mode)
        hidden, loss = _loss(stage, batch)
        loss.backward()
        found[mode] = {"hidden": hidden.detach(), **_gradients(model)}
    for mode in ("layer", "selective"):
        for name, tensor in found["none"].items():
            assert torch.equal(tensor, found[mode][name]), (mode, name)


@pytest.mark.parametrize(("number", "redone"), [(0, 2), (1, 1), (-1, 0)])
def test_layers_that_keep_attention_do_not_redo_it(number, redone, tiny_model, random_batch):
    """Of two layers; the gradients are those of no recomputation, bit for bit."""
    batch, found = random_batch(lengths_per_row=DOCUMENTS), {}
    for mode in ("none", "layer"):
        model = tiny_model("llama")
        install(model, "sdpa", train=True)
        stage = Stage(model).train()
        set_recompute(stage, mode, number if mode == "layer" else 0)
        _, loss = _loss(stage, batch)
        calls = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in _ATTENTION:
                    calls.append(func)  # noqa: B023
                return func(*args, **(kwargs or {}))

        with Count():
            loss.backward()
        found[mode] = _gradients(model)
    assert len(calls) == redone * sum(map(len, DOCUMENTS))  # one call per document and layer
    for name, tensor in found["none"].items():
        assert torch.equal(tensor, found["layer"][name]), name


@pytest.mark.parametrize(("mode", "kept"), [("layer", False), ("selective", True)])
def test_recomputation_runs_what_it_says(mode, kept, tiny_model, random_batch):
    """`layer` redoes the matrix products in the backward, `selective` does not; both redo the norms."""
    model = tiny_model("llama")
    stage = Stage(model).train()
    set_recompute(stage, mode)
    _, loss = _loss(stage, random_batch(lengths_per_row=DOCUMENTS))

    class Count(TorchDispatchMode):
        products = norms = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.products += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            Count.norms += func is torch.ops.aten.rsqrt.default
            return func(*args, **(kwargs or {}))

    with Count():
        loss.backward()
    # a layer has 7 products, each with two in its backward, as has the head; the last one of a layer
    # need not be redone: nothing in the backward reads it
    assert Count.products == 2 * (2 * 7) + 2 + (0 if kept else 2 * 6)
    assert Count.norms == 2 * 2  # two norms per layer; the final one is kept


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "llama", "gemma2"])
def test_dropout_is_a_function_of_the_row(family, tiny_model, random_batch):
    """The same rows in one micro-batch or three, in another order: the same bits. Another seed: others."""
    batch = random_batch(lengths_per_row=DOCUMENTS)

    def run(rows, seed=7):
        model = tiny_model(family, dropout=0.2)
        seed_dropout(model, seed)
        stage = Stage(model).train()
        fields = ("input_ids", "labels", "position_ids", "document_ids")
        parts = {name: getattr(batch, name)[list(rows)] for name in fields}
        return stage(replace(batch, **parts, rows=tuple(40 + r for r in rows))).detach()

    whole = run((0, 1, 2))
    assert torch.equal(whole.flip(0), run((2, 1, 0)))
    for row in range(3):
        assert torch.equal(whole[row], run((row,))[0])
    assert not torch.equal(whole, run((0, 1, 2), seed=8))
    plain = Stage(tiny_model(family))(batch).detach()
    assert not torch.allclose(whole, plain)  # it does drop


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_every_dropout_of_a_family_is_seeded(family, tiny_model, random_batch, monkeypatch):
    """In one document of one row, ours is called where plain transformers calls torch's, with its rate."""
    torch_calls, our_calls, names = [], [], []
    torchs, ours = F.dropout, seeding.dropout

    def count_torchs(x, p=0.5, training=True, inplace=False):
        torch_calls.append((p, x.numel())) if training and p else None
        return torchs(x, p, training)

    def count_ours(x, p, **kwargs):
        our_calls.append((p, x.numel()))
        names.append(kwargs["name"])
        return ours(x, p, **kwargs)

    monkeypatch.setattr(F, "dropout", count_torchs)
    monkeypatch.setattr(seeding, "dropout", count_ours)
    batch = random_batch(lengths_per_row=[[9]])
    tiny_model(family, dropout=0.2, attention="eager").train()(input_ids=batch.input_ids)
    assert torch_calls
    expected = list(torch_calls)
    model = tiny_model(family, dropout=0.2)
    seed_dropout(model, 1)
    Stage(model).train()(batch)
    assert our_calls == expected
    assert torch_calls == expected  # no call of torch's was left
    assert len(set(names)) == len(names)  # no two places drop the same units


def test_dropout_of_an_unknown_family_is_refused(tiny_model, random_batch):
    """Without `seed_dropout` the layers draw from the global generator: the first training forward fails."""
    stage = Stage(tiny_model("gpt2", dropout=0.2, attn_pdrop=0.0)).train()
    with pytest.raises(Failed, match="no seed of the run decides"):
        stage(random_batch())
    stage.eval()(random_batch())
    with pytest.raises(RuntimeError, match="seed_dropout"):
        Stage(tiny_model("gpt2", attn_pdrop=0.2)).train()(random_batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_check_stage_passes_every_family(family, tiny_model):
    stage = Stage(tiny_model(family)).train()
    check_stage(stage)
    assert stage.model.training


def test_check_stage_refuses_a_head_that_the_table_lacks(tiny_model, monkeypatch):
    stage = Stage(tiny_model("gemma2"))
    stage._family = Family()  # as if nobody had noted gemma2's softcap
    with pytest.raises(Refused, match="logits differ"):
        check_stage(stage)


def test_check_stage_refuses_documents_that_leak(tiny_model, monkeypatch):
    stage = Stage(tiny_model("llama"))

    def one_document(batch):
        return Layout(torch.zeros_like(batch.document_ids), batch.position_ids, batch.rows)

    monkeypatch.setattr(Layout, "of", staticmethod(one_document))
    with pytest.raises(Refused, match="hidden states in a packed row differ"):
        check_stage(stage)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
def test_autocast(family, tiny_model, random_batch, relative):
    """Products in bfloat16 over float32 weights: near float32, recomputed alike, and no false alarm."""
    batch = random_batch(lengths_per_row=DOCUMENTS)
    exact, _ = _loss(Stage(tiny_model(family)), batch)
    found = []
    for mode in ("none", "layer", "selective"):
        stage = Stage(tiny_model(family)).train()
        stage.autocast = torch.bfloat16
        check_stage(stage)
        set_recompute(stage, mode)
        hidden, loss = _loss(stage, batch)
        loss.backward()
        real = batch.document_ids != PADDING
        assert 1e-4 < relative(hidden[real], exact[real]) < 3e-2  # bfloat16 has 8 bits
        found.append(_gradients(stage.model))
        assert {g.dtype for g in found[-1].values()} == {torch.float32}
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) and torch.equal(gradient, found[2][name])


@pytest.mark.long
@pytest.mark.parametrize(("family", "mode"), [("llama", "none"), ("gpt2", "layer")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_compiled_is_eager(family, mode, tiny_model, random_batch, relative):
    found = []
    for compiled in (True, False):
        model = tiny_model(family, dropout=0.2)
        seed_dropout(model, 7)
        stage = Stage(model).train()
        set_recompute(stage, mode)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(stage)
        for lengths in (DOCUMENTS, [[4, 4], [2, 9]]):  # another number of documents, another width
            _, loss = _loss(stage, random_batch(lengths_per_row=lengths))
            loss.backward()
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        found.append(_gradients(model))
    for name, gradient in found[1].items():
        assert relative(found[0][name], gradient) < 2e-6, name  # fused kernels round otherwise


def test_compiled_layers_refuse_selective_recomputation(tiny_model):
    stage = Stage(tiny_model("llama"))
    set_recompute(stage, "selective")
    with pytest.raises(Refused, match="selective"):
        compile_layers(stage)
