"""Families beyond those of `test_packing`: packed rows, head and dropout against plain transformers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier import seeding
from luthier.batch import Layout
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.stage import Stage, check_stage

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
RATES = {"residual_dropout": 0.2, "embedding_dropout": 0.2, "attention_dropout": 0.2}
FAMILIES = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOWED,
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 1.0, **WINDOWED},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **WINDOWED},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
    "phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "phi3": {"resid_pdrop": 0.2},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "seed_oss": {"head_dim": 16, **RATES},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": RATES,
}
DOCUMENTS = [[5, 3, 7], [8, 4], [1, 14]]


def _models(family):
    """Ours, and plain transformers' with the same weights."""
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(ours.state_dict())
    install(ours, "auto", train=True)
    return ours, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_plain(family, random_batch, relative):
    ours, plain = _models(family)
    stage = Stage(ours)
    check_stage(stage)
    batch = random_batch(lengths_per_row=DOCUMENTS)
    with torch.no_grad():
        hidden = stage(batch)
        for s in Layout.of(batch).segments:
            ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
            reference = plain(input_ids=ids, use_cache=False).logits[0]
            assert relative(stage.head(hidden[s.row, s.start : s.stop]), reference) < 1e-6


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "seed_oss", "starcoder2"])
def test_dropout_is_seeded_where_plain_transformers_drops(family, random_batch, monkeypatch):
    """In one document of one row: as many units at the same rates, and none by torch's generator."""
    functional = torch.nn.functional
    plain_calls, our_calls = [], []
    torchs, seeded = functional.dropout, seeding.dropout

    def count_torchs(x, p=0.5, training=True, inplace=False):
        plain_calls.append((p, x.numel())) if training and p else None
        return torchs(x, p, training)

    def count_ours(x, p, **kwargs):
        our_calls.append((p, x.numel())) if p else None
        return seeded(x, p, **kwargs)

    monkeypatch.setattr(functional, "dropout", count_torchs)
    monkeypatch.setattr(seeding, "dropout", count_ours)
    ours, plain = _models(family)
    batch = random_batch(lengths_per_row=[[9]])
    plain.train()(input_ids=batch.input_ids, use_cache=False)
    expected = list(plain_calls)
    assert expected
    seed_dropout(ours, 1)
    Stage(ours).train()(batch)
    assert our_calls == expected and plain_calls == expected
