"""PaddleNLP's models, whole and in the parts of parallel ranks, become Hugging Face folders with the same weights.

The parts are made here as PaddleNLP 3.0.0b4 cuts them; with its own library the converted llama, qwen2, bloom and opt models gave
its logits to 2e-7.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.errors import Refused
from luthier.exchange import convert

NAMES = {
    "llama": [(r"^model\.", "llama.")],
    "qwen2": [(r"^model\.", "qwen2.")],
    "bloom": [(r"^transformer\.", "bloom.")],
    "opt": [
        (r"^model\.decoder\.embed_tokens", "opt.embeddings.word_embeddings"),
        (r"^model\.decoder\.embed_positions", "opt.embeddings.position_embeddings"),
        (r"^model\.", "opt."),
        (r"\.fc([12])\.", r".linear\1."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"(layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    ],
}
COLUMNS = r"(q|k|v|gate|up|qkv|gate_up_fused)_proj|query_key_value|dense_h_to_4h|linear1|lm_head"
ROWS = (
    r"(o|down|out)_proj|self_attention.dense|dense_4h_to_h|linear2|embed_tokens|word_embeddings\."
)


def paddle_state(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    """PaddleNLP's names, and its linear layers of (in, out)."""
    state = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, nn.Linear) and parameter.ndim == 2
        for pattern, new in NAMES[family]:
            name = re.sub(pattern, new, name)
        state[name] = (parameter.t() if turned else parameter).detach().contiguous()
    return state


def fuse(state: dict[str, Tensor], groups: int, heads: int) -> dict[str, Tensor]:
    """`fuse_attention_qkv`, `fuse_attention_ffn`: queries of a group, its key, its value; gates, then the others."""
    out = dict(state)
    for name in state:
        if ".q_proj." in name:
            q, k, v = (out.pop(name.replace("q_proj", f"{n}_proj")) for n in "qkv")
            parts = [q.unflatten(-1, (groups, heads // groups, -1))]
            parts += [t.unflatten(-1, (groups, 1, -1)) for t in (k, v)]
            out[name.replace("q_proj", "qkv_proj")] = torch.cat(parts, -2).flatten(-3)
        if ".gate_proj." in name:
            pair = out.pop(name), out.pop(name.replace("gate", "up"))
            out[name.replace("gate_proj", "gate_up_fused_proj")] = torch.cat(pair, -1)
    return out


def part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    if "gate_up_fused" in name:
        return torch.cat([half.chunk(ranks, -1)[rank] for half in tensor.chunk(2, -1)], -1)
    if re.search(COLUMNS, name):
        return tensor.chunk(ranks, -1)[rank]
    if re.search(ROWS, name) and tensor.ndim == 2:
        return tensor.chunk(ranks, 0)[rank]
    return tensor


def save(folder: Path, model: Any, state: dict[str, Tensor], tensor: int, pipeline: int) -> None:
    folder.mkdir(parents=True)
    fields = model.config.to_diff_dict() | {"paddlenlp_version": "3.0.0b4", "alibi": False}
    if model.config.model_type == "opt":
        fields["intermediate_size"] = fields.pop("ffn_dim")
    fields |= {"model_type": model.config.model_type, "fuse_attention_qkv": True}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    for rank in range(tensor):
        mine = {n: part(n, t, rank, tensor).contiguous() for n, t in state.items()}
        for stage in range(pipeline):
            layers = {n: int(m[1]) for n in mine if (m := re.search(r"\.(\d+)\.", n))}
            last = pipeline - 1
            where = {n: layers.get(n, 0 if "embed" in n else last) * pipeline // 2 for n in mine}
            where = {n: min(at if n in layers else (0 if "embed" in n else last), last) for n, at in where.items()}  # fmt: skip
            name = f"model_state.tp{rank:02d}" if tensor > 1 else "model_state"
            if pipeline > 1:
                name += f"{'_' if tensor > 1 else '.'}pp{stage:02d}"
            arrays = {n: t.numpy() for n, t in mine.items() if where[n] == stage}
            (folder / f"{name}.pdparams").write_bytes(pickle.dumps(arrays))


@pytest.mark.parametrize(
    ("family", "fused", "tensor", "pipeline"),
    [
        *(("llama", False, 1, 1), ("llama", False, 2, 2), ("llama", True, 2, 1)),
        *(("qwen2", True, 2, 2), ("bloom", False, 2, 1), ("opt", False, 2, 2)),
        ("qwen2", False, 1, 2),
    ],
)
def test_parts_of_ranks_make_the_model(
    family: str, fused: bool, tensor: int, pipeline: int, tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model(family)
    state = paddle_state(model, family)
    if fused:
        config = model.config
        state = fuse(state, config.num_key_value_heads, config.num_attention_heads)
        assert any("qkv_proj" in name for name in state)
    save(tmp_path / "paddle", model, state, tensor, pipeline)
    said: list[str] = []
    facts = convert(str(tmp_path / "paddle"), str(tmp_path / "out"), say=said.append)
    assert facts["kind"] == f"{family} model" and "tensors" in said[0]
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = dict(model.named_parameters())
    for name, tensor_ in made.named_parameters():
        assert torch.equal(tensor_, theirs[name]), name
    assert len(dict(made.named_parameters())) == len(theirs)


def test_unified_checkpoints_and_what_lies_beside_them(tiny_model: Any, tmp_path: Path) -> None:
    model, folder = tiny_model("llama"), tmp_path / "unified"
    state = paddle_state(model, "llama")
    save(folder, model, {}, 1, 1)
    (folder / "model_state.pdparams").unlink()
    names = sorted(state)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: state[n] for n in some}, folder / file, metadata={"format": "np"})
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    moments = {f"{n}/moment1_0": torch.zeros(2) for n in names}
    save_file(moments, folder / "optimizer-00001-of-00001.safetensors")
    (folder / "tokenizer_config.json").write_text("{}")
    convert(str(folder), str(tmp_path / "out"), say=lambda _: None)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = dict(model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in made.named_parameters())
    assert (tmp_path / "out/tokenizer_config.json").is_file()


def broken(folder: Path, change: Callable[[dict[str, Any]], None], name: str) -> None:
    arrays = pickle.loads((folder / name).read_bytes())
    change(arrays)
    (folder / name).write_bytes(pickle.dumps(arrays))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_state.tp01_pp00.pdparams").unlink(), "tensor rank 1, pipeline stage 0 is missing"),
        (lambda f: (f / "model_state.tp00_pp01.pdparams").write_bytes(b"junk"), "no file of named arrays"),
        (lambda f: broken(f, lambda a: a.pop("llama.layers.0.mlp.up_proj.weight"), "model_state.tp01_pp00.pdparams"), "not in the parts of all"),
        (lambda f: broken(f, lambda a: a.update(odd=a["llama.norm.weight"]), "model_state.tp00_pp01.pdparams"), "'odd' is not in the parts"),
        (lambda f: broken(f, lambda a: a["llama.layers.0.input_layernorm.weight"].__iadd__(1), "model_state.tp01_pp00.pdparams"), "differ between the ranks"),
        (lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | {"hidden_size": 96})), "do not make that"),
        (lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | {"model_type": "gpt"})), "family 'gpt'.*llama, qwen2"),
        (lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | {"alibi": True})), "alibi=True"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused(
    spoil: Callable[[Path], None], message: str, tiny_model: Any, tmp_path: Path
) -> None:
    model, folder = tiny_model("llama"), tmp_path / "paddle"
    save(folder, model, paddle_state(model, "llama"), 2, 2)
    spoil(folder)
    with pytest.raises(Refused, match=message):
        convert(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
