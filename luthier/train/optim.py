"""Optimisers: parameter groups, the learning rate of each group, and their state as plain tensors.

Weight decay is decoupled and never touches biases, norms and other one-dimensional tensors. The state
of an optimiser is a flat {"moment/parameter name": tensor}, fit for safetensors: a checkpoint needs no
pickle and does not depend on the order of parameters. Half-precision weights are `master.py`'s affair;
the rate at each step is `schedules.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from luthier.config import OptimConfig
from luthier.errors import Refused
from luthier.parallel.shard import local, total_norm
from luthier.parallel.world import World
from luthier.parts import cut_of, marked
from luthier.train.adamw_mini import AdamWMini

Named = Sequence[tuple[str, Parameter]]

# what each optimiser keeps per parameter; a checkpoint with anything else is another optimiser's
STATE_KEYS: dict[type[Optimizer], frozenset[str]] = {
    AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    AdamWMini: frozenset({"step", "exp_avg", "block_avg_sq"}),
    SGD: frozenset({"momentum_buffer"}),
    Adafactor: frozenset({"step", "row_var", "col_var", "variance"}),
}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and higher, but no bias and no (per-head) norm."""
    owner, _, leaf = name.rpartition(".")
    return parameter.ndim >= 2 and leaf != "bias" and "norm" not in owner.rpartition(".")[2].lower()


def make_optimizer(
    named_parameters: Named,
    config: OptimConfig,
    lr: float,
    lr_scales: Mapping[str, float] | None = None,
    *,
    head_dim: int | None = None,
    idle: bool = False,
) -> Optimizer:
    """The optimiser `config.name` over all `named_parameters`, at rate `lr`.

    `lr_scales`: parameter name -> ratio to `lr` (LoRA+), 1 where absent. `head_dim`: size of an attention
    head, which adamw_mini needs to give each query and key head its own block. `idle`: there may be no parameters (a
    stage of a pipeline on which nothing is trained).
    adamw (arXiv 1711.05101) runs torch's fused kernel. sgd takes betas[0] as momentum; its decay is decoupled
    too. In adafactor (torch.optim.Adafactor, arXiv 1804.04235) `lr` bounds the step relative to the
    RMS of each tensor and `eps` is the least root of the second moment.
    Moments have the type of the parameters given: hand in float32 (master) copies of half-precision weights.
    """
    if not named_parameters and not idle:
        raise Refused("training", "no parameter is trainable", "check adapter.targets")
    scales = dict(lr_scales or {})
    unknown = sorted(scales.keys() - {name for name, _ in named_parameters})
    if unknown:
        raise ValueError(f"learning-rate ratios for parameters that are not trained: {unknown[:3]}")
    grouped: dict[tuple[bool, float, bool], list[tuple[str, Parameter]]] = {}
    for name, parameter in named_parameters:
        # sharded and whole tensors cannot be updated by one kernel
        sharded = isinstance(parameter, DTensor)
        key = (decays(name, parameter), float(scales.get(name, 1.0)), sharded)
        grouped.setdefault(key, []).append((name, parameter))
    groups = [
        {
            "params": [p for _, p in members],
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr_scale": scale,
            "lr": lr * scale,
        }
        for (decay, scale, _), members in (grouped or {(False, 1.0, False): []}).items()
    ]
    match config.name:
        case "adamw":
            # one pass over parameter, gradient and moments instead of a dozen
            fused = all(p.device.type in ("cpu", "cuda") for _, p in named_parameters)
            return AdamW(groups, lr, config.betas, config.eps, fused=fused)
        case "adamw_mini":
            blocks = {p: _blocks(name, p, head_dim) for name, p in named_parameters}
            return AdamWMini(groups, lr, config.betas, config.eps, blocks)
        case "sgd":
            for group in groups:
                group["decoupled_decay"] = group.pop("weight_decay")
            optimizer = SGD(groups, lr, momentum=config.betas[0])
            optimizer.register_step_pre_hook(_decay)
            return optimizer
        case "adafactor":
            return Adafactor(groups, lr, eps=(config.eps, 1e-3))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of this step; each group keeps its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def multiply(tensors: list[Tensor], factor: float) -> None:
    """Multiply many tensors in place, in one kernel where the device has one."""
    if tensors:
        torch._foreach_mul_([local(t) for t in tensors], factor)  # pyright: ignore[reportPrivateImportUsage]


