"""ChatGLM-6B and ChatGLM2-6B as members of the house: packing, generation, recomputation, files, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from luthier.batch import IGNORE, PADDING, Batch, Layout
from luthier.errors import Refused
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.generate import GenerateOptions, generate
from luthier.models.load import quiet, save_model
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.models.zoo.chatglm import (
    ChatGLMConfig,
    ChatGLMForCausalLM,
    is_chatglm_v1,
    position_ids_of,
    rotary_table,
)
from luthier.models.zoo.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM, ChatGLM2RMSNorm
from luthier.seeding import generator

MASK, GMASK, SOP, EOP, PAD = 90, 91, 92, 93, 3
V1: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "max_sequence_length": 64,
    "bos_token_id": SOP,
    "eos_token_id": EOP,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": PAD,
}
V2: dict[str, Any] = {
    "padded_vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 12,  # 4 x 12 is not the hidden size
    "ffn_hidden_size": 40,
    "seq_length": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chatglm": (ChatGLMConfig, ChatGLMForCausalLM, V1),
    "chatglm2": (ChatGLM2Config, ChatGLM2ForCausalLM, V2),
}
# documents of each row: tokens of context with its mask token, and of the answer with <sop>
DOCUMENTS = [[(4, 3), (2, 5), (6, 2)], [(3, 4), (5, 3)]]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}


def tiny(family: str, dtype: torch.dtype = torch.float32, kernel: str = "auto") -> Any:
    """A random model whose every parameter matters, attention installed."""
    config, cls, fields = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        model = cls(config(**fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator(0, name))
            p.data = ((p if p.ndim == 1 else 0.0) + 0.2 * noise).to(dtype)
    install(model.eval(), kernel)
    return model


def document(family: str, context: int, answer: int, draw: Any) -> Tensor:
    """Ids [context + answer] as the family's tokenizer would order them."""
    ids = torch.randint(4, 88, (context + answer,), generator=draw)
    if family == "chatglm":
        ids[context - 1], ids[context] = (GMASK if context % 2 else MASK), SOP
    return ids


def packed(family: str) -> Batch:
    """Rows of `DOCUMENTS`, all but contexts supervised; the second one ends in padding."""
    draw = generator(1, "documents")
    width = max(sum(c + a for c, a in row) for row in DOCUMENTS)
    shape = (len(DOCUMENTS), width)
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    documents = torch.full(shape, PADDING)
    axes = (2,) if family == "chatglm" else ()
    positions = torch.zeros(len(DOCUMENTS), *axes, width, dtype=torch.long)
    for i, row in enumerate(DOCUMENTS):
        at = 0
        for number, (context, answer) in enumerate(row):
            part = slice(at, at + context + answer)
            ids[i, part] = document(family, context, answer, draw)
            labels[i, at + context - 1 : part.stop - 1] = ids[i, at + context : part.stop]
            documents[i, part] = number
            one = ids[i : i + 1, part]
            positions[i, ..., part] = (
                position_ids_of(one, FAMILIES[family][0](**FAMILIES[family][2]))[0]
                if axes
                else torch.arange(one.shape[1])
            )
            at = part.stop
    return Batch(ids, labels, positions, documents, (0, 1))


