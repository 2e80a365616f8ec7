"""From one kind of model folder to another: merging an adapter into its base, converting, `env`.

What is written is checked against what it was made from before it is published: a merged model must
compute what base and adapter compute together, to the rounding of the weights' type.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier import native
from luthier.adapters import Adapter, fold_into
from luthier.adapters.facts import base_for_use, read_adapter_config
from luthier.adapters.store import load_adapter, method_of
from luthier.built import keep_stops
from luthier.config import ModelConfig
from luthier.data.encode import Renderer
from luthier.errors import Failed, LuthierError, Refused
from luthier.files import MANIFEST, check_writable, damage, publish, write_json
from luthier.interop.gguf import convert_gguf, is_gguf
from luthier.interop.paddlenlp_folder import convert_adapter, is_paddle_adapter
from luthier.interop.paddlenlp_model import convert_model, is_paddle_model
from luthier.models.folder import fingerprint
from luthier.models.load import build_model, load_config, quiet, resolve_device, save_model
from luthier.models.stage import plain_inputs
from luthier.models.tokenizer import load_tokenizer
from luthier.summary import device_name, versions
from luthier.train.checkpoint import steps_in
from luthier.train.report import write_report

SAMPLE_ROWS, SAMPLE_TOKENS = 4, 48
# Largest ||difference|| / ||logits|| between base + adapter and the folded weights, both float32: products
# are summed in another order, nothing else (1e-6 after 30 layers). An error of the formula is of the size of
# what the adapter changes, of which it may be no more than this share.
FOLD_ROUNDING, FOLD_SHARE, FOLD_MOST = 1e-5, 5e-3, 1e-3
# Largest mean KL divergence (nats per token) that rounding the folded weights to their stored type may cost.
ROUNDING_KL = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.005, torch.float64: 1e-6}


@dataclass(frozen=True)
class MergeCheck:
    """What merging cost: relative error of the folded logits in float32, then KL (nats per token) and the
    share of equal likeliest tokens of the published model against base + adapter."""

    fold_error: float
    kl: float
    agreement: float


def merge(
    base: str | None, adapter: str, out: str, *, device: str = "cpu", say: Any = print
) -> dict[str, Any]:
    """Fold `adapter` into the original-precision weights of `base` and publish a Hugging Face folder.

    `base`: folder or hub name; None takes the one that the adapter names. The result loads in plain
    transformers. Raises Refused for what does not fit and Failed, with nothing published, when the merged
    model does not compute what base and adapter do.
    """
    folder, target = Path(adapter), Path(out)
    if folder.is_dir() and is_paddle_adapter(folder):
        with TemporaryDirectory() as made:
            facts = convert_adapter(folder, Path(made) / "adapter", base)
            say(f"{adapter}: PaddleNLP's, taken as {facts['kind']}")
            result = merge(base, str(Path(made) / "adapter"), out, device=device, say=say)
        return result | {"adapter": adapter}
    base = check_merge(base, folder, target)
    resolve_device(device)
    stored = load_config(base).dtype or torch.float32
    dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    config = ModelConfig.model_validate(
        {"path": base, "dtype": "float32", "device": device, **base_for_use(folder)}
    )
    model = build_model(config, seed=0)
    ids = probe(model)
    before = logits(model, ids)
    tokenizer = with_adapter(model, folder, base, say)

    adapted = logits(model, ids)
    fold_into(model)
    folded = logits(model, ids)
    error = float((folded - adapted).norm() / adapted.norm())
    effect = float((before - adapted).norm() / adapted.norm())
    if not error < min(max(FOLD_ROUNDING, FOLD_SHARE * effect), FOLD_MOST):
        raise Failed(
            f"merging {adapter} into {base}",
            f"the folded weights' logits differ from the adapted model's by {error:.1e} (relative; the adapter "
            f"changes them by {effect:.1e}); nothing was published",
            "report this, with the adapter's method and the model's family",
        )
    with publish(target, manifest=False) as partial:
        save_model(model, partial, tokenizer, dtype=dtype)
        with quiet():
            plain = AutoModelForCausalLM.from_pretrained(partial, dtype=dtype)
        check = compare(plain.float(), adapted.cpu(), ids.cpu(), error)
        limit = ROUNDING_KL.get(dtype, 0.02)
        if not check.kl < limit:
            raise Failed(
                f"merging {adapter} into {base}",
                f"the merged model differs from the adapted one: KL {check.kl:.2e} nats per token, "
                f"rounding to {_name(dtype)} explains {limit:g}; nothing was published",
                "merge into a base of higher precision, or use base and adapter together",
            )
    say(
        f"merged {adapter} into {base} as {_name(dtype)}: {target}\n"
        f"checked on {SAMPLE_ROWS * SAMPLE_TOKENS} tokens: folded weights differ by {error:.1e}, the published "
        f"model by KL {check.kl:.1e} nats per token, likeliest token equal in {check.agreement:.1%}"
    )
    try:
        _note_in_report(folder, target, check)
    except (LuthierError, OSError) as error:  # the merged model is there and right
        say(f"note: the run's report was not updated: {error}")
    return {
        "base": base,
        "adapter": adapter,
        "output": out,
        "dtype": _name(dtype),
        "fold_error": check.fold_error,
        "kl": check.kl,
        "agreement": check.agreement,
    }


def check_merge(base: str | None, folder: Path, target: Path) -> str:
    """Refuse what can be refused before weights are read; gives the base, which the adapter may name."""
    fields = read_adapter_config(folder)
    method = method_of(fields)
    if method.fold is Adapter.fold:
        raise Refused(
            f"merging {folder}",
            f"what an adapter of the type {fields['peft_type']} does is no change of a weight",
            "use the base together with the adapter",
        )
    base = base or fields.get("base_model_name_or_path")
    if not base:
        raise Refused(
            f"merging {folder}", "it does not name its base", "luthier merge BASE ADAPTER OUT"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refused(f"merging into {target}", "it exists and is not empty", "name a new folder")
    check_writable(f"merging into {target}", target.parent)
    return base


def with_adapter(model: PreTrainedModel, folder: Path, base: str, say: Any) -> Any:
    """Put the adapter of `folder` on its base, and what ends an answer into its config; the base's tokenizer or None."""
    loaded = load_adapter(model, folder, base_name=base, base_hash=fingerprint(base))
    for remark in loaded.remarks:
        say(f"note: {remark}")
    tokenizer = load_tokenizer(base)
    if tokenizer is not None:
        keep_stops(model, Renderer(tokenizer).stop_ids)
    return tokenizer


