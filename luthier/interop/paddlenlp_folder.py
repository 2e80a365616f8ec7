"""PaddleNLP's adapter folders -> PEFT's layout.

Paddle stores matrices as (in, out): the factors are turned, but for LoKr's and MoRA's (named forms). Where
PaddleNLP trained from the base's own singular vectors (PiSSA, VeRA) and saved only what came of them, the
base is read and the result is a plain LoRA of twice the rank that gives the trained model; PaddleNLP's own
reloading and merging of such folders is wrong. Names of layers become transformers'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.adapters.reft import parts_of
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.files import publish, write_json
from luthier.interop.pickles import read_arrays
from luthier.models.folder import find_folder, read_json, read_tensors, weight_files

PREFIX = "base_model.model."
# base_model_prefix of PaddleNLP -> where transformers' models have their layers
ROOTS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma"), "model"),
    **{"bloom": "transformer", "qwen": "transformer", "opt": "model"},
}
RENAMED = {"opt": {"linear1": "fc1", "linear2": "fc2"}}
CONFIGS = ("lora_config.json", "vera_config.json", "lokr_config.json", "prefix_config.json")
Layers = dict[str, dict[str, Tensor]]  # layer path -> PaddleNLP's suffix -> tensor


def is_paddle_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that PaddleNLP saved."""
    if any((folder / name).is_file() for name in CONFIGS):
        return True
    config = folder / "config.json"
    return config.is_file() and "representations" in read_json(config, folder)


