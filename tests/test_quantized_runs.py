"""Whole runs on a quantised base: training, evaluation, resuming, merging, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import copy_model, tiny_config, write_data
from transformers import AutoModelForCausalLM, PreTrainedModel

import luthier
from luthier.adapters import fold_into
from luthier.bases import quantization_of
from luthier.config import AdapterConfig, ModelConfig, QuantizeConfig
from luthier.errors import Failed, Refused
from luthier.layers import dense_weight, is_quantized
from luthier.merge_quantized import merge_quantized
from luthier.models.load import build_model
from luthier.quantize.loading import Quantization
from luthier.stacks import stacks_of

SCHEMES = ("nf4", "fp4", "int8", "int4")


@pytest.fixture
def make(tmp_path, model_folder):
    """make(output name, **keys) -> mapping of a LoRA run on a tiny llama kept in nf4."""
    model = copy_model(model_folder("llama"), tmp_path / "model")
    data = write_data(tmp_path / "data")

    def config(output: str = "run", **keys):
        return tiny_config(model, data, tmp_path / output, **({"quantize__weights": "nf4"} | keys))

    return config


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_trains_and_is_evaluated_on_the_base_it_trained_on(make, tmp_path, scheme):
    config = make(quantize__weights=scheme, train__steps=4, optim__lr=1e-2)
    result = luthier.finetune(config)
    assert luthier.evaluate(config)["loss"] == pytest.approx(result["after"]["loss"], rel=1e-6)
    model, tokenizer = luthier.load(tmp_path / "model", tmp_path / "run", quantize=scheme)
    assert is_quantized(model.get_submodule("model.layers.0.mlp.up_proj"))
    ids = tokenizer("what follows red", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    facts = json.loads((tmp_path / "run" / "luthier.json").read_text("utf-8"))
    assert facts["base_options"]["quantize"] == {"weights": scheme}
    # codes and scales are nowhere in what is saved
    assert all("lora" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_fused_experts_are_quantised_while_they_are_read(make, model_folder, tmp_path, family):
    folder = copy_model(model_folder(family), tmp_path / family)
    plain = build_model(ModelConfig(path=str(folder)), seed=0)
    asked = Quantization(QuantizeConfig(weights="int8"))
    model = build_model(ModelConfig(path=str(folder)), seed=0, quantization=asked)
    stacks = [n for n in stacks_of(model)]
    assert stacks == stacks_of(plain) and stacks
    for name in stacks:
        held, wanted = model.get_submodule(name), plain.get_parameter(name).detach()
        wanted = wanted.mT if held.transposed else wanted
        assert (held.dequantize() - wanted).norm() < 0.01 * wanted.norm()
    config = make(f"{family}-run", model__path=str(folder), train__steps=2, optim__lr=1e-2)
    result = luthier.finetune(config)
    assert luthier.evaluate(config)["loss"] == pytest.approx(result["after"]["loss"], rel=1e-6)
    luthier.merge(str(folder), str(tmp_path / f"{family}-run"), str(tmp_path / "merged"))


@pytest.mark.parametrize("pissa", [False, True])
def test_resuming_gives_the_same_bits(make, tmp_path, pissa):
    keys = {"adapter__pissa": pissa, "checkpoint__every": 2, "optim__lr": 1e-2}
    keys["optim__schedule"] = "constant"
    luthier.finetune(make("whole", train__steps=4, **keys))
    luthier.finetune(make("cut", train__steps=2, **keys))
    luthier.finetune(make("cut", train__steps=4, checkpoint__resume="auto", **keys))
    whole, cut = (
        load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_merging_goes_into_the_original_weights(make, tmp_path):
    luthier.finetune(make(train__steps=4, optim__lr=1e-2))
    luthier.merge(str(tmp_path / "model"), str(tmp_path / "run"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    factors = [tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA"]
    wanted = base.get_submodule(name).weight + 2 * factors[0] @ factors[1]  # alpha / rank = 2
    assert (merged.get_submodule(name).weight - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_merging_into_the_codes_tells_its_cost(make, tmp_path, scheme):
    luthier.finetune(make(quantize__weights=scheme, train__steps=8, optim__lr=3e-2))
    folders = [str(tmp_path / name) for name in ("model", "run", "merged")]
    told = merge_quantized(*folders, say=lambda text: None)
    assert 0 < told["kl"] < told["kl_of_adapter"]
    merged, _ = luthier.load(folders[2])
    base, _ = luthier.load(folders[0], folders[1], quantize=scheme)
    name = "model.layers.0.self_attn.q_proj"
    layer = merged.get_submodule(name)
    assert is_quantized(layer) and layer.scheme == scheme
    wanted = dense_weight(base.get_submodule(name)) + base.get_submodule(name).adapter.update()
    step = {"nf4": 0.15, "int8": 0.01}[scheme]  # quantised again
    assert (dense_weight(layer) - wanted).norm() < step * wanted.norm()


def test_an_adapter_of_a_quantised_folder_fits_the_original_too(make, tmp_path):
    luthier.quantize_model(
        {
            "model": {"path": str(tmp_path / "model")},
            "quantize": {"weights": "nf4"},
            "output": str(tmp_path / "small"),
        }
    )
    config = make(model__path=str(tmp_path / "small"), quantize__weights=None, train__steps=8)
    luthier.finetune({**config, "optim": {"lr": 3e-2}})
    luthier.merge(str(tmp_path / "model"), str(tmp_path / "run"), str(tmp_path / "merged"))
    folders = [str(tmp_path / name) for name in ("small", "run", "codes")]
    assert merge_quantized(*folders, say=lambda text: None)["layout"] == "bitsandbytes"
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other.model.norm.weight.data += 1
    copy_model(tmp_path / "model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(Refused, match="other weights"):
        luthier.merge(str(tmp_path / "other"), str(tmp_path / "run"), str(tmp_path / "m2"))


def test_merging_into_codes_needs_an_adapter_of_codes(make, tmp_path):
    luthier.finetune(make(quantize__weights=None))
    with pytest.raises(Refused, match="trained on a base in full precision"):
        merge_quantized(*(str(tmp_path / name) for name in ("model", "run", "merged")))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_loses_more_than_the_adapter_gave_is_not_published(
    make, tmp_path, monkeypatch
):
    luthier.finetune(make(train__steps=2))

    def spoil(model):
        fold_into(model)
        model.get_submodule("model.layers.0.mlp.up_proj").absmax.mul_(1.5)

    monkeypatch.setattr("luthier.merge_quantized.fold_into", spoil)
    with pytest.raises(Failed, match="loses more"):
        merge_quantized(*(str(tmp_path / name) for name in ("model", "run", "merged")))
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_by_its_hash(make, tmp_path):
    luthier.finetune(make())
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other.model.norm.weight.data += 1
    copy_model(tmp_path / "model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(Refused, match="other weights"):
        luthier.merge(str(tmp_path / "other"), str(tmp_path / "run"), str(tmp_path / "merged"))


def test_pissa_quantises_the_residual(model_folder):
    """QPiSSA: the sum of what is stored and the adapter is nearer to the original than codes alone."""
    folder = model_folder("llama")
    original = build_model(ModelConfig(path=str(folder)), seed=0)
    stored = QuantizeConfig(weights="int4")
    options = AdapterConfig(method="lora", rank=16, pissa=True)
    errors = {}
    for case, asked in {
        "codes": Quantization(stored),
        "residual": quantization_of(stored, None, options, 7, model=ModelConfig(path=str(folder))),
    }.items():
        model = build_model(ModelConfig(path=str(folder)), seed=0, quantization=asked)
        adapters = luthier.adapters.attach(model, options, seed=7)
        errors[case] = sum(
            float((original.get_submodule(n).weight - dense_weight(model.get_submodule(n)) - a.update()).detach().norm() ** 2)
            for n, a in adapters.items()
        )  # fmt: skip
    assert errors["residual"] < 0.9 * errors["codes"]


def test_a_pissa_adapter_is_used_on_the_residual_again(make):
    config = make(adapter__pissa=True, quantize__weights="int4", train__steps=3, optim__lr=1e-2)
    after = luthier.finetune(config)["after"]["loss"]
    assert luthier.evaluate(config)["loss"] == pytest.approx(after, rel=1e-6)


def test_what_was_read_was_quantised_at_once(tmp_path):
    """The peak of resident memory while a model of 300 MB is read in nf4 is far below it."""
    script = f"""
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from luthier.config import ModelConfig, QuantizeConfig
from luthier.merge_quantized import merge_quantized
from luthier.models.load import build_model
from luthier.quantize.loading import Quantization
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
asked = lambda: Quantization(QuantizeConfig(weights="nf4"))
warm = ModelConfig(path={str(tmp_path / "small")!r})
build_model(warm, seed=0, quantization=asked())  # packages and tables
before = peak()
model = build_model(ModelConfig(path={str(tmp_path / "large")!r}), seed=0, quantization=asked())
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
"""
    _llama(tmp_path / "small", 64, 1)
    _llama(tmp_path / "large", 1024, 12)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, stored = map(float, done.stdout.split())
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 2**20
    assert size > 300 and stored < size / 5
    assert grown < stored + size / 10, (grown, stored, size)


def _llama(folder: Path, width: int, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=64, num_attention_heads=8, num_key_value_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter__method": None, "adapter__rank": None}, "full fine-tuning of a quantised base"),
        ({"quantize__block_size": 48}, "block sizes are 32"),
        ({"quantize__weights": "int4", "quantize__block_size": 48}, "for layer 'model.*does not divide the 64 inputs"),
        ({"quantize__modules": "embed_tokens"}, r"quantize.modules 'embed_tokens'.*\(Embedding\)"),
        ({"quantize__modules": "q_prj"}, "did you mean 'q_proj'"),
        ({"quantize__modules": []}, "leaves no layer to quantise"),
        ({"quantize__modules": {"all-linear": "none"}}, "leaves no layer to quantise"),
        ({"adapter__modules_to_save": ["q_proj"], "adapter__targets": "v_proj"}, "is quantised"),
    ],
)  # fmt: skip
def test_refused_before_weights_are_read(make, tmp_path, monkeypatch, keys, said):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(Refused, match=said):
        luthier.finetune(make(**keys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quantize__weights": "nf5"}, "nf4"),
        ({"quantize__weights": "none", "quantize__block_size": 64}, "quantize.weights=none"),
        ({"quantize__modules": {"q_proj": "int3"}}, "name: one of none, nf4, fp4"),
        ({"quantize__weights": "int8", "quantize__double_quant": True}, "double_quant=true"),
    ],
)
def test_refused_by_the_config(make, keys, said):
    with pytest.raises(Refused, match=said):
        luthier.finetune(make(**keys))


def test_a_tied_head_is_not_left_dense_in_silence(model_folder):
    asked = Quantization(QuantizeConfig(weights="nf4", modules=["all-linear", "lm_head"]))
    tied = ModelConfig(path=str(model_folder("qwen2")))
    with pytest.raises(Refused, match=r"'lm_head'.*'model.embed_tokens.weight' too"):
        build_model(tied, seed=0, quantization=asked)
    own = build_model(ModelConfig(path=str(model_folder("llama"))), seed=0, quantization=asked)
    assert is_quantized(own.get_submodule("lm_head"))


def test_weights_that_are_not_finite_are_named(make, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(Refused, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        luthier.finetune(make())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"quantize": "4bit"},
            r"quantize\.weights=4bit.*expected one of none, nf4, fp4, int8, int4",
        ),
        ({"quantize": 4}, r"quantize=4"),
        ({"quantize": {"wieghts": "nf4"}}, r"quantize\.wieghts.*did you mean"),
        ({"quantize": {"modules": {"q_proj": "nf5"}}}, r"name: one of none, nf4"),
        ({"dtype": torch.float64}, r"model\.dtype=float64"),
    ],
)
def test_load_refuses_as_the_config_does(model_folder, keys, said):
    with pytest.raises(Refused, match=said):
        luthier.load(model_folder("llama"), **keys)
