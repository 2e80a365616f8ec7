"""Keys and values before each document: kernels against the definition, packed = alone, cache = no cache, capture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense_reference import attention as definition
from torch.nn import functional as F

from luthier.batch import IGNORE, PADDING, Layout, PrefixKeys, layout_scope
from luthier.errors import Refused
from luthier.models import attention, kernels
from luthier.models.attention import attend, capture, install
from luthier.models.dropout import seed_dropout
from luthier.models.kernels import Scores
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.seeding import generator

DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
FEATURES = {
    "plain": {},
    "virtual": {"virtual": True},
    "window": {"window": 3},
    "virtual, narrow": {"window": 3, "virtual": True},
    "virtual, wide": {"window": 9, "virtual": True},
    "virtual, widest": {"window": 18, "virtual": True},
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": True},
    "all": {"softcap": 1.0, "sinks": True, "window": 5, "virtual": True},
}
FAMILIES = ("llama", "mistral", "gemma2", "gpt2", "opt", "bloom")


def _tensors(groups=2, dtype=torch.float64, ahead=4, width=15):
    """q, k, v, prefix keys and values, sinks."""
    draw = generator(0, "prefix")
    shapes = [(3, 4, width, 16), (3, groups, width, 16), (3, groups, width, 16)]
    shapes += [(ahead, groups, 16), (ahead, groups, 16), (4,)]
    return [
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def _scores(features, keys, values, sinks):
    given = {name: value for name, value in features.items() if name not in ("virtual", "sinks")}
    if "sinks" in features:
        given["sinks"] = sinks
    return Scores(0.3, prefix=PrefixKeys(keys, values, "virtual" in features), **given)


def _results(kernel, layout, features, tensors):
    """Output and gradients."""
    q, k, v, *others = tensors
    out = kernel(q, k, v, layout, _scores(features, *others))
    out.sin().sum().backward()
    return [out, *(x.grad for x in tensors if x.grad is not None)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "features"),
    [
        pytest.param(kernel, features, id=f"{kernel}, {name}")
        for kernel in ("math", "sdpa")
        for name, features in FEATURES.items()
        if not set(features) & kernels.LACKS[kernel]
    ],
)
def test_kernels_are_the_definition(kernel, features, groups, dtype, random_batch, relative):
    """Float32 is compared with float64: what is left is its rounding."""
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    ours = _results(kernels.KERNELS[kernel], layout, features, _tensors(groups, dtype))
    exact = [x.detach().to(dtype).double().requires_grad_() for x in _tensors(groups, dtype)]
    reference = _results(definition, layout, features, exact)
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine, theirs) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "features", [f for f in FEATURES.values() if "sinks" not in f], ids=lambda f: str(set(f))
)
def test_flex_is_the_definition(features, random_batch, relative):
    """Forward only: torch's FlexAttention has no backward on CPU."""
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    q, k, v, *others = (x.detach() for x in _tensors())
    scores = _scores(features, *others)
    assert relative(kernels.flex(q, k, v, layout, scores), definition(q, k, v, layout, scores)) < (
        1e-12
    )


def test_keys_in_a_wider_type_are_cast(random_batch):
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    q, k, v = _tensors(dtype=torch.bfloat16)[:3]
    keys, values = _tensors(dtype=torch.float32)[3:5]
    for kernel in (kernels.math, kernels.sdpa):
        out = kernel(q, k, v, layout, Scores(0.3, prefix=PrefixKeys(keys, values)))
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and keys.grad.dtype == values.grad.dtype == torch.float32


def test_cost_is_that_of_the_documents(random_batch, monkeypatch):
    """P more keys per document, nothing for padding, and no table of which key is seen."""
    lengths = []
    real = F.scaled_dot_product_attention

    def count(q, k, v, attn_mask, is_causal, **kwargs):
        lengths.append(k.shape[-2])
        assert attn_mask is None and is_causal
        return real(q, k, v, attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS, width=40))
    q, k, v, keys, values, _ = _tensors(width=40)
    kernels.sdpa(q, k, v, layout, Scores(0.3, window=30, prefix=PrefixKeys(keys, values, True)))
    assert lengths == [n + 4 for n in (5, 3, 7, 8, 4, 1, 14)] and not layout.cache


# ---- in a model


