"""PaddleNLP's parallel degrees -> `parallel.*`. Whether they fit the processes that were started is checked there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.errors import Refused
from luthier.interop.paddlenlp_arguments import Arguments, is_off
from luthier.interop.paddlenlp_keys import PARALLEL, names

if TYPE_CHECKING:
    from luthier.interop.paddlenlp import Translation


METHODS = {"sep_parallel_degree": "heads", "context_parallel_degree": "ring"}
PIPELINE_WORDS = names("""
    disable_p2p_cache_shape disable_partial_send_recv enable_delay_scale_loss enable_dp_comm_overlap
    enable_sharding_comm_overlap enable_timer enable_release_grads enable_clear_every_step_cache
    enable_overlap_p2p_comm disable_batch_p2p_comm best_unbalanced_scheduler use_dualpipev
    """)


def layout(t: Translation, a: Arguments, processes: int) -> None:
    """Translate the degrees: processes = data x sharding x what cuts the
    model; the first is what is left. In one process they are off, with a remark."""
    if processes == 1:
        off = [f"{name}={a.values[name]}" for name in PARALLEL if name in a and _on(name, a)]
        if off:
            t.remarks.append(f"one process: the parallel settings are off ({', '.join(off)})")
        return
    cutting = {
        "tensor_parallel_degree": "tensor",
        "pipeline_parallel_degree": "pipeline",
        "sep_parallel_degree": "context",
        "context_parallel_degree": "context",
    }
    given = [name for name in cutting if name in a and _on(name, a)]
    if len(set(METHODS) & set(given)) > 1:
        raise Refused(
            "sep_parallel_degree with context_parallel_degree",
            "both share out the tokens of a row, in two ways",
            "give one of them",
        )
    for name in given:
        t.put(f"parallel.{cutting[name]}", int(a.values[name]), name)
        if name in METHODS:
            t.put("parallel.context_method", METHODS[name], name)
    # it acts with tensor parallelism alone
    if t.values.get("parallel.tensor", 1) > 1 and "sequence_parallel" in a:
        # on, it means where the family and the layout can: it changes no result
        value = "auto" if _on("sequence_parallel", a) else False
        t.put("parallel.sequence", value, "sequence_parallel")
    _pipeline(t, a)
    words = str(a.values["sharding"]).split() if "sharding" in a else []
    stages = [word for word in words if word in ("stage1", "stage2", "stage3")]
    if words and (len(stages) != 1 or set(words) - {*stages, "offload"}):
        raise Refused(
            f"sharding={a.values['sharding']}",
            "it is one of stage1, stage2, stage3, and maybe offload",
            'give sharding="stage2" or "stage2 offload"',
        )
    degree = next(
        (
            int(a.values[name])
            for name in ("sharding_parallel_degree", "sharding_degree")
            if name in a and str(a.values[name]) != "-1"
        ),
        -1,
    )
    if stages:
        t.put("parallel.stage", int(stages[0][-1]), "sharding")
        t.put("parallel.offload", "offload" in words, "sharding")
    elif degree > 1:
        raise Refused(
            f"sharding_parallel_degree={degree}", "sharding is not given", 'add sharding="stage2"'
        )
    t.put("parallel.shard", degree if stages else 1, "sharding_parallel_degree", "sharding")
    data = int(a.values["data_parallel_degree"]) if "data_parallel_degree" in a else -1
    if data != -1:
        t.put("parallel.replicate", data, "data_parallel_degree")
    else:
        t.put("parallel.replicate", 1 if stages and degree == -1 else -1, "data_parallel_degree")


def _pipeline(t: Translation, a: Arguments) -> None:
    """`virtual_pp_degree` and the words of `pipeline_parallel_config`, most of which say how Paddle's engine works."""
    words = str(a.values.get("pipeline_parallel_config", "")).split()
    unknown = [word for word in words if word not in PIPELINE_WORDS]
    if unknown:
        raise Refused(
            f"pipeline_parallel_config={' '.join(words)}",
            f"'{unknown[0]}' is none of its words",
            f"its words are {', '.join(sorted(PIPELINE_WORDS))}",
        )
    virtual = int(a.values["virtual_pp_degree"]) if "virtual_pp_degree" in a else 1
    if "pipeline_parallel_degree" not in a or not _on("pipeline_parallel_degree", a):
        return
    if "use_dualpipev" in words:
        t.put("parallel.schedule", "zero_bubble", "pipeline_parallel_config")
        t.put("parallel.virtual_stages", 2, "pipeline_parallel_config")
    elif virtual > 1:
        t.put("parallel.schedule", "interleaved", "virtual_pp_degree")
        t.put("parallel.virtual_stages", virtual, "virtual_pp_degree")


def _on(name: str, arguments: Arguments) -> bool:
    value, off = arguments.values[name], PARALLEL[name]
    return str(value).lower() != str(off).lower() and str(value) != "-1" and not is_off(value)
