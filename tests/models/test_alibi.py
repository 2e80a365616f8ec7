"""ALiBi in the kernels, and BLOOM, which is led through the seam: packed, padded, with a cache, loaded from a folder."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_reference import attention as definition
from dense_reference import greedy
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, DynamicCache

from luthier.batch import IGNORE, PADDING, Layout, PrefixKeys
from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.models import attention, kernels
from luthier.models.attention import install
from luthier.models.generate import GenerateOptions, generate
from luthier.models.kernels import Scores
from luthier.models.load import build_model
from luthier.models.stage import Stage, check_stage
from luthier.positions import num_positions
from luthier.seeding import generator

DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]
FEATURES = {
    "plain": {},
    "window": {"window": 3},
    "prefix": {"prefix": True},
    "prefix and window": {"prefix": True, "window": 6},
    "softcap": {"softcap": 1.0},
    "context": {"context": True},
}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
HEADS = [4, 6, 1]  # a power of two, none, and the smallest


def _layout(batch, context=False):
    positions = batch.position_ids
    if context:  # the first two tokens of each document
        positions = torch.stack([positions, (positions - 1).clamp_min(0)], dim=1)
    return Layout(batch.document_ids, positions, batch.rows)


def _tensors(dtype=torch.float64):
    draw = generator(0, "alibi")
    shapes = [(3, 4, 15, 16), (3, 2, 15, 16), (3, 2, 15, 16), (4, 2, 16), (4, 2, 16)]
    return [
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def _results(kernel, layout, features, tensors):
    """Output, and gradients where there are any."""
    q, k, v, keys, values = tensors
    given = {n: x for n, x in features.items() if n in ("window", "softcap")}
    if "prefix" in features:
        given["prefix"] = PrefixKeys(keys, values, True)
    out = kernel(q, k, v, layout, Scores(0.3, alibi=torch.tensor([0.5, 0.3, 0.1, 0.01]), **given))
    if q.requires_grad:
        out.sin().sum().backward()
    return [out, *(x.grad for x in tensors if x.grad is not None)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("kernel", ["math", "sdpa", "flex"])
def test_kernels_are_the_definition(kernel, features, dtype, random_batch, relative):
    """Float32 is compared with float64: what is left is its rounding. FlexAttention is forward only on CPU."""
    if kernel == "sdpa" and "softcap" in features:
        kernel = "math"  # as the seam does
    layout = _layout(random_batch(lengths_per_row=DOCUMENTS), "context" in features)
    tensors = _tensors(dtype)
    exact = [x.detach().double().requires_grad_(kernel != "flex") for x in tensors]
    if kernel == "flex":
        tensors = [x.detach() for x in tensors]
    ours = _results(kernels.KERNELS[kernel], layout, features, tensors)
    for _ in range(2):  # a second layer finds the tables of the first
        again = _results(kernels.KERNELS[kernel], layout, features, [x.detach() for x in tensors])
        assert torch.equal(again[0], ours[0])
    reference = _results(definition, layout, features, exact)
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine, theirs) < ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no alibi"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_gpu_kernels_are_math(kernel, features, alibi, random_batch, relative):
    """bfloat16 against float32 `math`, gradients of the prefix too: 8 bits, so errors of a few 1e-3."""
    if kernel == "sdpa" and "softcap" in features:
        pytest.skip("sdpa has no softcap")
    batch = random_batch(lengths_per_row=[[70, 30, 28], [128], [5, 60]]).to("cuda")
    layout = _layout(batch, "context" in features)
    slopes = torch.tensor([0.5, 0.3, 0.1, 0.01]) if alibi else None
    given = {n: x for n, x in features.items() if n in ("window", "softcap")}
    found = []
    for name, dtype in ((kernel, torch.bfloat16), ("math", torch.float32)):
        draw = generator(0, "gpu")
        shapes = [(3, 4, 128, 16), (3, 2, 128, 16), (3, 2, 128, 16), (4, 2, 16), (4, 2, 16)]
        inputs = [torch.randn(s, generator=draw).to("cuda", dtype).requires_grad_() for s in shapes]
        q, k, v, keys, values = inputs
        prefix = PrefixKeys(keys, values, True) if "prefix" in features else None
        scores = Scores(0.3, alibi=slopes, prefix=prefix, **given)
        out = kernels.KERNELS[name](q, k, v, layout, scores)
        real = out[batch.document_ids != PADDING]
        real.float().sin().sum().backward()
        found.append([real, *(x.grad for x in inputs if x.grad is not None)])
    for ours, reference in zip(*found, strict=True):
        assert relative(ours, reference) < 2e-2


def test_layers_share_one_table(random_batch):
    """One table [H, L, L] of the longest document for all layers, and another for other slopes."""
    layout = _layout(random_batch(lengths_per_row=DOCUMENTS))
    q, k, v = (x.detach() for x in _tensors()[:3])
    first, other = torch.tensor([0.5, 0.3, 0.1, 0.01]), torch.tensor([0.5, 0.3, 0.1, 0.02])
    seen = []
    for slopes in (first, first, other):
        out = kernels.sdpa(q, k, v, layout, Scores(0.3, alibi=slopes))
        (entry,) = layout.cache.values()
        seen.append((out, entry[1]))
    assert seen[0][1] is seen[1][1] and seen[0][1].shape == (4, 14, 14)
    assert seen[0][1] is not seen[2][1] and not torch.equal(seen[0][0], seen[2][0])


def test_varlen_and_flash_are_refused(tiny_model, monkeypatch):
    model = tiny_model("bloom")
    monkeypatch.setattr(attention, "check_kernel", lambda kernel, device, train: kernel)
    for kernel in ("varlen", "flash"):
        with pytest.raises(Refused, match="cannot do the alibi of bloom"):
            install(model, kernel)


# ---- BLOOM


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
def test_packed_rows_are_plain_transformers(heads, kernel, tiny_model, random_batch, relative):
    """Logits and gradients against the family's own attention, each document alone in a call.

    Float32: either side rounds, and ours adds slope * (j - i) where the family adds slope * j.
    """
    batch = random_batch(lengths_per_row=DOCUMENTS)
    ours = tiny_model("bloom", n_head=heads)
    plain = tiny_model("bloom", n_head=heads, attention="eager")
    assert install(ours, kernel) == kernel
    stage, total, expected = Stage(ours), 0.0, 0.0
    hidden = stage(batch)
    for s in Layout.of(batch).segments:
        logits = stage.head(hidden[s.row, s.start : s.stop])
        alone = plain(batch.input_ids[s.row : s.row + 1, s.start : s.stop]).logits[0]
        assert relative(logits, alone) < 1e-6
        labels = batch.labels[s.row, s.start : s.stop]
        for_loss = {"ignore_index": IGNORE, "reduction": "sum"}
        total = total + torch.nn.functional.cross_entropy(logits, labels, **for_loss)
        expected = expected + torch.nn.functional.cross_entropy(alone, labels, **for_loss)
    total.backward()
    expected.backward()
    assert relative(total, expected) < 1e-6
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 2e-6, name


@pytest.mark.parametrize("heads", HEADS)
def test_generation_is_plain_transformers(heads, tiny_model):
    """Padded micro-batches with a cache against one prompt at a time without one."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33]]
    plain = tiny_model("bloom", n_head=heads, attention="eager")
    expected = greedy(plain, prompts, 12)
    model = tiny_model("bloom", n_head=heads)
    options = GenerateOptions(12)
    assert generate(model, prompts, options, pad_id=0, stop_ids=(), micro_batch=4) == expected


