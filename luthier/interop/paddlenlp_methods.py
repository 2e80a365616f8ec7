"""PaddleNLP's adapter and quantisation arguments -> our `adapter` and `quantize` keys.

PaddleNLP's own forms are taken where they differ from the papers' (VeRA from each layer's singular vectors,
prefix positions from 0, ReFT's one edit for first and last tokens, its NEFTune scale), so that a file gives
what it gave there; its defects are not copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.errors import Refused, suggest
from luthier.interop.paddlenlp_arguments import Arguments

if TYPE_CHECKING:
    from luthier.interop.paddlenlp import Translation

# switch -> the arguments that only it reads
OPTIONS = {
    "prefix_tuning": ("prefix_path", "num_prefix_tokens"),
    "lora": (
        *("lora_path", "lora_rank", "rslora", "lora_plus_scale", "pissa", "lora_use_mixer"),
        *("use_mora", "use_quick_lora"),
    ),
    "lokr": ("lokr_path", "lokr_dim"),
    "reft": (
        *("layers", "position", "intervention_type", "rank", "act_fn", "add_bias", "dropout"),
    ),
    "vera": ("vera_rank",),
    "neftune": ("neftune_noise_alpha",),
}
SCHEMES = {"nf4": "nf4", "fp4": "fp4", "weight_only_int8": "int8", "weight_only_int4": "int4"}
INTERVENTIONS = {"loreftintervention": "loreft", "tinyintervention": "tiny"}


def adapter(t: Translation, a: Arguments) -> None:
    """The one method that is switched on, and NEFTune, which goes with any."""
    on = [name for name in OPTIONS if a[name] and name != "neftune"]
    if len(on) > 1:
        raise Refused(
            " and ".join(f"{name}=true" for name in on), "they exclude each other", "keep one"
        )
    for switch, names in OPTIONS.items():
        given = [name for name in names if name in a]
        if not a[switch] and given:
            t.remarks.append(
                f"{', '.join(given)}: not read because {switch} is not true, as in PaddleNLP"
            )
    for name in on:
        _METHODS[name](t, a)
    if a["neftune"]:
        t.put("adapter.neftune_alpha", a["neftune_noise_alpha"], "neftune_noise_alpha", "neftune")
        t.put("adapter.neftune_scaling", "paddlenlp", "neftune")


def quantize(t: Translation, a: Arguments) -> None:
    """The storage of the base's weights. Its scales of scales are in blocks of 256, PaddleNLP's default."""
    algorithm = a["weight_quantize_algo"]
    details = ("weight_blocksize", "weight_double_quant", "weight_double_quant_block_size")
    if algorithm is None or algorithm.lower() == "none":
        if given := [name for name in details if name in a]:
            t.remarks.append(
                f"{', '.join(given)}: not read without weight_quantize_algo, as in PaddleNLP"
            )
        return
    if algorithm not in SCHEMES:
        raise Refused(
            f"weight_quantize_algo={algorithm}",
            f"known here: {', '.join(SCHEMES)}",
            suggest(algorithm, SCHEMES)
            or "give one of these; weights are kept in 8 bits by weight_only_int8",
        )
    t.put("quantize.weights", SCHEMES[algorithm], "weight_quantize_algo")
    if SCHEMES[algorithm] not in ("nf4", "fp4"):
        if given := [name for name in details if name in a]:
            t.remarks.append(
                f"{', '.join(given)}: not read with {algorithm}, which has one scale per output"
            )
        return
    t.copy("quantize.block_size", "weight_blocksize")
    t.copy("quantize.double_quant", "weight_double_quant")
    if a["weight_double_quant"] and a["weight_double_quant_block_size"] != 256:
        raise Refused(
            f"weight_double_quant_block_size={a['weight_double_quant_block_size']}",
            "scales are quantised in blocks of 256",
            "leave it out",
        )


def _lora(t: Translation, a: Arguments) -> None:
    t.copy("adapter.path", "lora_path")
    t.put("adapter.rank", a["lora_rank"], "lora_rank", "lora")
    if a["use_mora"]:
        others = [n for n in ("rslora", "pissa", "lora_use_mixer") if a[n]]
        others += ["lora_plus_scale"] if a["lora_plus_scale"] != 1 else []
        if others:
            raise Refused(
                f"use_mora=true with {others[0]}", "MoRA has no such option", "leave one out"
            )
        t.put("adapter.method", "mora", "use_mora")
        t.put("adapter.form", "paddlenlp", "use_mora")
        return
    t.put("adapter.method", "lora", "lora")
    if a["pissa"]:  # its scale is 1 whatever alpha and rslora say
        t.put("adapter.pissa", True, "pissa")
        t.put("adapter.alpha", a["lora_rank"], "pissa")
    elif a["rslora"]:
        t.put("adapter.rslora", True, "rslora")
        t.put("adapter.alpha", 4, "rslora")
    if a["lora_plus_scale"] != 1:
        t.put("adapter.lora_plus", a["lora_plus_scale"], "lora_plus_scale")
    if a["lora_use_mixer"]:
        t.put("adapter.mixer", True, "lora_use_mixer")


def _prefix(t: Translation, a: Arguments) -> None:
    t.put("adapter.method", "prefix", "prefix_tuning")
    t.put("adapter.form", "paddlenlp", "prefix_tuning")
    t.put("adapter.num_prefix_tokens", a["num_prefix_tokens"], "num_prefix_tokens")
    t.copy("adapter.path", "prefix_path")


def _vera(t: Translation, a: Arguments) -> None:
    t.put("adapter.method", "vera", "vera")
    t.put("adapter.form", "paddlenlp", "vera")
    t.put("adapter.rank", a["vera_rank"], "vera_rank", "vera")


def _lokr(t: Translation, a: Arguments) -> None:
    t.put("adapter.method", "lokr", "lokr")
    t.put("adapter.form", "paddlenlp", "lokr")
    t.put("adapter.rank", a["lokr_dim"], "lokr_dim", "lokr")
    t.copy("adapter.path", "lokr_path")


def _reft(t: Translation, a: Arguments) -> None:
    t.put("adapter.method", "reft", "reft")
    kind = str(a["intervention_type"])
    if kind.lower() not in INTERVENTIONS:  # the document spells them otherwise than the code
        known = ("LoreftIntervention", "TinyIntervention")
        raise Refused(
            f"intervention_type={kind}", f"known here: {', '.join(known)}", suggest(kind, known)
        )
    form = INTERVENTIONS[kind.lower()]
    t.put("adapter.form", form, "intervention_type", "reft")
    t.put("adapter.tied", True, "reft")
    t.put("adapter.rank", a["rank"], "rank", "reft")
    t.put("adapter.positions", a["position"], "position", "reft")
    t.put("adapter.layers", a["layers"], "layers", "reft")
    if form == "loreft":
        t.copy("adapter.act_fn", "act_fn")
        t.copy("adapter.dropout", "dropout")
    elif given := [n for n in ("act_fn", "dropout") if n in a and a[n] not in ("linear", 0)]:
        t.remarks.append(f"{', '.join(given)}: not read by TinyIntervention, as in PaddleNLP")
    if "add_bias" in a:
        t.remarks.append(
            "add_bias: not read, as in PaddleNLP; LoReFT's source has a bias, Tiny's not"
        )


_METHODS = {"lora": _lora, "prefix_tuning": _prefix, "vera": _vera, "lokr": _lokr, "reft": _reft}