def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float, world: World | None = None
) -> float:
    """Scale all gradients so that their common L2 norm is at most `max_norm` (0 = leave them).

    Returns the norm before clipping, NaN or infinite if a gradient is; then nothing is scaled. Norms are
    summed in float32 (float64 for float64) whatever the type of the gradients. Sharded gradients count with
    their parts on all ranks of `world`.
    """
    gradients = [marked(p.grad, p) for p in parameters if p.grad is not None]
    staged = world is not None and world.sizes["pipeline"] > 1
    if not gradients and not staged:
        return 0.0
    if staged or any(isinstance(g, DTensor) or cut_of(g) is not None for g in gradients):
        norm = total_norm(gradients, world or World())
    else:
        double = any(g.dtype == torch.float64 for g in gradients)
        dtype = torch.float64 if double else torch.float32
        norms = [n.to(gradients[0].device) for n in torch._foreach_norm(gradients, 2, dtype)]  # pyright: ignore[reportPrivateImportUsage]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if 0 < max_norm < norm < float("inf"):
        multiply(gradients, max_norm / (norm + 1e-6))
    return norm


def optimizer_tensors(optimizer: Optimizer, named_parameters: Named) -> dict[str, Tensor]:
    """The whole state as {"key/parameter name": tensor}. The tensors are the live ones, not copies."""
    out = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # sgd without momentum keeps None
                like = parameter if value.shape == parameter.shape else value
                out[f"{key}/{name}"] = marked(value.detach(), like)
    return out


def load_optimizer_tensors(
    optimizer: Optimizer, named_parameters: Named, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; bit for bit. Tensors are copied.

    Raises Refused, with nothing changed, if they belong to another optimiser or other parameters.
    """
    known = dict(named_parameters)
    allowed = STATE_KEYS[type(optimizer)]
    fused = {p for g in optimizer.param_groups if g.get("fused") for p in g["params"]}
    state: dict[Parameter, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in known or key not in allowed:
            raise Refused(
                f"reading the state of {type(optimizer).__name__}",
                f"the checkpoint holds '{full_name}', which this run has not",
                "resume with the model, adapter and optim settings of the checkpoint",
            )
        parameter = known[name]
        if key in ("exp_avg", "exp_avg_sq", "momentum_buffer") and value.shape != parameter.shape:
            raise Refused(
                f"reading '{full_name}'",
                f"its shape is {tuple(value.shape)}, the parameter's {tuple(parameter.shape)}",
                "resume with the model and adapter settings of the checkpoint",
            )
        # torch keeps the step counter on the CPU unless the fused kernel reads it
        device = "cpu" if key == "step" and parameter not in fused else parameter.device
        state.setdefault(parameter, {})[key] = value.to(device, copy=True)
    optimizer.state.clear()
    for parameter, values in state.items():
        optimizer.state[parameter] = values


def _decay(optimizer: Optimizer, *_: object) -> None:
    """Decoupled decay for optimisers whose own `weight_decay` is an L2 term in the gradient."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            touched = [p for p in group["params"] if p.grad is not None]
            if touched and group["decoupled_decay"]:
                multiply(touched, 1 - group["lr"] * group["decoupled_decay"])


def _blocks(name: str, parameter: Tensor, head_dim: int | None) -> int:
    """Number of adamw_mini blocks: equal slices of the first dimension that share a second moment."""
    if parameter.ndim < 2:
        return 1
    rows = parameter.shape[0]
    if head_dim and rows % head_dim == 0 and name.endswith(("q_proj.weight", "k_proj.weight")):
        return rows // head_dim
    return rows