def probe(model: PreTrainedModel) -> Tensor:
    """Sample rows [4, 48]: ids drawn from the whole vocabulary, the same in every run."""
    draw = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (SAMPLE_ROWS, SAMPLE_TOKENS), generator=draw)
    return ids.to(next(model.parameters()).device)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        inputs = plain_inputs(model.eval(), ids)
        return model(**inputs, use_cache=False).logits.float()  # [4, 48, V]


def compare(plain: PreTrainedModel, adapted: Tensor, ids: Tensor, error: float) -> MergeCheck:
    merged = logits(plain, ids)
    wanted, found = adapted.log_softmax(-1), merged.log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    same = (adapted.argmax(-1) == merged.argmax(-1)).float().mean()
    return MergeCheck(error, max(float(kl), 0.0), float(same))


def _note_in_report(run: Path, target: Path, check: MergeCheck) -> None:
    """Where the adapter is a run's output, its report says what merging gave."""
    path = run / "report.json"
    if not path.is_file():
        return
    facts = json.loads(path.read_text("utf-8"))
    row = (
        "the merged model answers like the adapted one",
        True,
        f"{target}: KL {check.kl:.1e} nats per token, likeliest token equal in {check.agreement:.1%}",
    )
    facts["checks"] = [c for c in facts.get("checks", []) if c[0] != row[0]] + [row]
    write_json(path, facts)
    write_report(run, facts)


def convert(source: str, out: str, *, base: str | None = None, say: Any = print) -> dict[str, Any]:
    """GGUF file, checkpoint of a run, PaddleNLP's model or adapter -> a folder that transformers or PEFT loads.

    `base` is the model that a PaddleNLP adapter was trained on, where it does not name it rightly.
    """
    path, target = Path(source), Path(out)
    if not path.exists():
        raise Refused(f"convert {source}", "there is no such file or folder", "check the path")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refused(f"convert into {target}", "it exists and is not empty", "name a new folder")
    check_writable(f"convert into {target}", target.parent)
    paddle = path.is_dir() and is_paddle_adapter(path)
    if base is not None and not paddle:
        raise Refused(
            f"convert {source} --base {base}",
            "only the conversion of a PaddleNLP adapter reads a base",
            "leave it out",
        )
    if paddle:
        facts = convert_adapter(path, target, base)
    elif is_gguf(path):
        facts = convert_gguf(path, target)
    elif path.is_dir() and is_paddle_model(path):
        facts = convert_model(path, target)
    elif (path / "training_state.json").is_file():
        facts = _convert_checkpoint(path, target)
    else:
        raise Refused(
            f"convert {source}",
            "it is no GGUF file, no checkpoint of a run (with training_state.json), and no model or adapter of PaddleNLP",
            _nearest(path)
            or "give model.gguf, RUN/checkpoints/step-N, or a folder with model_state*.pdparams or lora_config.json",
        )
    say(f"{target}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    return facts


def _nearest(path: Path) -> str:
    """The newest checkpoint of a run, where its folder was named."""
    inside = steps_in(path) if path.is_dir() else []
    return f"luthier convert {inside[-1][1]} OUT" if inside else ""


def _convert_checkpoint(path: Path, target: Path) -> dict[str, Any]:
    """The model's part of a checkpoint, after its manifest was checked."""
    reason = damage(path)
    if reason is not None:
        raise Refused(
            f"convert {path}", f"the checkpoint is not whole: {reason}", "take another one"
        )
    with publish(target, manifest=False) as partial:
        for file in path.iterdir():
            if not file.name.startswith("training_state") and file.name != MANIFEST:
                shutil.copy2(file, partial / file.name)
    kind = "PEFT adapter" if (target / "adapter_config.json").is_file() else "model"
    return {"kind": kind, "from": path.name}


def env(say: Any = print) -> dict[str, str]:
    """Versions, devices and the native kernels."""
    facts = versions()
    facts["cpu"] = device_name(torch.device("cpu"))
    for index in range(torch.cuda.device_count()):
        facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if not torch.cuda.is_available():
        facts["gpu"] = "none"
    facts["native"] = native.status()
    for name, value in facts.items():
        say(f"{name:<14}{value}")
    return facts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
