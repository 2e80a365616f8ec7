"""Kernels against the `math` reference, `math` against its formula, and the seam outside of a stage."""

from __future__ import annotations

import pytest
import torch
from dense_reference import attention as definition
from transformers import AutoModelForCausalLM, GPTJConfig, Lfm2Config

from luthier.batch import PADDING, Layout, PrefixKeys, layout_scope
from luthier.errors import Refused
from luthier.models import attention, kernels
from luthier.models.attention import attend, install
from luthier.models.kernels import Scores
from luthier.models.stage import Stage
from luthier.seeding import generator

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom")
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]
FEATURES = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.0},
    "window and softcap": {"window": 3, "softcap": 1.0},
}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _inputs(heads=4, groups=2, width=15, dtype=torch.float64, device="cpu"):
    draw = generator(0, "qkv")
    shapes = ((3, heads, width, 16), (3, groups, width, 16), (3, groups, width, 16))
    return [
        torch.randn(s, generator=draw, dtype=torch.float64).to(device, dtype).requires_grad_()
        for s in shapes
    ]


def _formula(q, k, v, ids, scores):
    """Softmax attention [B, S, H, D] written from the definition, over whole rows."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    table = torch.einsum("bhid,bhjd->bhij", q, k) * scores.scale
    if scores.softcap is not None:
        table = scores.softcap * torch.tanh(table / scores.softcap)
    i, j = torch.meshgrid(*[torch.arange(q.shape[2])] * 2, indexing="ij")
    seen = (ids[:, :, None] == ids[:, None, :]) & (j <= i) & (ids != PADDING)[:, :, None]
    if scores.window is not None:
        seen = seen & (i - j < scores.window)
    weights = table.exp() * seen[:, None]
    total = weights.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.exp().view(1, -1, 1, 1)
    total = total + (ids == PADDING)[:, None, :, None]  # padding sees nothing and gives 0
    return torch.einsum("bhij,bhjd->bihd", weights, v) / total.transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("features", [*FEATURES.values(), {"sinks": True}], ids=str)
def test_math_is_the_formula(features, groups, random_batch, relative):
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    found = []
    for compute in (
        lambda q, k, v, s: kernels.math(q, k, v, layout, s),
        lambda q, k, v, s: _formula(q, k, v, layout.document_ids, s),
    ):
        q, k, v = _inputs(groups=groups)
        sinks = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
        scores = Scores(0.3, **(features | {"sinks": sinks} if "sinks" in features else features))
        out = compute(q, k, v, scores)
        out.sin().sum().backward()
        found.append([out, q.grad, k.grad, v.grad] + ([sinks.grad] if "sinks" in features else []))
    for ours, reference in zip(*found, strict=True):
        assert relative(ours, reference) < 1e-12


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("features", [{}, {"window": 3}], ids=str)
def test_sdpa_is_math(features, groups, random_batch, relative):
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    found = []
    for kernel in (kernels.sdpa, kernels.math):
        inputs = _inputs(groups=groups)
        out = kernel(*inputs, layout, Scores(0.3, **features))
        out.sin().sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for ours, reference in zip(*found, strict=True):
        assert relative(ours, reference) < 1e-12


@pytest.mark.parametrize("features", FEATURES.values(), ids=str)
def test_flex_is_math(features, random_batch, relative):
    """Forward only: torch's FlexAttention has no backward on CPU. Its gradients are tested on GPU."""
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS))
    inputs = [x.detach() for x in _inputs()]
    ours, reference = (
        kernel(*inputs, layout, Scores(0.3, **features)) for kernel in (kernels.flex, kernels.math)
    )
    assert relative(ours, reference) < 1e-12


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "varlen", "flash"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=str)
def test_gpu_kernels_are_math(features, kernel, random_batch, relative):
    """bfloat16 against float32 `math`: 8 bits of mantissa, so errors of a few 1e-3."""
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    if set(features) & kernels.LACKS[kernel]:
        pytest.skip(f"{kernel} has no {' or '.join(features)}")
    layout = Layout.of(random_batch(lengths_per_row=[[70, 30, 28], [128], [5, 60]]).to("cuda"))
    found = []
    for name, dtype in ((kernel, torch.bfloat16), ("math", torch.float32)):
        inputs = _inputs(width=128, dtype=dtype, device="cuda")
        out = kernels.KERNELS[name](*inputs, layout, Scores(0.3, **features))
        out[layout.document_ids != PADDING].float().sin().sum().backward()
        found.append([out[layout.document_ids != PADDING], *(x.grad for x in inputs)])
    for ours, reference in zip(*found, strict=True):
        assert relative(ours, reference) < 2e-2


