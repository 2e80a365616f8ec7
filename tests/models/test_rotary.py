"""Stretched rotary positions: transformers' own tables, each document turned as if it were alone."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from conftest import tiny_model_
from tiny_runs import resolved, tiny_config
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from luthier.assemble import open_text
from luthier.batch import IGNORE, Layout
from luthier.config import ModelConfig, RopeScaling
from luthier.configfile import from_mapping
from luthier.errors import Refused
from luthier.models import rotary
from luthier.models.attention import install
from luthier.models.load import build_model, save_model
from luthier.models.stage import Stage
from luthier.positions import num_positions
from luthier.seeding import generator

ORIGINAL, FACTOR = 8, 4.0
TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "yarn_paddlenlp")
# one of each way to keep rotary parameters: plain, partial, per type of layer, interleaved, with a window,
# head_dim unset, a checkpoint that is scaled, a family that admits longrope alone
FAMILIES = ("llama", "gpt_neox", "gemma3_text", "glm", "mistral", "qwen2", "gpt_oss", "phi3")
BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}
EXTRA = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "glm": {"head_dim": 16},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 4}
    | {"rope_parameters": {**SCALED, "original_max_position_embeddings": ORIGINAL}},
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 4},
    "phi3": {"original_max_position_embeddings": ORIGINAL},
}
# documents shorter than the original length, at it, and longer, in one batch
DOCUMENTS = [[5, 20, 7], [8, 9, 3], [31]]


def stretched(**keys):
    return RopeScaling.model_validate(keys)


def made(config, attention="luthier", dtype=torch.float32):
    """A model of `config` as it is saved and read again, with the same wide weights whatever the config."""
    again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(again, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator(0, name))
            p.data = ((p if p.ndim == 1 else 0.0) + 0.1 * noise).to(dtype)
    if attention == "luthier":
        install(model, "auto")
    return model.eval()


def scaled(family, scaling, **how):
    """A tiny model whose config `rotary.scale` changed."""
    config = AutoConfig.for_model(family, **deepcopy({**BASE, **EXTRA.get(family, {})}))
    rotary.scale(config, stretched(type=scaling, factor=FACTOR))
    return made(config, **how)


def fresh(family, scaling, ids):
    """Logits [1, n, V] of a plain model of transformers that never saw another document."""
    return scaled(family, scaling, attention="eager")(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("scaling", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_in_plain_transformers(family, scaling, random_batch, relative):
    """Logits of every document, packed here, against a fresh plain model of the saved config. Mixtures of
    experts round by what shares their batch."""
    if (family, scaling) == ("phi3", "dynamic"):
        pytest.skip("its config admits longrope only; refused in another test")
    batch = random_batch(lengths_per_row=DOCUMENTS)
    stage = Stage(scaled(family, scaling))
    with torch.no_grad():
        hidden = stage(batch)
        for s in Layout.of(batch).segments:
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            mine = stage.head(hidden[s.row, s.start : s.stop])
            assert relative(mine, fresh(family, scaling, ids)[0]) < 3e-6


@pytest.mark.parametrize("scaling", TYPES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_packed_gradients_are_alone(family, scaling, random_batch, relative):
    batch = random_batch(lengths_per_row=DOCUMENTS)
    model = scaled(family, scaling, dtype=torch.float64)
    stage, keep = Stage(model), batch.labels != IGNORE
    F.cross_entropy(stage.head(stage(batch)[keep]), batch.labels[keep], reduction="sum").backward()
    other = scaled(family, scaling, attention="sdpa", dtype=torch.float64)
    for s in Layout.of(batch).segments:
        ids, labels = (x[s.row, s.start : s.stop] for x in (batch.input_ids, batch.labels))
        rotary_modules = [m for m in other.modules() if hasattr(m, "original_inv_freq")]
        for module in rotary_modules:  # it keeps the table of the longest document yet
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
        logits = other(input_ids=ids[None], use_cache=False).logits[0]
        F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").backward()
    reference = dict(other.named_parameters())
    for name, p in model.named_parameters():
        # tables are float32 in both, the rest float64; a bias of all keys has no gradient in mathematics
        if float(reference[name].grad.norm()) > 1e-9:
            assert relative(p.grad, reference[name].grad) < 1e-6, name


def test_longrope_of_a_checkpoint_goes_by_the_document(random_batch, relative):
    """Phi 3's own long and short factors: a short document is not turned by the long ones of its neighbour."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.1}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    keys = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 32}
    keys |= {"rope_parameters": rope}
    config = AutoConfig.for_model("phi3", **{**BASE, **keys})
    model = made(config)
    batch = random_batch(lengths_per_row=DOCUMENTS)
    with torch.no_grad():
        hidden = Stage(model)(batch)
        for s in Layout.of(batch).segments:
            plain = made(config, "sdpa").model
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            out = plain(input_ids=ids, use_cache=False)[0]
            assert relative(hidden[s.row, s.start : s.stop], out[0]) < 3e-6


def test_dynamic_forgets_what_it_saw(random_batch):
    """The same batch gives the same bits after a longer one: transformers' module would keep its table."""
    stage = Stage(scaled("llama", "dynamic"))
    short, long = (random_batch(lengths_per_row=[[n]]) for n in (12, 30))
    with torch.no_grad():
        first = stage(short)
        stage(long)
        assert torch.equal(stage(short), first)
        ids = short.input_ids
        plain = stage.model(input_ids=ids, use_cache=False).logits
        stage.model(input_ids=long.input_ids, use_cache=False)
        assert torch.equal(stage.model(input_ids=ids, use_cache=False).logits, plain)


