"""`verify loss`: a step's loss and gradients are those of plain transformers, however its rows are cut.

Short pieces of the documents of the run's first step go through the trainer's own step (`train/step.py`) as
one batch, as micro-batches of one row, and one document a row; and through the model's own forward with
padded rows, eager attention and transformers' loss. In half precision, plain float32 tells how far
rounding alone goes, and the two are compared in float32 too. Weights stay; `train.compile` is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from luthier.adapters import adapter_parameters, adapters_of
from luthier.adapters.calls import given_prompts
from luthier.assemble import Built, build, make_updater, name_of
from luthier.batch import IGNORE, Batch
from luthier.config import OptimConfig
from luthier.configfile import Resolved
from luthier.data.loader import collate
from luthier.errors import Failed
from luthier.models import attention
from luthier.models.families import family_of
from luthier.models.load import quiet
from luthier.models.stage import padded_inputs
from luthier.seeding import generator
from luthier.train.optim import make_optimizer
from luthier.train.step import Updater
from luthier.verify.packing import Document, documents_of, open_training, shortened

DOCUMENTS, WINDOW = 8, 64  # pieces that are compared, and the most tokens of each
LOGITS = 2**25  # the most numbers in the logits of plain transformers, which builds them whole
# float32: the loss, and gradients, whose rounding grows with depth (6e-6 after 30 layers of 576); an error of
# a formula is of another size
FLOAT32_LOSS, FLOAT32_GRADIENT = 1e-5, 1e-4
HALF = 3.0  # differences of two roundings, in units of one of them
SCALE = 2.0**10  # of plain float16 losses, whose gradients would vanish


@dataclass(frozen=True)
class Measured:
    """Mean loss over the supervised tokens, and name -> gradient of it, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Relative differences: of the loss, of all gradients together, and of the worst tensor."""

    loss: float
    gradients: float
    worst: float
    name: str


EXACT = Difference(FLOAT32_LOSS, FLOAT32_GRADIENT, FLOAT32_GRADIENT, "")


def verify_loss(resolved: Resolved, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Compare the ways to compute one step; gives the differences by name.

    Raises Failed when one is beyond rounding, Refused for bad input.
    """
    for remark in resolved.remarks:
        say(f"note: {remark}")
    config, text, data = open_training(resolved.config)
    try:
        rows = [row for batch in data.loader.peek() for row in documents_of(batch)]
    finally:
        data.loader.close()
    places = text.renderer.positions
    documents = [
        _piece(*document, whole_prompt=places is not None) for row in rows for document in row
    ][:DOCUMENTS]
    per_row = 1 if config.data.packing == "none" else 2
    number = math.ceil(len(documents) / per_row)
    packed = [documents[i::number] for i in range(number)]
    alone = [[document] for document in documents]

    train = config.train.model_copy(update={"compile": False})
    config = config.model_copy(update={"train": train})
    built = build(config, train=True)
    _wake(built, config.train.seed)
    updater = make_updater(config, built)
    whole = collate(packed, text.pad_id, positions_of=places)
    say(
        f"{len(documents)} documents of the first step, {whole.num_real_tokens} tokens, "
        f"{whole.num_supervised} of them trained; {name_of(built.model.dtype)} on {built.device}, "
        f"attention {built.kernel}, {built.num_trained:,} trained parameters"
    )
    one = _step(updater, [whole])
    rows = [collate([row], text.pad_id, i, places) for i, row in enumerate(packed)]
    many = _step(updater, rows)
    built.model.eval()  # without dropout, which depends on the row
    batch = _step(updater, [whole])
    unpacked = _step(updater, [collate(alone, text.pad_id, positions_of=places)])
    plain = _plain(built, documents, text.pad_id)
    found = {
        f"{number} micro-batches of 1 row = 1 batch of {number}": _compare(many, one),
        f"1 document a row = {per_row} documents a row": _compare(unpacked, batch),
        "plain transformers, padded rows = packed rows": _compare(batch, plain),
    }
    allowed = dict.fromkeys(found, EXACT)
    if built.model.dtype != torch.float32 or built.stage.autocast is not None:
        wide = _in_float32(built)
        exact = _plain(wide, documents, text.pad_id)
        rounding = _compare(plain, exact)
        say(_line("(rounding: plain transformers = the same in float32)", rounding))
        # the loss may come out right by chance: it is given what the gradients get
        loss = HALF * max(rounding.loss, rounding.gradients)
        allowed = dict.fromkeys(found, Difference(loss, loss, HALF * rounding.worst, ""))
        found["both in float32"] = _compare(_step(updater, [whole]), exact)
        allowed["both in float32"] = EXACT
    _show(found, allowed, say)
    for what, difference in found.items():
        _judge(what, difference, allowed[what])
    say("verify loss: ok")
    return {
        "loss": one.loss,
        "differences": {what: asdict(difference) for what, difference in found.items()},
        "allowed": {what: asdict(difference) for what, difference in allowed.items()},
    }


