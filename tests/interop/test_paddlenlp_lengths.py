"""PaddleNLP's long-sequence arguments and PoSE, as what they become here."""

from __future__ import annotations

import json

import pytest

from luthier.errors import Refused
from luthier.interop.read import read_config

BASE = {
    "model_name_or_path": "m",
    "dataset_name_or_path": "d",
    "output_dir": "o",
    "max_length": 512,
    "use_long_sequence_strategies": True,
    "strategy_type": "embedding_strategies",
    "rope_scaling_factor": 4,
}
ORIGINAL = {"original_max_position_embeddings": 512}


def read(tmp_path, *overrides, **keys):
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(BASE | keys))
    return read_config([path], overrides)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("RotaryEmbedding", None),
        ("LinearScalingRotaryEmbedding", {"type": "linear"}),
        ("NTKScalingRotaryEmbedding", {"type": "ntk"}),
        ("DynamicNTKScalingRotaryEmbedding", {"type": "dynamic", **ORIGINAL}),
        ("YaRNScalingRotaryEmbedding", {"type": "yarn", **ORIGINAL}),
    ],
)
def test_strategies(name, wanted, tmp_path):
    found = read(tmp_path, strategy_name=name)
    scaling = found.config.model.rope_scaling
    if wanted is None:
        assert scaling is None
    else:
        assert scaling.model_dump(exclude_none=True) == {"factor": 4.0, **wanted}
    assert found.config.data.length == 512


def test_their_own_yarn_is_asked_for_beside_the_file(tmp_path):
    words = "model.rope_scaling.type=yarn_paddlenlp"
    found = read(tmp_path, words, strategy_name="YaRNScalingRotaryEmbedding")
    assert found.config.model.rope_scaling.type == "yarn_paddlenlp"
    assert found.config.model.rope_scaling.factor == 4.0
    assert any(words in remark for remark in found.remarks)


def test_alibi_needs_nothing(tmp_path):
    keys = {"strategy_type": "attention_strategies", "strategy_name": "AttentionWithLinearBias"}
    found = read(tmp_path, **keys)
    assert found.config.model.rope_scaling is None
    assert any("any number of heads" in remark for remark in found.remarks)


def test_pose_is_theirs_up_to_the_scaled_length(tmp_path):
    keys = {"strategy_name": "LinearScalingRotaryEmbedding", "use_pose_convert": True}
    found = read(tmp_path, autoregressive=True, **keys).config.data
    assert (found.pose, found.pose_window, found.format) == ("paddlenlp", 2048, "text")
    alone = read(tmp_path, **keys)
    assert alone.config.data.pose == "off"
    assert "use_pose_convert does nothing without autoregressive=true" in alone.remarks


def test_without_the_switch_the_rest_does_nothing(tmp_path):
    keys = {"use_long_sequence_strategies": False, "strategy_name": "YaRNScalingRotaryEmbedding"}
    found = read(tmp_path, **keys)
    assert found.config.model.rope_scaling is None
    assert any("do nothing: strategy_name" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy_type": "embeding_strategies"}, "did you mean 'embedding_strategies'"),
        ({"strategy_name": "YarnScalingRotaryEmbedding"}, "did you mean 'YaRNScaling"),
        ({"strategy_name": "AttentionWithLinearBias"}, "known here: RotaryEmbedding"),
        ({"rope_scaling_factor": 0.5, "strategy_name": "NTKScalingRotaryEmbedding"}, "factor"),
    ],
)
def test_unknown_ones_are_refused(keys, words, tmp_path):
    with pytest.raises(Refused, match=words):
        read(tmp_path, **keys)