def test_dynamic_generates_as_plain_transformers():
    """Greedy answers across the original length, with a cache."""
    ids = torch.arange(6)[None] + 3
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = scaled("llama", "dynamic").generate(ids, **kwargs)
    assert torch.equal(ours, scaled("llama", "dynamic", attention="sdpa").generate(ids, **kwargs))


def test_ntk_is_dynamic_at_its_full_length():
    """b * s^(d/(d-2)): what transformers' dynamic function gives where its alpha is s."""
    static = scaled("llama", "ntk").config.rope_parameters
    config = scaled("llama", "dynamic").config
    config.rope_parameters["factor"] = 1.0  # alpha = length / original
    length = int(ORIGINAL * FACTOR)
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    exponents = torch.arange(0, 16, 2).float() / 16
    torch.testing.assert_close(1 / static["rope_theta"] ** exponents, wanted, rtol=1e-6, atol=0)
    assert static["rope_type"] == "default"


def test_phi3_reads_other_types_as_longrope(relative):
    """Its own positions under yarn are those that transformers' yarn gives to a Llama of the same shape."""
    config = scaled("phi3", "yarn").config
    ours, attention = ROPE_INIT_FUNCTIONS["longrope"](config)
    wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](scaled("llama", "yarn").config)
    assert relative(ours, wanted) < 1e-6 and attention == pytest.approx(factor)


@pytest.mark.parametrize(
    ("scaling", "positions", "written"),
    [("linear", 32, 32), ("ntk", 32, 32), ("dynamic", 32, 8), ("yarn", 32, 32), ("llama3", 32, 32)],
)
def test_positions_reach_further(scaling, positions, written):
    config = scaled("llama", scaling).config
    assert (num_positions(config), config.max_position_embeddings) == (positions, written)


def test_a_scaled_checkpoint_is_scaled_from_its_beginning():
    config = tiny_model_("llama").config
    rotary.scale(config, stretched(type="yarn", factor=2.0, beta_fast=16))
    remarks = rotary.scale(config, stretched(type="yarn", factor=4.0))
    assert config.rope_parameters["original_max_position_embeddings"] == 256
    assert config.rope_parameters["beta_fast"] == 16 and config.max_position_embeddings == 1024
    assert remarks == ["model.rope_scaling replaces the checkpoint's own scaling (yarn)"]


@pytest.mark.parametrize(
    ("family", "scaling", "words"),
    [
        ("gpt2", "yarn", "'gpt2' has no rotary positions"),
        ("opt", "linear", "'opt' has no rotary positions"),
        ("bloom", "dynamic", "'bloom' has ALiBi, which reaches any length"),
        ("phi3", "dynamic", "'phi3' does not admit it"),
    ],
)
def test_families_without_are_refused_by_name(family, scaling, words):
    with pytest.raises(Refused, match=words):
        rotary.scale(AutoConfig.for_model(family), stretched(type=scaling, factor=2.0))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "yarm", "factor": 2}, "type"),
        ({"type": "yarn"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        (
            {"type": "linear", "factor": 2, "beta_fast": 3},
            "beta_fast has no meaning for type=linear",
        ),
        (
            {"type": "llama3", "factor": 2, "high_freq_factor": 1},
            "high_freq_factor has to be larger",
        ),
    ],
)
def test_bad_options_are_refused(value, words):
    with pytest.raises(Refused, match=words):
        from_mapping({**tiny_tree(), "model": {"path": "m", "rope_scaling": value}})


def tiny_tree():
    return {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o"}


def test_options_may_be_given_one_by_one():
    words = ["model.rope_scaling.rope_type=dynamic_ntk", "model.rope_scaling.factor=4"]
    found = from_mapping(tiny_tree(), words).config.model.rope_scaling
    assert found == stretched(type="dynamic", factor=4.0)


def test_too_long_is_refused_and_told_how(model_folder, tmp_path):
    def reads(family, length, **keys):
        tree = tiny_config(model_folder(family), tmp_path, tmp_path, data__length=length, **keys)
        return open_text(resolved(tree).config).model_config

    with pytest.raises(
        Refused, match=r"256 positions.*rope_scaling.type=yarn model.rope_scaling.factor=2"
    ):
        reads("llama", 500)
    with pytest.raises(Refused, match=r"256 positions.*rotary positions only"):
        reads("gpt2", 500)
    reads("bloom", 5000)
    stretched = reads("llama", 500, model__rope_scaling={"type": "yarn", "factor": 2})
    assert stretched.max_position_embeddings == 512


@pytest.mark.parametrize("scaling", TYPES)
def test_a_saved_model_means_the_same_to_plain_transformers(
    scaling, model_folder, tmp_path, relative
):
    options = {
        "rope_scaling": {"type": scaling, "factor": 4, "original_max_position_embeddings": 8}
    }
    model = build_model(
        ModelConfig.model_validate({"path": str(model_folder("llama")), **options}), seed=0
    )
    save_model(model, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (
        AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters
        == model.config.rope_parameters
    )
    ids = torch.arange(3, 33)[None]
    unscaled = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert relative(ours, plain(input_ids=ids).logits) < 1e-6
        assert relative(ours, unscaled(input_ids=ids).logits) > 1e-3