def _show(
    found: Mapping[str, Difference],
    allowed: Mapping[str, Difference],
    say: Callable[[str], object],
) -> None:
    """A table; what is allowed stands below the lines for which it holds."""
    names = list(found)
    for name, following in zip(names, [*names[1:], ""], strict=True):
        say(_line(name, found[name]))
        if not following or allowed[following] != allowed[name]:
            say(_line("  allowed", allowed[name]))


def _line(what: str, d: Difference) -> str:
    numbers = f"loss {d.loss:.1e}   gradients {d.gradients:.1e}   worst {d.worst:.1e}"
    return f"  {what:<54}{numbers} {d.name}".rstrip()


def _judge(what: str, d: Difference, allowed: Difference) -> None:
    """Raise Failed when a difference is more than rounding."""
    wrong = [
        f"{name} by {value:.1e} (rounding explains {limit:.1e})"
        for name, value, limit in (
            ("the loss", d.loss, allowed.loss),
            ("the gradients", d.gradients, allowed.gradients),
            (f"the gradient of {d.name}", d.worst, allowed.worst),
        )
        if not value <= limit
    ]
    if wrong:
        raise Failed(
            f"comparing loss and gradients: {what}",
            f"they differ: {', '.join(wrong)}",
            "report this with the model's family; data.packing=none and model.attention=math may help",
        )