def test_prefix_is_what_a_cache_of_its_length_gives(tiny_model, relative):
    """Plain transformers with past keys before left-padded rows, as PEFT's prefix tuning calls it."""
    ours, plain = tiny_model("bloom"), tiny_model("bloom", attention="eager")
    draw = generator(3, "past")
    past = [
        torch.randn(2, 4, 6, 12, generator=draw) for _ in "kv"
    ]  # keys or values: layer, P, K, D
    for layer in ours.transformer.h:
        layer.self_attention.keys_values = lambda i: PrefixKeys(past[0][i], past[1][i])
    ids = torch.randint(3, 300, (2, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = DynamicCache()
    for i in range(2):
        cache.update(*(x[i].transpose(0, 1).expand(2, -1, -1, -1) for x in past), i)
    with torch.no_grad():
        mine = ours(input_ids=ids, attention_mask=mask, use_cache=False).logits
        whole = torch.cat([torch.ones(2, 4, dtype=mask.dtype), mask], dim=1)
        theirs = plain(input_ids=ids, attention_mask=whole, past_key_values=cache).logits
    assert relative(mine[mask.bool()], theirs[mask.bool()]) < 1e-6


def test_only_the_installed_model_is_changed(tiny_model, tiny_tokenizer, random_batch, tmp_path):
    """Another model computes as before; a copy, and a switch to the family's own attention, work."""
    plain, model = tiny_model("bloom", attention="eager"), tiny_model("bloom")
    assert type(plain.transformer.h[0].self_attention).__name__ == "BloomAttention"
    assert not type(plain)._can_set_attn_implementation()
    batch = random_batch()
    copied = copy.deepcopy(model)
    assert torch.equal(Stage(copied)(batch), Stage(model)(batch))
    ids = batch.input_ids[:1]
    before = model(ids).logits
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.set_attn_implementation("luthier")
    assert torch.equal(model(ids).logits, before)
    assert install(model, "flex") == "flex"  # installed again
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_folder_is_built_ready_to_train(tiny_model, model_folder, random_batch):
    model = build_model(ModelConfig(path=str(model_folder("bloom"))), seed=0, train=True)
    check_stage(Stage(model))
    assert torch.equal(Stage(model)(random_batch()), Stage(tiny_model("bloom"))(random_batch()))
    AutoModelForCausalLM.from_pretrained(model_folder("bloom"))  # by plain transformers


def test_sliced_products_are_refused(tiny_model):
    with pytest.raises(Refused, match="slow_but_exact=true"):
        tiny_model("bloom", slow_but_exact=True, pretraining_tp=2)
    tiny_model("bloom", slow_but_exact=True)


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12])
def test_any_number_of_heads_reaches_any_length(heads, random_batch, relative):
    """BLOOM has no positions to run out of: documents longer than it was made for, packed, are plain
    transformers' alone, logits and gradients."""
    config = BloomConfig(vocab_size=320, hidden_size=8 * heads, n_head=heads, n_layer=2)
    config.seq_length = 16
    assert num_positions(config) is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = BloomForCausalLM(config).double().eval()
    ours = copy.deepcopy(plain)
    install(ours, "auto")
    batch = random_batch(lengths_per_row=[[40, 25]])
    stage = Stage(ours)
    logits = stage.head(stage(batch)[0])
    alone = [plain(input_ids=ids[None]).logits[0] for ids in batch.input_ids[0].split([40, 25])]
    assert relative(logits, torch.cat(alone)) < 1e-6  # transformers rounds its bias to float32
    logits.sin().sum().backward()
    torch.cat(alone).sin().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if float(b.grad.norm()) > 1e-9:
            assert relative(a.grad, b.grad) < 1e-6, name


# ---- MPT


def test_mpt_reaches_beyond_its_table(tiny_model, random_batch, relative):
    """transformers' table of ALiBi ends at max_seq_len; ours gives what a longer one would, packed and answering."""
    ours = tiny_model("mpt", max_seq_len=16)
    plain = tiny_model("mpt", max_seq_len=64, attention="eager")
    assert num_positions(ours.config) is None
    batch = random_batch(lengths_per_row=[[40, 25]])
    stage = Stage(ours)
    with torch.no_grad():
        logits = stage.head(stage(batch)[0])
        alone = [plain(input_ids=i[None]).logits[0] for i in batch.input_ids[0].split([40, 25])]
    assert relative(logits, torch.cat(alone)) < 2e-6
    prompts = [batch.input_ids[0, :30].tolist(), [5, 6, 7]]
    expected = greedy(plain, prompts, 4)
    options = GenerateOptions(4)
    assert generate(ours, prompts, options, pad_id=0, stop_ids=(), micro_batch=2) == expected
    before = ours(batch.input_ids[:, :12]).logits
    ours.set_attn_implementation("eager")
    assert relative(ours(batch.input_ids[:, :12]).logits, before) < 2e-6
