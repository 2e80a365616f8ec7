"""PaddleNLP's models -> Hugging Face folders: unified safetensors, `.pdparams`, and the parts of parallel ranks.

The parts are `model_state[.tpXX][_ppYY].pdparams`. How a tensor was cut is told by its shape beside the whole's, which
the config gives; pipeline stages already use the names of the whole. Paddle's linear layers are (in, out). Optimiser states
are left: a run goes on with its weights, or by Luthier's own checkpoints.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from luthier.errors import Refused
from luthier.files import publish
from luthier.interop.pickles import read_arrays
from luthier.models.folder import read_json
from luthier.models.load import blueprint, quiet
from luthier.tensorfiles import write_tensors

PART = re.compile(r"model_state(?:\.tp(\d+))?(?:[._]pp(\d+))?\.pdparams")
# PaddleNLP's (root, names inside) -> transformers', by family
ROOTS = {
    **{name: (name, "model") for name in ("llama", "qwen2", "mistral")},
    "bloom": ("bloom", "transformer"),
    "opt": ("opt", "model"),
}
RENAMED = {
    "opt": [
        (r"^model\.embeddings\.word_embeddings", "model.decoder.embed_tokens"),
        (r"^model\.embeddings\.position_embeddings", "model.decoder.embed_positions"),
        (r"\.linear([12])\.", r".fc\1."),
        (r"\.norm1\.", ".self_attn_layer_norm."),
        (r"\.norm2\.", ".final_layer_norm."),
    ]
}
KEYS = {"opt": {"intermediate_size": "ffn_dim", "hidden_dropout_prob": "dropout"}}
KEYS["opt"] |= {"normalize_before": "do_layer_norm_before", "hidden_act": "activation_function"}
OWN_HEAD = "lm_head.decoder_weight"
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER += ("chat_template.*", "*.model")
Parts = Sequence[Tensor]  # of a tensor, by tensor-parallel rank


def is_paddle_model(folder: Path) -> bool:
    """Whether a folder holds a model that PaddleNLP saved."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    if any(PART.fullmatch(path.name) for path in folder.iterdir()):
        return True
    return "paddlenlp_version" in read_json(config, folder) and any(folder.glob("*.safetensors"))


def convert_model(folder: Path, target: Path) -> dict[str, Any]:
    """Write the model of `folder` to `target` as transformers loads it; what was done, in words.

    Raises Refused for families whose layers transformers arranges otherwise, for parts that are missing and for
    tensors that do not fit the config.
    """
    fields = read_json(folder / "config.json", folder)
    config = _config(folder, fields)
    family = config.model_type
    found, ranks = _read(folder)
    if OWN_HEAD in found:  # OPT's, which need not be the embedding
        config.tie_word_embeddings = False
    model = blueprint(config, str(folder))
    ours = {_name(name, family): parts for name, parts in found.items() if "inv_freq" not in name}
    ours = dict(_unfused(ours, config))
    made: dict[str, Tensor] = {}
    for name, whole in model.named_parameters():
        if name not in ours:
            raise Refused(
                f"converting {folder}",
                f"no file of it holds '{name}' (of {len(found)} tensors)",
                "copy the whole folder, with the parts of every rank",
            )
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, nn.Linear) and whole.ndim == 2
        joined = _joined(ours.pop(name), tuple(whole.shape)[:: -1 if turned else 1], name, folder)
        made[name] = (joined.t() if turned else joined).contiguous()
    tied = "lm_head." if config.tie_word_embeddings else "\0"
    left = sorted(name for name in ours if not name.startswith(tied))
    if left:
        raise Refused(
            f"converting {folder}",
            f"'{left[0]}' has no place in a model of the family '{family}'",
            "check that config.json belongs to these weights",
        )
    dtype = next(iter(made.values())).dtype
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    with publish(target, manifest=False) as partial:
        with quiet():
            config.save_pretrained(partial)
        write_tensors(partial / "model.safetensors", made)
        copied = {path for pattern in TOKENIZER for path in folder.glob(pattern)}
        for path in sorted(copied):
            if path.is_file() and path.suffix not in (".safetensors", ".pdparams"):
                shutil.copy2(path, partial / path.name)
    name = str(dtype).removeprefix("torch.")
    return {"kind": f"{family} model", "tensors": len(made), "dtype": name, "parts": ranks}


def _config(folder: Path, fields: dict[str, Any]) -> PretrainedConfig:
    family = str(fields.get("model_type"))
    asked = f"converting {folder}"
    if family not in ROOTS:
        raise Refused(
            asked,
            f"PaddleNLP's family '{family}' has other layers than transformers'",
            f"known are {', '.join(ROOTS)}",
        )
    for key, usual in (("alibi", False), ("rope_scaling_type", None)):
        if fields.get(key, usual) != usual:
            raise Refused(
                asked,
                f"its config has {key}={fields[key]}, which transformers' {family} has not",
                "train with model.rope_scaling on the unscaled model"
                if "rope" in key
                else "use another model",
            )
    names = KEYS.get(family, {})
    known = AutoConfig.for_model(family).to_dict().keys() | {"rope_theta", "pad_token_id"}
    taken = {names.get(key, key): value for key, value in fields.items()}
    taken = {
        key: value
        for key, value in taken.items()
        if key in known and key not in ("model_type", "dtype", "architectures")
    }
    return AutoConfig.for_model(family, **taken)


