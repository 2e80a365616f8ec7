"""`merge --quantized`: an adapter folded into the codes it was trained on, and what that costs.

Codes are coarse: dequantised, changed and quantised again, a weight keeps only part of an adapter's small change. So
this is offered beside merging into the original weights (`exchange.py`), not instead of it; the cost is measured
on sample tokens and told, and nothing is published where more is lost than the adapter gave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.adapters import fold_into
from luthier.adapters.facts import base_for_use, base_options
from luthier.bases import quantization_of
from luthier.compress import check_written
from luthier.config import ModelConfig, QuantizeConfig
from luthier.errors import Failed, Refused
from luthier.exchange import (
    SAMPLE_ROWS,
    SAMPLE_TOKENS,
    check_merge,
    compare,
    logits,
    probe,
    with_adapter,
)
from luthier.files import publish
from luthier.models.load import build_model, resolve_device, save_model
from luthier.prequantized import prequantized
from luthier.quantize.folders import pack


def merge_quantized(
    base: str | None, adapter: str, out: str, *, device: str = "cpu", say: Any = print
) -> dict[str, Any]:
    """Fold `adapter` into its quantised base, quantise again and publish a folder as `luthier quantize` does.

    The base is quantised as the adapter's folder records, or is a folder that is quantised already. Raises
    Refused for an adapter that was trained on full-precision weights, and what merging refuses; Failed, with
    nothing published, where the merged model is further from base and adapter than the base alone is.
    """
    folder, target = Path(adapter), Path(out)
    base = check_merge(base, folder, target)
    resolve_device(device)
    model_config = ModelConfig.model_validate(
        {"path": base, "device": device, **base_for_use(folder)}
    )
    asked = QuantizeConfig.model_validate(base_options(folder).get("quantize") or {})
    if not asked.on and prequantized(model_config) is None:
        raise Refused(
            f"merging {adapter} into quantised weights",
            "it was trained on a base in full precision",
            f"luthier merge {base} {adapter} {out}, and luthier quantize the result",
        )
    quantization = quantization_of(asked, adapter, model=model_config)
    model = build_model(model_config, seed=0, quantization=quantization)
    tokenizer = with_adapter(model, folder, base, say)
    ids = probe(model)
    adapted = logits(model, ids)
    fold_into(model)
    check = compare(model, adapted, ids, 0.0)
    plain = ModelConfig.model_validate({"path": base, "device": device, **base_for_use(folder)})
    alone = compare(
        build_model(plain, seed=0, quantization=quantization_of(asked, None, model=plain)),
        adapted,
        ids,
        0.0,
    )
    if not check.kl < alone.kl:
        raise Failed(
            f"merging {adapter} into quantised weights of {base}",
            f"quantising again loses more (KL {check.kl:.1e} nats per token) than the adapter gave ({alone.kl:.1e}); "
            "nothing was published",
            f"merge it into the weights in their original precision: luthier merge ORIGINAL {adapter} {out}",
        )
    with publish(target, manifest=False) as partial:
        save_model(model, partial, tokenizer, pack=pack)
        layout = check_written(model, partial)
    say(
        f"merged {adapter} into quantised weights of {base}: {target}, in the layout of {layout}\n"
        f"cost on {SAMPLE_ROWS * SAMPLE_TOKENS} tokens: KL {check.kl:.1e} nats per token from base and adapter, whose own "
        f"distance from the base is {alone.kl:.1e}; likeliest token equal in {check.agreement:.1%}"
    )
    return {
        "base": base,
        "adapter": adapter,
        "output": out,
        "layout": layout,
        "kl": check.kl,
        "kl_of_adapter": alone.kl,
        "agreement": check.agreement,
    }