def test_cost_is_that_of_the_documents(random_batch, monkeypatch):
    """`sdpa` is called with each document's own length, and never for padding."""
    lengths = []
    real = torch.nn.functional.scaled_dot_product_attention

    def count(q, *args, **kwargs):
        lengths.append(q.shape[-2])
        return real(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    layout = Layout.of(random_batch(lengths_per_row=DOCUMENTS, width=40))
    out = kernels.sdpa(*_inputs(width=40), layout, Scores(0.3, window=100))
    assert lengths == [5, 3, 7, 8, 4, 1, 14]
    assert not out[layout.document_ids == PADDING].any()


def test_layers_with_what_a_kernel_lacks_are_computed_by_math(
    random_batch, tiny_model, monkeypatch
):
    called = []
    for name in ("math", "sdpa"):
        kernel = getattr(kernels, name)
        spy = lambda *a, name=name, kernel=kernel: called.append(name) or kernel(*a)  # noqa: E731
        monkeypatch.setattr(kernels, name, spy)
        monkeypatch.setitem(attention.KERNELS, name, spy)
    gemma, llama = tiny_model("gemma2"), tiny_model("llama")
    assert install(gemma, "sdpa") == "sdpa (layers with softcap: math)"
    assert install(llama, "auto") == "sdpa"
    Stage(gemma)(random_batch())
    Stage(llama)(random_batch())
    assert called == ["math"] * 2 + ["sdpa"] * 2
    dropping = tiny_model("gpt2", dropout=0.1)
    assert install(dropping, "sdpa", train=True) == "sdpa (layers with dropout: math)"
    assert install(dropping, "sdpa") == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_call_with_left_padding_and_cache(family, tiny_model, relative):
    """Outside of a stage the model is the plain one: left padding, then a step with a KV cache."""
    ours, plain = tiny_model(family), tiny_model(family, attention="eager")
    ids = torch.randint(3, 300, (2, 9), generator=generator(0, "ids"))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for model in (ours, plain):
        with torch.no_grad():
            first = model(
                input_ids=ids[:, :6],
                attention_mask=mask[:, :6],
                position_ids=positions[:, :6],
                use_cache=True,
            )
            logits = [first.logits]
            for stop in (8, 9):  # two tokens at once, then one
                start = logits and sum(x.shape[1] for x in logits)
                step = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=first.past_key_values,
                    use_cache=True,
                )
                logits.append(step.logits)
        found.append(torch.cat(logits, dim=1)[mask.bool()])
    assert relative(*found) < 1e-6


def test_plain_call_with_sinks(random_batch, relative):
    """Without a layout, softcap and sinks go through products over the whole row."""
    q, k, v = (x.detach() for x in _inputs())
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    ids = torch.zeros(3, 15, dtype=torch.long)
    module = torch.nn.Module()
    out, _ = attend(module, q, k, v, None, scaling=0.3, softcap=1.0, s_aux=sinks)
    expected = _formula(q, k, v, ids, Scores(0.3, softcap=1.0, sinks=sinks))
    assert relative(out, expected) < 1e-12