def _name(name: str, family: str) -> str:
    theirs, ours = ROOTS[family]
    name = re.sub(rf"^{theirs}\.", f"{ours}.", name)
    for pattern, new in RENAMED.get(family, ()):
        name = re.sub(pattern, new, name)
    return name


def _read(folder: Path) -> tuple[dict[str, list[Tensor]], str]:
    """Tensors by PaddleNLP's names, of each the parts by tensor-parallel rank; how many ranks there were, in words."""
    files = {
        (int(match[1] or 0), int(match[2] or 0)): path
        for path in sorted(folder.iterdir())
        if (match := PART.fullmatch(path.name))
    }
    if not files:
        return {name: [tensor] for name, tensor in _unified(folder).items()}, "1"
    tensor, pipeline = (1 + max(key[axis] for key in files) for axis in (0, 1))
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in files]
    if missing:
        raise Refused(
            f"converting {folder}",
            f"the part of tensor rank {missing[0][0]}, pipeline stage {missing[0][1]} is missing "
            f"({len(files)} of {tensor * pipeline} are there)",
            "copy the parts of all ranks into the folder",
        )
    found: dict[str, list[Tensor]] = {}
    for rank in range(tensor):
        whole: dict[str, Tensor] = {}
        for stage in range(pipeline):
            whole |= read_arrays(files[rank, stage])
        for name, part in whole.items():
            found.setdefault(name, []).append(part)
    short = sorted(name for name, parts in found.items() if len(parts) != tensor)
    if short:
        raise Refused(
            f"converting {folder}",
            f"'{short[0]}' is not in the parts of all tensor ranks",
            "copy the parts of one run, and of all its ranks",
        )
    return found, f"{tensor} x {pipeline}" if len(files) > 1 else "1"


def _unified(folder: Path) -> dict[str, Tensor]:
    """The weights of a unified checkpoint; what continues its training lies in other files."""
    found: dict[str, Tensor] = {}
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index, folder).get("weight_map", {}).values())
    for name in sorted(names):
        try:
            found |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise Refused(
                f"reading {folder / name}",
                f"it is missing or corrupt ({str(error).splitlines()[0][:120]})",
                "copy the folder again",
            ) from error
    return found


def _unfused(tensors: Mapping[str, Parts], config: PretrainedConfig) -> Iterator[tuple[str, Parts]]:
    """Fused projections of PaddleNLP as the single ones of transformers.

    Gates and what they gate lie side by side in each rank's part; queries, keys and values group by group: the queries of
    a group, its key, its value.
    """
    for name, parts in tensors.items():
        if ".gate_up_fused_proj." in name:
            for number, single in enumerate(("gate_proj", "up_proj")):
                halves = [part.chunk(2, -1)[number] for part in parts]
                yield name.replace("gate_up_fused_proj", single), halves
        elif ".qkv_proj." in name:
            heads = config.num_attention_heads
            groups = getattr(config, "num_key_value_heads", None) or heads
            width = config.hidden_size // heads
            whole = torch.cat(list(parts), -1).unflatten(-1, (groups, heads // groups + 2, width))
            for single, which in (
                ("q", slice(0, -2)),
                ("k", slice(-2, -1)),
                ("v", slice(-1, None)),
            ):
                yield name.replace("qkv_proj", f"{single}_proj"), [whole[..., which, :].flatten(-3)]
        elif name == OWN_HEAD:
            yield "lm_head.weight", [part.t() for part in parts]
        else:
            yield name, parts


def _joined(parts: Parts, shape: tuple[int, ...], name: str, folder: Path) -> Tensor:
    """The whole tensor of `shape`: cut along the axis on which the parts fall short, or the same on every rank."""
    first = parts[0]
    if tuple(first.shape) == shape and all(torch.equal(first, part) for part in parts[1:]):
        return first
    short = [
        axis
        for axis in range(len(shape))
        if len(first.shape) == len(shape) and sum(p.shape[axis] for p in parts) == shape[axis]
    ]
    for axis in short:
        whole = [size for other, size in enumerate(shape) if other != axis]
        if all([s for a, s in enumerate(p.shape) if a != axis] == whole for p in parts):
            return torch.cat(list(parts), axis)
    sizes = ", ".join(str(list(part.shape)) for part in parts[:4])
    raise Refused(
        f"converting {folder}",
        f"'{name}' is {list(shape)} by the config; its parts of {sizes} do not make that"
        + (", or differ between the ranks" if tuple(first.shape) == shape else ""),
        "check that all parts and config.json are of one run",
    )