def _piece(ids: Any, labels: Any, *, whole_prompt: bool) -> Document:
    """At most WINDOW tokens of a document, with its first trained ones; or, where a blank may stand anywhere
    in it, all before these and as many of them."""
    first = int((labels != IGNORE).argmax())
    start = max(0, first - WINDOW // 2) if len(ids) > WINDOW else 0
    stop = start + WINDOW
    if whole_prompt:
        start = 0
    return shortened(ids[start:stop], labels[start:stop])


def _wake(built: Built, seed: int) -> None:
    """Give the adapters' zeros values: a LoRA whose B is zero has no gradient in A to compare."""
    with torch.no_grad():
        for name, parameter in adapter_parameters(built.model).items():
            if not parameter.any():
                drawn = torch.randn(parameter.shape, generator=generator(seed, "verify", name))
                parameter.copy_(0.02 * drawn)


def _step(updater: Updater, micro_batches: list[Batch]) -> Measured:
    """Loss and gradients of one step of the trainer, which moves nothing: its rate is 0."""
    kept: dict[str, Tensor] = {}

    def keep(*, gradients: Mapping[str, Tensor | None], step: int, zeros: bool) -> None:
        kept.update({n: g.detach().cpu() for n, g in gradients.items() if g is not None})

    updater.clip, updater.gate, updater.gated = 0.0, keep, False
    still = OptimConfig.model_validate({"name": "sgd", "betas": (0.0, 0.0)})
    updater.optimizer = make_optimizer(updater.master.named, still, 0.0)
    report = updater.update(micro_batches, step=1, lr=0.0)
    while report.skipped == "float16 overflow":
        report = updater.update(micro_batches, step=1, lr=0.0)
    return Measured(report.loss or 0.0, kept)


def _plain(built: Built, documents: list[Document], pad_id: int) -> Measured:
    """The same by the model's own forward and loss: padded rows of one document, eager attention.

    Nothing of the trainer takes part, but for the adapters. Gradients are summed in float32.
    """
    model, loss = built.model, 0.0
    total = sum(int((labels != IGNORE).sum()) for _, labels in documents)
    scale = SCALE if torch.float16 in (model.dtype, built.stage.autocast) else 1.0
    gradients: dict[str, Tensor] = {}
    # virtual tokens come in through the house's attention, which is plain sdpa outside of a stage
    virtual = built.adapter is not None and "" in adapters_of(model)
    model.set_attn_implementation(attention.NAME if virtual else "eager")
    aligned = family_of(model.config.model_type).aligned_labels
    try:
        for group in _groups(documents, model.config.get_text_config().vocab_size):
            ids, mask, labels = (t.to(built.device) for t in _padded(group, pad_id))
            count = int((labels != IGNORE).sum())
            prompts = [_prompt(shifted) for _, shifted in group]
            inputs = padded_inputs(model, ids, mask)
            with _autocast(built), quiet(), given_prompts(model, prompts):
                given = labels if aligned else labels.roll(1, 1)  # the last one is never supervised
                out = model(**inputs, labels=given, use_cache=False)
            # torch's float32 softmax over 49,152 tokens is itself 3e-6 off, its gradient 5e-5
            exact = cross_entropy(
                out.logits.double().flatten(0, 1), labels.flatten(), reduction="sum"
            )
            _agree(float(out.loss.detach()), float(exact.detach()) / count)
            (exact * (scale / total)).backward()
            loss += float(exact.detach()) / total
            for name, parameter in built.trained:
                if parameter.grad is not None:
                    found = parameter.grad.float().cpu() / scale
                    gradients[name] = gradients[name] + found if name in gradients else found
                    parameter.grad = None
    finally:
        model.set_attn_implementation(attention.NAME)
    return Measured(loss, gradients)


def _prompt(shifted: Any) -> int:
    """Tokens before the last answer of a document, whose labels are shifted."""
    marks = torch.as_tensor(shifted) != IGNORE
    firsts = (marks & ~torch.cat([marks.new_zeros(1), marks[:-1]])).nonzero()
    return int(firsts[-1]) + 1 if len(firsts) else len(marks)


def _agree(theirs: float, exact: float) -> None:
    """transformers' own loss is the cross entropy of its own logits. Raises Failed."""
    if not abs(theirs - exact) <= FLOAT32_GRADIENT * abs(exact):
        raise Failed(
            "computing the loss by plain transformers",
            f"its loss is {theirs}, the cross entropy of its logits {exact}",
            "this family computes another loss and cannot be trained here",
        )


def _groups(documents: list[Document], vocabulary: int) -> Iterable[list[Document]]:
    """Documents that share a forward of plain transformers, so that its logits stay within LOGITS."""
    width = max(len(ids) for ids, _ in documents)
    size = max(1, LOGITS // (width * vocabulary))
    return (documents[i : i + size] for i in range(0, len(documents), size))


def _padded(documents: list[Document], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [N, S]; label i is the token after id i."""
    shape = (len(documents), max(len(ids) for ids, _ in documents))
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, (tokens, shifted) in enumerate(documents):
        ids[row, : len(tokens)] = torch.as_tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.as_tensor(shifted)
    return ids, mask, labels


def _autocast(built: Built) -> Any:
    dtype = built.stage.autocast
    return nullcontext() if dtype is None else torch.autocast(built.device.type, dtype)


def _in_float32(built: Built) -> Built:
    """The model itself in float32: every value that half precision holds is one of float32."""
    built.model.float()
    built.stage.autocast = None
    return built


def _compare(ours: Measured, reference: Measured) -> Difference:
    """Differences relative to the reference.

    A tensor whose gradient is (nearly) zero by mathematics, as that of a bias of the keys, holds nothing but
    rounding: no tensor is measured by less than the root mean square of all gradients.
    """
    if ours.gradients.keys() != reference.gradients.keys():
        odd = sorted(ours.gradients.keys() ^ reference.gradients.keys())
        raise Failed(
            "comparing gradients", f"only one side has a gradient of {odd[0]}", "report this"
        )
    total = math.hypot(*(float(g.double().norm()) for g in reference.gradients.values()))
    numel = sum(g.numel() for g in reference.gradients.values())
    apart, worst, name = [], 0.0, ""
    for key, wanted in reference.gradients.items():
        distance = float((ours.gradients[key].double() - wanted.double()).norm())
        least = total * math.sqrt(wanted.numel() / numel)
        share = distance / max(float(wanted.double().norm()), least)
        apart.append(distance)
        if worst < math.inf and not share <= worst:
            worst, name = math.inf if math.isnan(share) else share, key
    loss = abs(ours.loss - reference.loss) / abs(reference.loss)
    return Difference(loss, math.hypot(*apart) / total, worst, name)