def convert_adapter(folder: Path, target: Path, base: str | None = None) -> dict[str, Any]:
    """Write the adapter of `folder` to `target` as PEFT or Luthier loads it; what was done, in words.

    `base` (folder or hub name) replaces the recorded name. It is read for PiSSA and VeRA only.
    Raises Refused for what has no equal here, and for what is missing.
    """
    try:
        tensors, fields, made_for = _read(folder, base)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = str(error).splitlines()[0][:120] if str(error) else ""
        raise Refused(
            f"converting {folder}",
            f"its files do not fit together ({type(error).__name__}: {why})",
            "copy the whole folder again",
        ) from error
    fields |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": made_for}
    with publish(target, manifest=False) as partial:
        copies = {n: t.float().clone().contiguous() for n, t in tensors.items()}
        save_file(copies, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(partial / "adapter_config.json", fields | {"inference_mode": True})
    kind = str(fields["peft_type"])
    return {"kind": f"{kind} adapter", "tensors": len(tensors), "base": made_for or "not recorded"}


def _read(folder: Path, base: str | None) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Tensors and fields of a PEFT folder, and the base's name."""
    name = next((name for name in CONFIGS if (folder / name).is_file()), "config.json")
    config = read_json(folder / name, folder)
    made_for = base or config.get("base_model_name_or_path")
    if name == "prefix_config.json":
        tensors, fields = _prefix(folder, config)
    elif name == "config.json":
        tensors, fields = _reft(folder, config)
    else:
        layers = _layers(_weights(folder))
        of: dict[str, Callable[[Layers, Mapping[str, Any], Any], tuple[Layers, dict[str, Any]]]] = {
            "lora_config.json": _lora,
            "vera_config.json": _vera,
            "lokr_config.json": _lokr,
        }
        parts, fields = of[name](layers, config, made_for)
        tensors = {f"{PREFIX}{n}.{s}": t for n, part in parts.items() for s, t in part.items()}
        fields["target_modules"] = sorted(parts)
    if not all(int(fields.get(key, 1)) >= 1 for key in ("r", "rank", "num_virtual_tokens")):
        raise ValueError(f"a rank of {fields.get('r')}")
    return tensors, fields, made_for


def _lora(layers: Layers, config: Mapping[str, Any], base: Any) -> tuple[Layers, dict[str, Any]]:
    rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    if config.get("use_mora"):
        fields = {"peft_type": "LUTHIER_MORA", "form": "paddlenlp", "r": rank}
        return {n: {"mora_M.weight": _one(p, n, "lora_A")} for n, p in layers.items()}, fields
    pairs = {n: (_one(p, n, "lora_A").t(), _one(p, n, "lora_B").t()) for n, p in layers.items()}
    if config.get("pissa"):  # its scale is 1
        weights = _base_weights(base, list(layers), "PiSSA")
        return _minus_principal(pairs, weights, rank), _plain(2 * rank, 2 * rank)
    scale_alpha = alpha * math.sqrt(rank) if config.get("rslora") else alpha
    found = {n: {"lora_A.weight": a, "lora_B.weight": b} for n, (a, b) in pairs.items()}
    fields = _plain(rank, scale_alpha)
    if config.get("lora_use_mixer"):
        for name, part in layers.items():
            found[name]["lora_AB.weight"] = _one(part, name, "lora_AB").t()
        fields["peft_type"] = "LUTHIER_MIXER"
    return found, fields


def _vera(layers: Layers, config: Mapping[str, Any], base: Any) -> tuple[Layers, dict[str, Any]]:
    """W - A0 B0 + s A0 diag(d) B diag(b), where A0 B0 is the principal part of W; A0 is not in the file."""
    rank = int(config.get("r", 8))
    scale = float(config.get("vera_alpha", rank)) / rank
    if not config.get("pissa_init"):
        raise Refused(
            "a VeRA folder without pissa_init",
            "its matrix A was drawn at random and is not in the file",
            "merge it with PaddleNLP",
        )
    weights = _base_weights(base, list(layers), "VeRA")
    pairs = {}
    for name, part in layers.items():
        first, second = _principal(weights[name], rank)  # A0 [R, in], B0 [out, R]
        trained = _one(part, name, "vera_B").t().double()  # [out, R]
        # singular vectors have no sign of their own: take that in which B was trained
        sign = (trained * second).sum(0).sign()
        low = (_one(part, name, "vera_d").double() * sign)[:, None] * first
        high = _one(part, name, "vera_b").double()[:, None] * trained
        pairs[name] = (low, scale * high)
    return _minus_principal(pairs, weights, rank), _plain(2 * rank, 2 * rank)


def _lokr(layers: Layers, config: Mapping[str, Any], base: Any) -> tuple[Layers, dict[str, Any]]:
    rank = int(config.get("lokr_dim", 8))
    fields = {
        "peft_type": "LOKR",
        "r": rank,
        "alpha": float(config.get("lokr_alpha") or rank),  # 0 stands for the rank
        "decompose_both": bool(config.get("decompose_both")),
        "decompose_factor": int(config.get("factor", -1)),
    }
    return layers, fields


def _plain(rank: int, alpha: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _minus_principal(
    pairs: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, Tensor], rank: int
) -> Layers:
    """B A - B0 A0 as one pair of factors [2R, in], [out, 2R]."""
    found: Layers = {}
    for name, (low, high) in pairs.items():
        first, second = _principal(weights[name], rank)
        found[name] = {
            "lora_A.weight": torch.cat([low.double(), first]),
            "lora_B.weight": torch.cat([high.double(), -second], dim=1),
        }
    return found


def _principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """sqrt(S) V^T [R, in] and U sqrt(S) [out, R] of the largest singular values of weight [out, in].

    By the full decomposition: the adapter was trained against the exact one.
    """
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _prefix(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PaddleNLP's order of features is (kind, layer, head, dim), ours (layer, kind, head, dim)."""
    caches = folder / "pre_caches.npy"
    num_layers = int(config["num_hidden_layers"])
    if caches.is_file():
        try:
            array = np.load(caches, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise Refused(
                f"reading {caches}", f"it is no array ({error})", "copy the folder again"
            ) from error
        table = torch.from_numpy(array.copy()).float()  # [layers, 2, K, P, D]
        prompts = table.permute(3, 0, 1, 2, 4)
    else:
        weights = _weights(folder)
        if config.get("prefix_projection") or len(weights) != 1:
            raise Refused(
                f"the prefix folder {folder}",
                "it has no pre_caches.npy, which holds the projected keys and values",
                "copy the whole folder",
            )
        (flat,) = weights.values()  # [P, 2 * layers * K * D]
        prompts = flat.float().unflatten(1, (2, num_layers, -1)).transpose(1, 2)
    prompts = prompts.flatten(1)  # [P, layers * 2 * K * D]
    fields = {
        "peft_type": "LUTHIER_PREFIX",
        "form": "paddlenlp",
        "num_virtual_tokens": prompts.shape[0],
        "num_layers": num_layers,
    }
    return {"prompt_embeddings": prompts}, fields


def _reft(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    root = ROOTS.get(str(config.get("model_type", "llama")), "model")
    kinds = {str(kind).rpartition(".")[2].strip("'>") for kind in config["intervention_types"]}
    form = "tiny" if kinds == {"TinyIntervention"} else "loreft"
    if kinds - {"TinyIntervention", "LoreftIntervention"}:
        raise Refused(f"a ReFT folder with {', '.join(sorted(kinds))}", "known are LoreftIntervention and TinyIntervention", "use one of these")  # fmt: skip
    positions = str(config.get("position", "f7+l7"))
    options = {"form": form, "positions": positions, "tied": True}
    (part,) = parts_of(AdapterConfig.model_validate({"method": "reft", **options}))
    names = {"rotate_layer.weight": "subspace", "learned_source.weight": "source"}
    names |= {"learned_source.bias": "source_bias"}
    if form == "tiny":
        names = {"param_A": "down", "param_B": "up", "param_a": "down_scale", "param_b": "up_scale"}
    tensors, rank, layers = {}, 0, []
    for entry in config["representations"]:
        layer = int(entry["layer"])
        rank = int(entry["low_rank_dimension"])
        layers.append(layer)
        state = read_arrays(folder / f"intkey_layer.{layer}.bin")
        if missing := sorted(names.keys() - state.keys()):
            raise Refused(
                f"the ReFT folder {folder}",
                f"intkey_layer.{layer}.bin has no {missing[0]}",
                "copy the whole folder",
            )
        for theirs, ours in names.items():
            tensor = state[theirs].t() if ours == "source" else state[theirs]
            tensors[f"{PREFIX}{root}.layers.{layer}.{part}.{ours}.weight"] = tensor
    act_fn = (config.get("intervention_params") or {}).get("act_fn") or "linear"
    if form == "loreft":
        options |= {"act_fn": act_fn}
    fields = {"peft_type": "LUTHIER_REFT", "rank": rank, "layers": layers, **options}
    return tensors, fields


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from safetensors or Paddle's pickles of arrays."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p for p in folder.glob("*.pdparams") if p.name != "scheduler.pdparams")
    cut = [p.name for p in [*files, *pickles] if re.search(r"\.(tp|pp)\d+", p.name)]
    if cut:
        raise Refused(
            f"converting {folder}",
            f"{cut[0]} is the part of one tensor- or pipeline-parallel rank",
            "let PaddleNLP save it merged (merge_tensor_parallel)",
        )
    found: dict[str, Tensor] = {}
    try:
        for path in files:
            found |= load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refused(
            f"reading {files[0]}", f"it is corrupt ({error})", "copy the folder again"
        ) from error
    if not files:
        for path in pickles:
            found |= read_arrays(path)
    if not found:
        names = sorted(p.name for p in folder.iterdir())
        raise Refused(
            f"converting {folder}",
            f"it holds no weights (*.pdparams, *.safetensors), only {', '.join(names[:8])}",
            "copy the whole folder",
        )
    return found


def _layers(weights: Mapping[str, Tensor]) -> Layers:
    found: Layers = {}
    for name, tensor in weights.items():
        path, _, suffix = name.rpartition(".")
        if not re.fullmatch(r"(lora|vera|lokr)_\w+", suffix):
            raise Refused(
                "converting a PaddleNLP adapter",
                f"it holds {name}, which belongs to no adapter (trainable_bias or trainable_modules)",
                "train without them, or merge with PaddleNLP",
            )
        family, _, rest = path.partition(".")
        last = rest.rpartition(".")[2]
        if family not in ROOTS or last in ("qkv_proj", "gate_up_fused_proj"):
            raise Refused(
                f"converting the layer {path} of a PaddleNLP adapter",
                f"transformers cuts this family's layers otherwise; known are {', '.join(ROOTS)}, not fused",
                "train with fuse_attention_qkv=false and fuse_attention_ffn=false, or merge with PaddleNLP",
            )
        stem = rest.removesuffix(last) + RENAMED.get(family, {}).get(last, last)
        found.setdefault(f"{ROOTS[family]}.{stem}", {})[suffix] = tensor
    return found


def _one(part: Mapping[str, Tensor], layer: str, suffix: str) -> Tensor:
    if suffix not in part:
        raise Refused(
            "converting a PaddleNLP adapter",
            f"layer {layer} has {', '.join(sorted(part))} and no {suffix}",
            "copy the whole folder",
        )
    return part[suffix].double()


def _base_weights(base: Any, layers: list[str], what: str) -> dict[str, Tensor]:
    """Weights [out, in] of the base's layers; PiSSA and VeRA saved only what differs from these."""
    if not base:
        raise Refused(
            f"converting a {what} adapter of PaddleNLP",
            "it was trained from the base's singular vectors, and does not name its base",
            "luthier convert SOURCE OUT --base BASE",
        )
    found: dict[str, Tensor] = {}
    wanted = {f"{name}.weight": name for name in layers}
    for path in weight_files(find_folder(str(base))):
        found |= {wanted[key]: t for key, t in read_tensors(path) if key in wanted}
    missing = sorted(set(layers) - found.keys())
    if missing:
        raise Refused(
            f"converting a {what} adapter of PaddleNLP on {base}",
            f"the base has no layer {missing[0]}",
            "give the base that it was trained on: --base BASE",
        )
    return found