def _attach(model, ahead=3, virtual=False):
    """Random keys and values on each layer of the model; gives them as leaves."""
    layers = [m for m in model.modules() if hasattr(m, "keys_values") or hasattr(m, "is_causal")]
    config = model.config
    heads = config.num_attention_heads
    shape = (ahead, getattr(config, "num_key_value_heads", heads), config.hidden_size // heads)
    found = []
    for layer in layers:
        draw = generator(1, "keys", layer.layer_idx)
        made = [torch.randn(shape, generator=draw).to(model.dtype).requires_grad_() for _ in "kv"]
        found.append(made)
        layer.keys_values = lambda index: PrefixKeys(*found[index], virtual)
    return [x for pair in found for x in pair]


def _summed(logits, labels):
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("virtual", [False, True], ids=["seen by all", "virtual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family, virtual, tiny_model, random_batch, relative, monkeypatch):
    """Also with layers computed again: losses and gradients of base and prefix, in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of some norms
    batch = random_batch(lengths_per_row=DOCUMENTS)
    found = []
    for mode in ("none", "layer", "selective", "alone"):
        model = tiny_model(family, torch.float64)
        prefix = _attach(model, virtual=virtual)
        if mode == "alone":
            total = torch.zeros((), dtype=torch.float64)
            for s in Layout.of(batch).segments:
                ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
                logits = model(input_ids=ids, use_cache=False).logits[0]
                total = total + _summed(logits, batch.labels[s.row, s.start : s.stop])
        else:
            stage = Stage(model).train()
            set_recompute(stage, mode)
            hidden = stage(batch)
            assert hidden.isfinite().all()
            total = _summed(stage.head(hidden.flatten(0, 1)), batch.labels.flatten())
        total.backward()
        base = [p.grad for n, p in model.named_parameters() if "k_proj.bias" not in n]
        found.append([total, *(x.grad for x in prefix), *base])
    for mine, again, selective, alone in zip(*found, strict=True):
        assert torch.equal(mine, again) and torch.equal(mine, selective)
        assert relative(mine, alone) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_do_not_see_each_other_bitwise(family, tiny_model, random_batch):
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model = tiny_model(family)
    _attach(model)
    changed = batch.input_ids.clone()
    here = batch.document_ids == 1
    changed[here] = (changed[here] + 17) % 300 + 3
    with torch.no_grad():
        old, new = Stage(model)(batch), Stage(model)(replace(batch, input_ids=changed))
    assert torch.equal(old[~here], new[~here]) and not torch.equal(old[here], new[here])


def test_dropout_acts_on_the_prefix_too(tiny_model, random_batch):
    """As many weights are dropped as there are, and by the row alone."""
    model = tiny_model("gpt2", dropout=0.5)
    _attach(model)
    seed_dropout(model, 3)
    stage = Stage(model).train()
    batch = random_batch(lengths_per_row=DOCUMENTS)
    whole = stage(batch).detach()
    one = {n: getattr(batch, n)[1:2] for n in ("input_ids", "position_ids", "document_ids")}
    alone = stage(replace(batch, labels=batch.labels[1:2], rows=(1,), **one))
    assert torch.equal(whole[1], alone[0])
    # values of 1 on the prefix alone: an output is the sum of the prefix's weights that were kept
    ones, nothing, keys = torch.ones(1, 4, 15, 16), torch.zeros(1, 4, 15, 16), torch.ones(3, 4, 16)
    layout = Layout(batch.document_ids[:1], batch.position_ids[:1])
    scores = Scores(1.0, dropout=0.5, prefix=PrefixKeys(keys, keys))
    kept = kernels.math(ones, ones, nothing, layout, scores)[0, 0, :, 0] * 4 * 0.5
    # the first query sees 4 equal keys, three of them the prefix's: each is kept or not
    assert set(kept.round().tolist()) <= {0, 1, 2, 3} and len(kept.unique()) > 1


@pytest.mark.parametrize("virtual", [False, True], ids=["seen by all", "virtual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_no_cache_with_left_padding(family, virtual, tiny_model, relative):
    """Steps of several tokens and of one, against each row alone in one call without a cache."""
    model = tiny_model(family)
    _attach(model, virtual=virtual)
    lengths = (9, 5)
    ids = torch.randint(3, 300, (2, 9), generator=generator(0, "ids"))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        cache, logits, done = None, [], 0
        for stop in (6, 8, 9):
            step = model(
                input_ids=ids[:, done:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, done:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache, done = step.past_key_values, stop
            logits.append(step.logits)
        found = torch.cat(logits, dim=1)
        assert found.isfinite().all()
        for row, length in enumerate(lengths):
            own = ids[row : row + 1, 9 - length :]
            alone = model(input_ids=own, use_cache=False).logits[0]
            assert relative(found[row, 9 - length :], alone) < 1e-6


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_keys_are_the_tokens_themselves(
    family, packed, tiny_model, random_batch, relative
):
    """Virtual tokens run once and kept as keys = the same tokens before each document; gradients too.

    In float64, but for norms that compute in float32 whatever they are given: hence 1e-6.
    """
    ahead, found = 3, []
    batch = random_batch(lengths_per_row=DOCUMENTS)
    for captured in (True, False):
        model = tiny_model(family, torch.float64)
        embed = model.get_input_embeddings()
        soft = torch.randn(1, ahead, model.config.hidden_size, generator=generator(2, "soft"))
        soft = soft.double().requires_grad_()
        layers = [m for m in model.modules() if hasattr(m, "is_causal")]
        total = torch.zeros((), dtype=torch.float64)
        if captured:
            with capture() as kept:
                model.base_model(inputs_embeds=soft, use_cache=False)
            assert sorted(kept) == [0, 1]
            for layer in layers:
                layer.keys_values = lambda i: PrefixKeys(
                    *(x[0].transpose(0, 1) for x in kept[i]), True
                )
        if captured and packed:
            stage = Stage(model)
            hidden = stage(replace(batch, position_ids=batch.position_ids + ahead))
            total = _summed(stage.head(hidden.flatten(0, 1)), batch.labels.flatten())
        else:
            for s in Layout.of(batch).segments:
                x = embed(batch.input_ids[s.row : s.row + 1, s.start : s.stop])
                places = torch.arange(ahead, ahead + x.shape[1])[None]
                if not captured:
                    x = torch.cat([soft, x], dim=1)
                    places = torch.arange(x.shape[1])[None]
                out = model(inputs_embeds=x, position_ids=places, use_cache=False)
                labels = batch.labels[s.row, s.start : s.stop]
                total = total + _summed(out.logits[0, -len(labels) :], labels)
        total.backward()
        found.append([total, soft.grad])
    for mine, theirs in zip(*found, strict=True):
        assert relative(mine, theirs) < 1e-6


def test_capturing_leaves_the_prefix_out(tiny_model, relative):
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    plain = model(input_ids=ids).logits
    _attach(model)
    assert relative(model(input_ids=ids).logits, plain) > 1e-3
    with capture():
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_row_of_padding_is_finite(tiny_model):
    """In a plain call, also with a window, softcap and ALiBi."""
    mask = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    for family in FAMILIES:
        for virtual in (False, True):
            model = tiny_model(family)
            _attach(model, virtual=virtual)
            out = model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False)
            out.logits.sum().backward()
            assert out.logits.isfinite().all()
            assert all(p.grad.isfinite().all() for p in model.parameters())


def test_varlen_and_flash_are_refused(tiny_model, random_batch, monkeypatch):
    """At installation, and at a call if the prefix came later."""
    model = tiny_model("llama")
    _attach(model)
    later = tiny_model("llama")
    monkeypatch.setattr(attention, "check_kernel", lambda kernel, device, train: kernel)
    with pytest.raises(Refused, match="cannot do the prefix of llama"):
        install(model, "varlen")
    install(later, "flash")
    _attach(later)
    with pytest.raises(Refused, match=r"attention=flash was asked for.*cannot do the prefix"):
        Stage(later)(random_batch())


def test_padding_gives_zeros(random_batch):
    """A prefix is no reason to compute padding."""
    batch = random_batch(lengths_per_row=[[3], [15], [4]])
    q, k, v, keys, values, _ = (x.detach() for x in _tensors())
    module = torch.nn.Module()
    module.layer_idx = 0
    module.keys_values = lambda index: PrefixKeys(keys, values)
    for kernel in ("math", "sdpa", "flex"):
        module.attention_kernel = kernel
        with layout_scope(Layout.of(batch)):
            out, _ = attend(module, q, k, v, None)
        assert not out[batch.document_ids == PADDING].any()