def loss_of(stage: Stage, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = stage(batch)
    keep = batch.labels != IGNORE
    return hidden, F.cross_entropy(stage.head(hidden[keep]), batch.labels[keep], reduction="sum")


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(
    family: str, dtype: torch.dtype, kernel: str, relative: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, logits, loss and gradients; positions and contexts restart in each document."""
    if dtype == torch.float64:  # angles and norms are float32 by design; here they shall not be
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    batch, model, other = packed(family), tiny(family, dtype, kernel), tiny(family, dtype, "sdpa")
    stage = Stage(model)
    hidden, loss = loss_of(stage, batch)
    loss.backward()
    total = torch.zeros((), dtype=dtype)
    for s in Layout.of(batch).segments:
        ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
        states: list[Tensor] = []
        norm = getattr(other.transformer, "encoder", other.transformer).final_layernorm
        hook = norm.register_forward_hook(lambda m, i, out, states=states: states.append(out))
        logits = other(input_ids=ids, use_cache=False).logits[0]
        hook.remove()
        mine = hidden[s.row, s.start : s.stop]
        assert relative(mine, states[0][0]) < TOLERANCE[dtype]
        assert relative(stage.head(mine), logits) < TOLERANCE[dtype]
        labels = batch.labels[s.row, s.start : s.stop]
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    total.backward()
    assert relative(loss, total) < TOLERANCE[dtype]
    reference = {n: p.grad for n, p in other.named_parameters()}
    for name, p in model.named_parameters():
        assert relative(p.grad, reference[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("mode", ["layer", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation(family: str, mode: Any) -> None:
    batch, gradients = packed(family), []
    for recompute in ("none", mode):
        stage = Stage(tiny(family).train())
        set_recompute(stage, recompute)
        loss_of(stage, batch)[1].backward()
        gradients.append({n: p.grad for n, p in stage.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_padded_batch_are_those_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = generator(2, "prompts")
    prompts = [document(family, n, 1, draw).tolist() for n in (3, 9, 5, 6)]
    model = tiny(family)
    # of random weights residuals this large make nothing but the last token, again and again
    monkeypatch.setattr("luthier.models.zoo.chatglm.ALPHA", 0.3)
    options = GenerateOptions(max_new_tokens=6)

    def answer(rows: list[list[int]], micro_batch: int) -> list[list[int]]:
        return generate(model, rows, options, pad_id=PAD, stop_ids=[], micro_batch=micro_batch)

    alone = [answer([prompt], 1)[0] for prompt in prompts]
    assert answer(prompts, 4) == alone
    assert len({tuple(a) for a in alone}) > 2  # the prompts matter
    for prompt, expected in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt])
        for _ in expected:
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert ids[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_left_padding_are_finite_and_those_alone(
    family: str, attention: str, relative: Any
) -> None:
    draw = generator(3, "padded")
    ids = document(family, 4, 3, draw)[None]
    wide = F.pad(ids, (5, 0), value=PAD)
    real = F.pad(torch.ones_like(ids), (5, 0))
    found = []
    for row, mask in ((ids, None), (wide, real)):
        model = tiny(family)
        model.set_attn_implementation(attention)
        labels = torch.where(torch.arange(row.shape[1]) < row.shape[1] - 3, IGNORE, row)
        model(input_ids=row, attention_mask=mask, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[1].items():
        # ChatGLM2's default positions count the padding: the same angles up to rounding
        assert relative(gradient, found[0][name]) < 1e-5, name


def test_chunked_prefill_of_chatglm2(relative: Any) -> None:
    model, ids = tiny("chatglm2"), torch.randint(4, 88, (2, 11), generator=generator(4, "chunks"))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert relative(torch.cat([first.logits, second.logits], dim=1), whole) < 2e-6


def test_bfloat16_keeps_what_the_original_computes_in_float32() -> None:
    norm = ChatGLM2RMSNorm(64, 1e-5)
    norm.weight.data = torch.randn(64, generator=generator(5, "norm")).bfloat16()
    x = torch.randn(8, 64, generator=generator(5, "x")).bfloat16()
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), (norm.weight.float() * scaled).bfloat16())
    assert not torch.equal(norm(x), norm.weight * scaled.bfloat16())  # llama's order
    places = torch.tensor([[[300, 301], [0, 0]]])
    cos, _ = rotary_table(places, 16)
    assert cos.dtype == torch.float32 and not torch.equal(cos[:, :, 0], cos[:, :, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_under_the_original_names(family: str, tmp_path: Path) -> None:
    _, cls, fields = FAMILIES[family]
    model = tiny(family)
    save_model(model, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert stored["model_type"] == "chatglm"
    assert {key: stored[key] for key in fields} == fields
    assert is_chatglm_v1(stored) == (family == "chatglm")
    tensors = load_file(tmp_path / "model.safetensors")
    with quiet():
        again = cls.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], p)
        assert name in tensors
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (family == "chatglm")


def test_released_buffers_are_passed_over(tmp_path: Path) -> None:
    """Files of both families hold frequencies; those of ChatGLM2 in the type of the model."""
    for family, name in (
        ("chatglm", "transformer.layers.1.attention.rotary_emb.inv_freq"),
        ("chatglm2", "transformer.rotary_pos_emb.inv_freq"),
    ):
        folder = tmp_path / family
        save_model(tiny(family), folder)
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name: torch.zeros(2)}, file, metadata={"format": "pt"})
        with quiet():
            _, info = FAMILIES[family][1].from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("unexpected_keys", "missing_keys"))


def test_the_original_mask_in_generate() -> None:
    model = tiny("chatglm")
    ids = document("chatglm", 5, 1, generator(6, "ids"))[None]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    hidden = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
    hidden[..., :5] = False
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, attention_mask=hidden, **given), plain)
    hidden[..., 2, 3] = True
    with pytest.raises(Refused, match="not the one of its rows' context and padding"):
        model.generate(ids, attention_mask=hidden, **given)


# ---- bad input


def v1_under_v2(folder: Path) -> None:
    save_model(tiny("chatglm2"), folder)
    ChatGLMConfig(**V1).save_pretrained(folder)
    ChatGLMForCausalLM.from_pretrained(folder)


def v2_under_v1(folder: Path) -> None:
    save_model(tiny("chatglm"), folder)
    ChatGLM2Config(**V2).save_pretrained(folder)
    ChatGLM2ForCausalLM.from_pretrained(folder)


def int4_weights(folder: Path) -> None:
    save_model(tiny("chatglm"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.layers.0.attention.dense.weight_scale"
    save_file(tensors | {name: torch.ones(32)}, file, metadata={"format": "pt"})
    ChatGLMForCausalLM.from_pretrained(folder)


def without_sop(folder: Path) -> None:
    tiny("chatglm")(torch.tensor([[5, GMASK, SOP, 6], [5, 6, GMASK, 7]]))


def without_mask_token(folder: Path) -> None:
    tiny("chatglm")(torch.tensor([[5, 6, SOP, 7]]))


def one_axis(folder: Path) -> None:
    ids = torch.tensor([[5, GMASK, SOP, 7]])
    tiny("chatglm")(ids, position_ids=torch.arange(4)[None])


def beyond(family: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tiny(family)(document(family, 60, 5, generator(7, "long"))[None])

    return run


def config(family: str, **changed: Any) -> Callable[[Path], None]:
    return lambda folder: FAMILIES[family][0](**FAMILIES[family][2] | changed)


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("v2 weights, v1 config", v1_under_v2, r"no tensor is called transformer\.layers\.\.\.\.; "),
    ("v1 weights, v2 config", v2_under_v1, r"no tensor is called transformer\.encoder\.\.\.\.; "),
    ("v2 keys", config("chatglm", kv_channels=8), "kv_channels, which belong to the other gen"),
    ("v1 keys", config("chatglm2", inner_hidden_size=8), "inner_hidden_size, which belong to"),
    ("both", lambda f: is_chatglm_v1(V1 | V2), "both inner_hidden_size and padded_vocab_size"),
    ("neither", lambda f: is_chatglm_v1({}), "neither inner_hidden_size nor padded_vocab_size"),
    ("int4 config", config("chatglm", quantization_bit=4), "quantization_bit=4"),
    ("int4 config of v2", config("chatglm2", quantization_bit=4), "quantization_bit=4"),
    ("int4 weights", int4_weights, r"quantised by the original code \(weight_scale\)"),
    ("P-tuning", config("chatglm", pre_seq_len=128), "pre_seq_len=128"),
    ("one axis", config("chatglm", position_encoding_2d=False), "position_encoding_2d=False"),
    ("32k", config("chatglm2", rope_ratio=16), "rope_ratio=16"),
    ("heads", config("chatglm2", multi_query_attention=False), "multi_query_attention=False"),
    ("special id alike", config("chatglm", gmask_token_id=MASK), "gmask_token_id=90.* differ"),
    ("special id outside", config("chatglm", eos_token_id=96), "eos_token_id=96.*vocab_size=96"),
    ("no <sop>", without_sop, r"row 1 has no <sop> \(bos_token_id=92\)"),
    ("no mask token", without_mask_token, r"row 0 has no \[gMASK\] or \[MASK\]"),
    ("positions of one axis", one_axis, r"position_ids have the shape \(1, 4\)"),
    ("too long", beyond("chatglm"), "rows of 65 tokens. it has 64 positions"),
    ("too long for v2", beyond("chatglm2"), "rows of 65 tokens. it has 64 positions"),
]


@pytest.mark.parametrize(("run", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input(run: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        run(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_may_be_wider_than_the_positions(family: str) -> None:
    """Positions restart in each document."""
    one, model = packed(family), tiny(family)
    names = ("input_ids", "labels", "position_ids", "document_ids")
    wide = replace(one, **{name: torch.cat([getattr(one, name)] * 4, dim=-1) for name in names})
    assert wide.input_ids.shape[1] > model.config.max_position_embeddings
    assert Stage(model)(wide).isfinite().all()


@pytest.mark.parametrize("rate", ["attention_dropout", "hidden_dropout"])
def test_dropout_of_chatglm2_is_seeded(rate: str) -> None:
    """No released model has any; what there is depends on the rows alone."""
    fields: dict[str, Any] = V2 | {rate: 0.3}
    model = ChatGLM2ForCausalLM(ChatGLM2Config(**fields)).train()
    install(model, "auto", train=True)
    seed_dropout(model, 0)
    first, second = (Stage(model)(packed("chatglm2")) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, Stage(model.eval())(packed("chatglm2")))
