"""`quantize`: a model in few bits, as a Hugging Face folder that other programs open too.

Weights are quantised while they are read, tensor by tensor: the model in full precision never exists. What
was written is read back and compared with what is in memory before it is published.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.config import ModelConfig, RunConfig
from luthier.configfile import Resolved, from_mapping
from luthier.errors import Failed, Refused
from luthier.files import check_writable, publish
from luthier.interop.read import read_config
from luthier.models.folder import find_folder, weight_files, write_origin
from luthier.models.load import build_model, load_config, quiet, resolve_device, save_model
from luthier.models.tokenizer import load_tokenizer
from luthier.prequantized import prequantized
from luthier.quantize import QuantizedLinear, codes, layouts
from luthier.quantize.folders import pack
from luthier.quantize.loading import Quantization, plan_quantization
from luthier.quantize.spec import Spec
from luthier.recipes import Source, say

PIECE = 2**20  # numbers of a layer that are compared with its codes at once
NO_DATA = "none"  # data.path of a config that has no section data: no row is read here


@dataclass
class Cost:
    """What one form has cost: sums over its layers."""

    layers: int = 0
    weights: int = 0
    bytes: int = 0
    square: float = 0.0
    square_error: float = 0.0

    def add(self, layer: QuantizedLinear, weight: Tensor) -> None:
        """Count a layer just quantised from `weight` [out, in]."""
        self.layers += 1
        self.weights += weight.numel()
        self.bytes += sum(t.numel() * t.element_size() for t in layer.tensors().values())
        rows, width = weight.shape
        scale = codes.scales(layer.tensors(), layer.spec)
        step = max(1, PIECE // width)
        off = torch.empty(min(step, rows), width, device=weight.device)
        for first in range(0, rows, step):  # a second dense copy of a large layer is never made
            last = min(first + step, rows)
            dense, part = weight[first:last].float(), off[: last - first]
            codes.dequantize_range(
                layer.codes, scale, layer.spec, first * width, last * width, part
            )
            self.square_error += _square(part.sub_(dense))
            self.square += _square(dense)

    def row(self, form: str) -> dict[str, Any]:
        error = (self.square_error / self.square) ** 0.5 if self.square else 0.0
        bits = 8 * self.bytes / self.weights
        return {"form": form, "layers": self.layers, "weights": self.weights, "bits": bits, "error": error}  # fmt: skip


def quantize_model(source: Source, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Publish `model.path` in the storage that the section `quantize` asks for as the folder `output`.

    Of the config only the sections model and quantize, and output, are read; a section data is not needed. Returns
    what was printed. Raises Refused before weights are read: nothing asked for, a model that is quantised
    already, an output that is not empty, forms that no one layout holds.
    """
    resolved = resolve_without_data(source, overrides)
    config = resolved.config
    for remark in resolved.remarks:
        say(f"note: {remark}")
    target = Path(config.output)
    before = _check(config, target)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)

    costs: dict[str, Cost] = {}

    def count(layer: QuantizedLinear, weight: Tensor) -> None:
        costs.setdefault(form_of(layer.spec), Cost()).add(layer, weight)

    begin = time.perf_counter()
    chosen = config.model
    if chosen.dtype == "auto":  # what is kept is kept in the checkpoint's type
        stored = load_config(chosen.path, trust_remote_code=chosen.trust_remote_code).dtype
        name = str(stored or torch.float32).removeprefix("torch.")
        chosen = chosen.model_copy(update={"dtype": name})
    quantization = Quantization(config.quantize, seen=count)
    model = build_model(chosen, seed=config.train.seed, quantization=quantization)
    model.cpu()
    with publish(target, manifest=False) as partial:
        save_model(model, partial, tokenizer, pack=pack)
        method = check_written(model, partial)
        write_origin(partial, chosen.path)
    seconds = time.perf_counter() - begin
    after = sum(file.stat().st_size for file in weight_files(target))
    rows = [cost.row(form) for form, cost in costs.items()]
    _report(config, model, rows, method)
    say(f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB in {seconds:.1f} s: {target}")
    return {
        "model": config.model.path,
        "output": str(target),
        "layout": method,
        "forms": rows,
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
    }


def resolve_without_data(source: Source, overrides: Sequence[str] = ()) -> Resolved:
    """Any form of config, which need not have a section data."""
    if isinstance(source, Resolved):
        return source
    if isinstance(source, RunConfig):
        return Resolved(source)
    if isinstance(source, Mapping):
        return from_mapping({"data": {"path": NO_DATA}, **source}, overrides)
    return read_config([Path(source)], list(overrides), defaults={"data.path": NO_DATA})


def _square(values: Tensor) -> float:
    """Sum of the squares: each of a row in float32, the rows' in float64; no temporary of this size."""
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def form_of(spec: Spec) -> str:
    """`nf4 64`, `nf4 64 double`, `int8 per output`."""
    whole = spec.scheme.startswith("int") and spec.block_size == spec.shape[-1]
    size = "per output" if whole else str(spec.block_size)
    return f"{spec.scheme} {size}{' double' if spec.double_quant else ''}"


def check_written(model: PreTrainedModel, folder: Path) -> str:
    """Read the quantised weights of `folder` again and compare them with the model's; gives the layout.

    Raises Failed where a code or a scale differs.
    """
    found = prequantized(ModelConfig.model_validate({"path": str(folder)}))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    plan = found.plan_for(model) if found is not None else {}
    wrong = sorted(layers.keys() ^ plan.keys())
    if found is not None and not wrong:
        with ExitStack() as stack:
            read = found.reader(stack)
            for name, layer in layers.items():
                stored = plan[name]
                values = layouts.take(found.folder, found.fields, stored, read)
                ours = layer.tensors()
                if (
                    stored.spec != layer.spec
                    or not torch.equal(values["codes"], ours["codes"])
                    or not torch.equal(*(codes.scales(t, layer.spec) for t in (values, ours)))
                ):
                    wrong.append(name)
    if wrong or found is None:
        raise Failed(
            f"quantising into {folder}",
            f"what was written is not what is in memory ({', '.join(wrong[:3])}); nothing was published",
            "report this, with the model's family",
        )
    return found.fields["quant_method"]


def _check(config: RunConfig, target: Path) -> int:
    """Refuse what can be refused before weights are read; gives the size of the weight files in bytes."""
    model = config.model
    if not config.quantize.on:
        raise Refused(
            "luthier quantize", "quantize.weights=none asks for nothing", "set quantize.weights=nf4"
        )
    if config.adapter.path is not None:
        raise Refused(
            f"luthier quantize with adapter.path={config.adapter.path}",
            "a base is quantised, without adapters",
            f"luthier merge {model.path} {config.adapter.path} MERGED, then quantise MERGED",
        )
    if model.init != "pretrained":
        raise Refused(
            f"luthier quantize with model.init={model.init}",
            "random weights are not worth quantising",
            "leave model.init out",
        )
    resolve_device(model.device)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refused(
            f"quantising into {target}", "it exists and is not empty", "name a new folder"
        )
    check_writable(f"output={target}", target)
    held = prequantized(model)
    if held is not None:
        schemes = ", ".join(sorted({spec.scheme for spec in held.specs.values()}))
        raise Refused(
            f"quantising {model.path}",
            f"it is quantised already ({schemes})",
            "start from the model in its original precision",
        )
    files = weight_files(find_folder(model.path, code=model.trust_remote_code))
    made = load_config(model.path, trust_remote_code=model.trust_remote_code)
    remote = {"trust_remote_code": model.trust_remote_code}
    with torch.device("meta"), quiet():
        blueprint: Any = AutoModelForCausalLM.from_config(copy.deepcopy(made), **remote)
    plan = plan_quantization(blueprint, config.quantize)
    if stacks := [name for name, spec in plan.items() if len(spec.shape) > 2]:
        raise Refused(
            f"quantising {model.path} into a folder",
            f"'{stacks[0]}' is a stack of experts, for which no other program's layout has a place",
            "name quantize.modules without the experts; for training they are quantised while they are read",
        )
    layouts.choose(plan)
    return sum(file.stat().st_size for file in files)


def _report(config: RunConfig, model: Any, rows: list[dict[str, Any]], method: str) -> None:
    say(
        f"{config.model.path} in the layout of {method}, which transformers opens where it is installed"
    )
    say(f"  {'form':<18}{'layers':>7}{'weights':>16}{'bits':>7}{'error':>9}")
    for row in rows:
        say(
            f"  {row['form']:<18}{row['layers']:>7}{row['weights']:>16,}{row['bits']:>7.2f}{row['error']:>9.2%}"
        )
    own = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kept = {
        id(p): p.numel() for n, p in model.named_parameters() if n.rpartition(".")[0] not in own
    }
    say(f"  {'kept':<25}{sum(kept.values()):>16,}{8 * model.dtype.itemsize:>7.2f}")
    if method == layouts.COMPRESSED and any(
        m.transposed for m in model.modules() if isinstance(m, QuantizedLinear)
    ):
        say("note: compressed-tensors knows no Conv1D layers; only Luthier opens this folder")
    say("error: ||quantised - weight|| / ||weight||; the written folder was read back and is equal")
