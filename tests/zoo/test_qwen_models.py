"""Qwen v1 as a member of the house: packing beyond seq_length, generation, recomputation, files, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import Refused
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.generate import GenerateOptions, generate
from luthier.models.load import load_config, quiet, save_model
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage, check_stage
from luthier.models.zoo.configuration_qwen import QWenConfig
from luthier.models.zoo.qwen import QWenLMHeadModel, RMSNorm, ntk_alpha
from luthier.seeding import generator

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "seq_length": 8,
}
LENGTHS = [[5, 19], [8, 9]]  # within seq_length, just beyond it, beyond twice as much


def tiny_qwen(attention: str = "auto", **overrides: Any) -> Any:
    config = QWenConfig(**TINY | overrides)
    model = QWenLMHeadModel._from_config(config, attn_implementation="luthier")
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator(0, name))
            p.copy_((p if p.ndim == 1 else 0.0) + 0.15 * noise)
    install(model, attention)
    return model.eval()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_are_as_alone(
    kernel: str, training: bool, random_batch: Any, relative: Callable[..., float]
) -> None:
    """Each document is stretched by its own length, in evaluation; in training none is."""
    model = tiny_qwen(kernel).train(training)
    batch = random_batch(96, LENGTHS)
    hidden = Stage(model)(batch)
    weight = torch.randn(24, 32, generator=generator(0, "weight"))
    losses, wanted = [], []
    for i, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            stop = start + length
            plain = model.transformer(batch.input_ids[i : i + 1, start:stop])[0][0]
            assert (
                relative(hidden[i, start:stop], plain) < 3e-6
            )  # rounding of fp32 over three layers
            losses.append((hidden[i, start:stop] * weight[start:stop]).sum())
            wanted.append((plain * weight[start:stop]).sum())
            start = stop
    torch.stack(losses).sum().backward()
    packed = gradients(model)
    torch.stack(wanted).sum().backward()
    for name, plain in gradients(model).items():
        assert relative(packed[name], plain) < 1e-5, name


def test_the_stage_is_the_plain_model() -> None:
    check_stage(Stage(tiny_qwen()))


def test_alpha_grows_at_each_doubling() -> None:
    lengths = torch.tensor([0, 1, 8, 9, 16, 17, 32, 33, 64])
    assert ntk_alpha(lengths, 8).tolist() == [1, 1, 1, 3, 3, 7, 7, 15, 15]


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_recomputation_changes_nothing(
    mode: Any, random_batch: Any, relative: Callable[..., float]
) -> None:
    model, batch = tiny_qwen().train(), random_batch(96, LENGTHS)
    stage = Stage(model)
    stage(batch).square().sum().backward()
    kept = gradients(model)
    set_recompute(stage, mode)
    stage(batch).square().sum().backward()
    again = gradients(model)
    assert all(relative(again[name], kept[name]) == 0.0 for name in kept)


@pytest.mark.parametrize("rate", ["emb_dropout_prob", "attn_dropout_prob"])
def test_dropout_is_of_the_row(rate: str, random_batch: Any) -> None:
    model, batch = tiny_qwen(**{rate: 0.3}), random_batch(96, [[5, 3]])
    calm = Stage(model)(batch)
    seed_dropout(model, 7)
    first, again = (Stage(model.train())(batch) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, calm)


@pytest.mark.parametrize("cache", [True, False])
def test_a_padded_batch_answers_as_alone(cache: bool, relative: Callable[..., float]) -> None:
    """Within seq_length; beyond it the original counts places in the padded row."""
    model = tiny_qwen(seq_length=64)
    draw = generator(0, "prompts")
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (3, 9, 6)]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    with quiet(), torch.no_grad():
        together = model.generate(ids, attention_mask=mask, **options)
        for i, prompt in enumerate(prompts):
            plain = list(prompt)
            for step in range(8):
                logits = model(torch.tensor([plain])).logits[0, -1]
                assert relative(together.logits[step][i], logits) < 1e-5
                plain.append(int(logits.argmax()))
            assert together.sequences[i, 9:].tolist() == plain[len(prompt) :]


def test_the_house_generates() -> None:
    model = tiny_qwen(seq_length=64)
    draw = generator(0, "prompts")
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (3, 9, 6)]
    options = GenerateOptions(max_new_tokens=6)
    found = generate(model, prompts, options, pad_id=0, stop_ids=[1], micro_batch=3)
    assert found == [
        generate(model, [p], options, pad_id=0, stop_ids=[1], micro_batch=1)[0] for p in prompts
    ]


def test_positions_are_not_looked_at_in_a_plain_call() -> None:
    model, ids = tiny_qwen(), torch.arange(6)[None]
    assert torch.equal(model(ids).logits, model(ids, position_ids=ids * 5).logits)


def test_a_norm_rounds_before_its_weight() -> None:
    """Normalised in float32, cast, then weighted: the order shows in bfloat16."""
    norm = RMSNorm(64, 1e-6)
    draw = generator(0, "norm")
    norm.weight.data = 1 + torch.rand(64, generator=draw)
    norm, x = norm.bfloat16(), torch.randn(4, 64, generator=draw).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).bfloat16())


def test_turns_are_float32_in_half_precision() -> None:
    """In bfloat16 places above 256 would collapse: neighbours must stay apart."""
    from luthier.models.zoo.qwen import rotary

    places = torch.tensor([[1000, 1001]])
    cos, _ = rotary(places, torch.ones(1, 1, dtype=torch.float64), 8, 10000.0)
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0, 0], cos[0, 1])


def test_part_of_each_head_may_turn() -> None:
    """rotary_pct: the other dims carry no place, so that places do not matter to them."""
    full, part = tiny_qwen(), tiny_qwen(rotary_pct=0.5)
    ids = torch.arange(6)[None]
    assert not torch.allclose(full(ids).logits, part(ids).logits)
    check_stage(Stage(part))


def test_files_are_the_originals(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny_qwen()
    save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = {f"transformer.h.0.{name}" for name in (
        "ln_1.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "ln_2.weight",
        "mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight",
    )}  # fmt: skip
    assert {name for name in names if ".h.0." in name} == layer
    assert names >= {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["model_type"] == "qwen"
    assert {"kv_channels", "seq_length", "use_dynamic_ntk", "use_logn_attn"} <= set(config)
    with quiet():
        again = QWenLMHeadModel.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_older_files_are_read(tmp_path: Path) -> None:
    """Keys and defaults of the code of August 2023."""
    old = {
        "model_type": "qwen",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "kv_channels": 8,
        "ffn_hidden_size": 96,
        "n_positions": 64,
        "vocab_size": 96,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config: Any = load_config(tmp_path)
    wanted = TINY | {"seq_length": 2048, "layer_norm_epsilon": 1e-5}
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"use_cache_quantization": True}, "int8 cache"),
        ({"kv_channels": 16}, "do not make up"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen"} | TINY | change))
    with pytest.raises(Refused, match=message):
        load_config(tmp_path)
    with pytest.raises(Refused, match=message), quiet():
        AutoConfig.from_pretrained(tmp_path)
