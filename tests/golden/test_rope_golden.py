"""Tables of rotary positions and ALiBi slopes made by PaddleNLP 3.0.0b4 and by transformers.

Every case is asked for through `model.rope_scaling` and read off a model's own rotary module. PaddleNLP's YaRN
is the variant `yarn_paddlenlp`. Its dynamic strategy keeps a long document's table for later short ones, which
is no behaviour to match: `after_long` is left out.
"""

from __future__ import annotations

import json

import pytest
import torch
from golden_cases import ROOT, VARIABLE, absent, skip_absent
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from luthier.config import RopeScaling
from luthier.models import bloom, rotary

FOLDER = ROOT / "data"
TYPES = {
    "linear": "linear",
    "llama_linear": "linear",
    "ntk": "ntk",
    "llama_ntk": "ntk",
    "dynamic_ntk": "dynamic",
    "llama_dynamic_ntk": "dynamic",
    "yarn": "yarn_paddlenlp",
    "llama3": "llama3",
    "hf.linear": "linear",
    "hf.dynamic_ntk": "dynamic",
    "hf.yarn": "yarn",
    "hf.llama3": "llama3",
}


def stretched(**keys):
    return RopeScaling.model_validate(keys)


def cases():
    path = FOLDER / "manifest.json"
    if not path.is_file():
        return [absent(path)]
    params = []
    for case in json.loads(path.read_text("utf-8"))["cases"]:
        if case["id"].rpartition(".")[0] in TYPES:
            file = FOLDER / case["file"]
            marks = () if file.is_file() else skip_absent(file)
            params.append(pytest.param(case, id=case["id"], marks=marks))
    return params


def rotary_of(hyper, scaling):
    """The rotary module of a Llama whose config was scaled as the case says."""
    theirs = hyper.get("rope_parameters", hyper)
    dim = hyper.get("head_dim") or hyper["dim"]
    config = LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=hyper["max_position_embeddings"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theirs.get("rope_theta") or theirs.get("base"),
        },
    )
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    options = {name: theirs[name] for name in names if name in theirs}
    factor = theirs.get("factor") or theirs.get("scaling_factor")
    rotary.scale(config, stretched(type=scaling, factor=factor, **options))
    module = LlamaRotaryEmbedding(config)
    rotary.per_document(torch.nn.ModuleList([module]))
    return module


def table(module, length):
    """cos and sin [length, D] of a document of that length."""
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("case", cases())
def test_tables(case):
    kind = case["id"].rpartition(".")[0]
    module = rotary_of(case["hyper"], TYPES[kind])
    stored = load_file(FOLDER / case["file"])
    stored = {name: stored[entry["key"]] for name, entry in case["tensors"].items()}
    limits = dict(case["tolerance"])
    calls = {"": case["hyper"]["seq_len"]} if kind.startswith("hf.") else {}
    for call in case["hyper"].get("calls", ()):
        # a table of 3.0 is an alpha of PaddleNLP's own; one made before is no length of this document
        if call["ntk_alpha"] is None and call["name"] != "after_long":
            calls[f"_{call['name']}"] = call["seq_len"]
    assert calls
    for name, length in calls.items():
        cos, sin = table(module, length)
        torch.testing.assert_close(cos, stored[f"cos{name}"][:length], **limits)
        torch.testing.assert_close(sin, stored[f"sin{name}"][:length], **limits)
    if kind.startswith(("hf.", "yarn", "llama3")) and kind != "hf.dynamic_ntk":
        torch.testing.assert_close(module.original_inv_freq, stored["inv_freq"], **limits)


@pytest.mark.parametrize("number", range(3))
def test_yarn_with_options(number):
    """`yarn_opts`: beta and attention factor by their keys; PaddleNLP's extrapolation factor has none."""
    path = FOLDER / "rope.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent: see {VARIABLE}")
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))["cases"]
    (case,) = [c for c in manifest if c["id"] == f"yarn_opts.{number}"]
    hyper, stored = case["hyper"], load_file(path)
    dim, base = hyper["dim"], hyper["base"]
    factors = rotary.paddlenlp_yarn(
        dim,
        base,
        hyper["scaling_factor"],
        hyper["original_max_position_embeddings"],
        beta_fast=hyper["beta_fast"],
        beta_slow=hyper["beta_slow"],
        extrapolation=hyper["extrapolation_factor"],
    )
    plain = base ** -(torch.arange(0, dim, 2).double() / dim)
    ours = (plain / torch.tensor(factors, dtype=torch.float64)).float()
    torch.testing.assert_close(ours, stored[f"{case['id']}/inv_freq"], **case["tolerance"])


def test_papers_yarn_is_not_paddlenlps():
    """They differ in the ramp, and the default is the paper's: cos differs by more than 1."""
    ids = {c.id: c.values[0] for c in cases()}
    if "yarn.2" not in ids:
        pytest.skip(f"the golden cases are absent: see {VARIABLE}")
    hyper = ids["yarn.2"]["hyper"]
    paper, theirs = (table(rotary_of(hyper, t), 96)[0] for t in ("yarn", "yarn_paddlenlp"))
    assert float((paper - theirs).abs().max()) > 1


def test_alibi_slopes():
    """Powers of two as PaddleNLP's; for other counts, which it refuses, BLOOM's own rule."""
    path = FOLDER / "alibi.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent: see {VARIABLE}")
    for heads, wanted in json.loads(path.read_text("utf-8"))["slopes"].items():
        n = int(heads)
        model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=4 * n, n_head=n, n_layer=1))
        bloom.repair(model)
        slopes = model.transformer.h[0].self_attention.alibi_slopes
        if isinstance(wanted, list):
            torch.testing.assert_close(slopes, torch.tensor(wanted))
        else:
            power = 1 << (n.bit_length() - 1)
            rule = [2 ** (-8 * (h + 1) / power) for h in range(power)]
            rule += [2 ** (-4 * (2 * h + 1) / power) for h in range(n - power)]
            torch.testing.assert_close(slopes, torch.tensor(rule))