def _with_context(batch):
    """A layout of a family with two position axes: contexts of 3, 0, 1, ... tokens, one of a whole document."""
    second = batch.position_ids.clone()
    lengths = iter((3, 0, 1, 2, 4, 1, 9))
    for s in Layout.of(batch).segments:
        second[s.row, s.start : s.stop] += 1 - next(lengths)
    positions = torch.stack([batch.position_ids, second.clamp_min(0)], dim=1)
    return Layout(batch.document_ids, positions, batch.rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ahead", [0, 4], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("kernel", ["math", "sdpa", "flex"])
def test_context_is_seen_by_its_document(kernel, ahead, dtype, random_batch, relative):
    """Against the definition, in float64; FlexAttention has no gradients on CPU."""
    layout = _with_context(random_batch(lengths_per_row=DOCUMENTS))
    assert layout.in_context.sum() > 15
    found = []
    for compute, kind in ((kernels.KERNELS[kernel], dtype), (definition, torch.float64)):
        draw = generator(1, "prefix")
        before = [torch.randn(ahead, 2, 16, generator=draw).to(kind) for _ in "kv"]
        inputs = [x.detach().to(dtype).to(kind) for x in _inputs()]
        for x in (*inputs, *before):
            x.requires_grad_(kernel != "flex")
        prefix = PrefixKeys(*before) if ahead else None
        out = compute(*inputs, layout, Scores(0.3, prefix=prefix))
        if kernel != "flex":
            out.sin().sum().backward()
        found.append([out, *(x.grad for x in (*inputs, *before) if x.grad is not None)])
    for ours, reference in zip(*found, strict=True):
        assert relative(ours, reference) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("kernel", ["math", "sdpa", "flex"])
def test_context_stays_in_its_document(kernel, random_batch):
    """Changing one document leaves every bit of the others; in its context, what comes before it changes."""
    layout = _with_context(random_batch(lengths_per_row=DOCUMENTS))
    q, k, v = (x.detach() for x in _inputs())
    before = kernels.KERNELS[kernel](q, k, v, layout, Scores(0.3))
    v = v.clone()
    v[0, :, 2] += 1  # the last token of the context of the first document
    changed = (kernels.KERNELS[kernel](q, k, v, layout, Scores(0.3)) != before).any(-1).any(-1)
    assert changed[0, :5].all() and changed.sum() == 5


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_gpu_kernels_are_refused_for_a_context(kernel, random_batch):
    """At the call: a layer does not tell that its family has one."""
    module = torch.nn.Module()
    module.attention_kernel = kernel
    q = torch.ones(3, 4, 15, 16)
    layout = _with_context(random_batch(lengths_per_row=DOCUMENTS))
    with layout_scope(layout), pytest.raises(Refused, match="cannot do the context of"):
        attend(module, q, q, q, None)


def test_dropout_of_attention_differs_by_row_document_layer_and_seed(random_batch):
    """Values of 1 make the output the sum of the kept weights: 1 without dropout, 1 on average with it."""
    batch = random_batch(lengths_per_row=[[40, 40], [40, 40]])
    q, k, v = (torch.ones(2, 4, 80, 16) for _ in range(3))

    def run(seed=0, name="layer", rows=(5, 6)):
        layout = Layout(batch.document_ids, batch.position_ids, rows)
        scores = Scores(0.3, dropout=0.25, dropout_key=(seed, name))
        return kernels.math(q, k, v, layout, scores)[..., 0]  # [B, S, H]

    kept = run()
    assert abs(float(kept[:, 20:40].mean()) - 1) < 0.05
    assert torch.equal(kept, run())
    assert torch.equal(kept.flip(0), run(rows=(6, 5)))
    documents = [kept[0, :40], kept[0, 40:], kept[1, :40], kept[1, 40:]]
    documents += [run(seed=1)[0, :40], run(name="other")[0, :40]]
    for i, one in enumerate(documents):
        assert all(not torch.equal(one, two) for two in documents[:i])


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_gpu_kernels_are_refused_on_cpu(kernel, tiny_model):
    with pytest.raises(Refused, match="needs a GPU and the model is on cpu"):
        install(tiny_model("llama"), kernel)


def test_flex_is_refused_for_training_on_cpu(tiny_model):
    with pytest.raises(Refused, match="no gradients on cpu"):
        install(tiny_model("llama"), "flex", train=True)
    assert install(tiny_model("llama"), "flex") == "flex"


def test_flash_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install flash-attn"):
        attention.check_kernel("flash", torch.device("cuda"), True)


def test_varlen_and_flash_are_refused_for_what_they_lack(tiny_model, monkeypatch):
    gemma, gpt = tiny_model("gemma2"), tiny_model("gpt2", dropout=0.1)
    monkeypatch.setattr(attention, "check_kernel", lambda kernel, device, train: kernel)
    with pytest.raises(Refused, match="cannot do the softcap of gemma2"):
        install(gemma, "varlen")
    with pytest.raises(Refused, match="cannot do the dropout of gpt2"):
        install(gpt, "flash", train=True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
            "attention interface",
        ),
        (
            Lfm2Config(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
            ),
            "layers of the type conv",
        ),
    ],
)
def test_families_that_cannot_be_packed_are_refused(config, why):
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Refused, match=why) as caught:
        install(model, "auto")
    assert "llama, mistral" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "a mask of its own"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_a_layout_would_lose_is_refused(extra, why, random_batch):
    batch = random_batch(lengths_per_row=[[3, 2]])
    q = torch.ones(1, 2, 5, 8)
    arguments = {"attention_mask": None} | extra
    with layout_scope(Layout.of(batch)), pytest.raises(Refused, match=why):
        attend(torch.nn.Module(), q, q, q, **arguments)


def test_a_window_that_is_not_passed_on_is_refused(tiny_model, random_batch):
    """A layer that config.json calls sliding, in a family that only tells it to the mask."""
    model = tiny_model("gemma2")
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(Refused, match="sliding window that it does not pass on"):
        Stage(model)(random_batch())
