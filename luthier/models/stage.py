"""A stage: the part of a model that one process runs on a batch (without pipelining, the whole model).

`Stage.forward` derives the layout once, makes it current and calls the base model of transformers; the
head is apart, so that the loss may apply it to supervised positions only. Also here: recomputation and
compilation of the layers, and `check_stage`, which compares a stage with the model's plain forward.
The loss is in `train/loss.py`; kernels are chosen in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.batch import IGNORE, PADDING, Batch, Layout, layout_scope
from luthier.errors import Failed, Refused
from luthier.held import lent
from luthier.models import cpu_attention as cpu_attention  # registers the operator
from luthier.models.families import family_of
from luthier.models.head import is_plain, logits_less
from luthier.models.zoo.glm_generation import context_mask, infilling_positions
from luthier.positions import position_axes

# the relative error that rounding may cause in `check_stage`: far above it, far below a wrong formula
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Stage(nn.Module):
    """The model as one stage; `model` is the untouched `PreTrainedModel`, or what `share` says is here of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.recompute, self.keep_attention = "none", 0  # see `set_recompute`
        self.autocast: torch.dtype | None = None  # type of matrix products over wider weights
        self.vocabulary: Any = None  # `parallel.vocabulary.Vocabulary`, of a head cut by tokens
        self.share: Any = None  # `partial.Share` of a pipeline's rank
        self._family = family_of(model.config.model_type)
        self._randomness_checked = False

    def forward(self, batch: Batch, border: Any = None, chunk: Any = None) -> Any:
        """Hidden states [B, S, D] after the final norm. Padding's are finite and mean nothing.

        With `border` and `chunk` (`crossing.Border`, `partial.Chunk`) the forward of this pipeline stage alone: what
        the next one is given. Without them, all stages take part and the last one's result is everybody's.
        Failed when the first forward in training mode draws from torch's global generator: such randomness
        (dropout that `seed_dropout` does not reach) would depend on the order of the batches.
        """
        run = partial(self._base, batch)
        if chunk is not None:
            run = partial(self._part, batch, border, chunk)
        elif self.share is not None:
            run = partial(self._together, batch)
        with layout_scope(Layout.of(batch)), self._products(batch.input_ids.device):
            if not self.model.training or self._randomness_checked:
                return run()
            before = _generator_state(batch.input_ids.device)
            hidden = run()
            if not torch.equal(before, _generator_state(batch.input_ids.device)):
                raise Failed(
                    f"training the model family '{self.model.config.model_type}'",
                    "its layers draw random numbers that no seed of the run decides (a dropout that is not known here)",
                    "set the rates of dropout in its config.json to 0",
                )
            self._randomness_checked = True
            return hidden

    def _part(self, batch: Batch, border: Any, chunk: Any) -> Any:
        with self.share.scope(chunk, border):
            hidden = self._base(batch, border.given)
        hidden = hidden if chunk.last else border.taken
        beside = border.aside.taken
        return hidden if chunk.last or beside is None else (hidden, beside)

    def _together(self, batch: Batch) -> Tensor:
        return self.share.relay.tell(self._base(batch))

    def _base(self, batch: Batch, given: Tensor | None = None) -> Tensor:
        # Without use_cache=False, config.use_cache would make a cache, and masks for it. The mask of
        # ones only tells families not to look for padding or borders: `attention.attend` gets no mask.
        what = {"input_ids": batch.input_ids} if given is None else {"inputs_embeds": given}
        out = self.model.base_model(
            **what,
            position_ids=batch.position_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            use_cache=False,
        )
        return out[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], with all that the family does after its output layer; of a head
        that is cut, this rank's columns."""
        own = nullcontext() if self.vocabulary is None else self.vocabulary.columns()
        with self._products(hidden.device), own:
            logits = _output_layer(self.model)(hidden)
        config, family = self.model.config, self._family
        if family.multiply:
            logits = logits * getattr(config, family.multiply)
        if family.divide:
            logits = logits / getattr(config, family.divide)
        softcap = getattr(config, family.softcap) if family.softcap else None
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def relative_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `head`, but rows may be less a number each, which the softmax does not see; targets [N]."""
        layer, family = _output_layer(self.model), self._family
        after = family.multiply or family.divide or family.softcap
        whole = self.vocabulary is None and self.autocast is None and not after
        if not whole or not is_plain(layer, hidden):
            return self.head(hidden)
        return logits_less(hidden, layer.weight, targets)  # pyright: ignore[reportArgumentType]

    @property
    def has_head(self) -> bool:
        """Whether the model's last layers and its head are here."""
        return self.share is None or self.share.has_last

    def quietly(self) -> AbstractContextManager[None]:
        """Inside, a forward gives its result only where the head is: no stage waits for the last one."""
        return nullcontext() if self.share is None else self.share.relay.quietly()

    def _products(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast, when it is asked for: matrix products in half precision, the rest as it is."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `head` uses; with tied embeddings they are the input embedding's."""
        return list(_output_layer(self.model).parameters())


def _output_layer(model: PreTrainedModel) -> nn.Module:
    layer = model.get_output_embeddings()
    if layer is None:
        raise Refused(
            f"model family '{model.config.model_type}' was asked for",
            "it has no output layer",
            "give a causal language model",
        )
    return layer


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, whatever the family calls their list."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == wanted
            and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
        ):
            return module
    raise Refused(
        f"the layers of the model family '{model.config.model_type}' are needed",
        f"it has no list of {wanted} layers as transformers' families have",
        "use train.recompute=none and train.compile=false",
    )


def check_stage(stage: Stage) -> None:
    """Refuse a model whose stage differs from its plain forward, on two short documents of its own ids.

    It catches families that do something after the output layer that `families.py` does not know, and
    layers that mix documents. Costs three forwards of a dozen tokens. The model's mode is kept.
    """
    model = stage.model
    training = model.training
    device = next(model.parameters()).device
    batch, cuts = _trial(stage)
    ids = batch.input_ids[0]
    seen: list[Tensor] = []
    hook = _output_layer(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()
    try:
        with torch.no_grad():
            packed = stage(batch)[0].split(cuts)
            for part, hidden in zip(ids.split(cuts), packed, strict=True):
                seen.clear()
                with stage._products(device):
                    out = model(**plain_inputs(model, part[None]), use_cache=False)
                if not stage.has_head:
                    continue  # the last stage compares
                _same(stage, "hidden states in a packed row", hidden, seen[0][0])
                _same(stage, "logits", stage.head(seen[0][0]), _columns(stage, out.logits[0]))
    finally:
        hook.remove()
        model.train(training)


@contextmanager
def same_stage(stage: Stage) -> Iterator[None]:
    """Refused unless the hidden states of two short documents, and the logits of the same states, are after what is
    done inside what they were before."""
    training = stage.model.training
    batch, _ = _trial(stage)
    stage.model.eval()
    with torch.no_grad(), lent(stage.model):
        before = stage(batch)
        logits = stage.head(before[0])
    yield
    what, do = "cut among tensor-parallel ranks", "use parallel.shard in place of parallel.tensor"
    with torch.no_grad(), lent(stage.model):
        _same(stage, f"hidden states {what}", stage(batch), before, do)
        _same(stage, f"logits {what}", stage.head(before[0]), _columns(stage, logits), do)
    stage.model.train(training)


def check_shared(stage: Stage, split: Callable[[Batch], Batch]) -> None:
    """Refused unless this rank's tokens of a batch (`split`) have the hidden states that they have in whole rows.

    It finds families in which more than attention looks at several tokens. All ranks must call it.
    """
    training = stage.model.training
    batch, _ = _trial(stage)
    mine = split(batch)
    assert mine.share is not None
    real = mine.document_ids != PADDING
    stage.model.eval()
    with torch.no_grad():
        # padding's tokens are not in the batch: they take any place there
        places = mine.share.columns.clamp(max=batch.input_ids.shape[1] - 1)
        wanted = stage(batch)[0, places[0]][real[0]]
        ours = stage(mine)[real]
        if len(ours):
            what = "hidden states shared out among context-parallel ranks"
            _same(stage, what, ours, wanted, "use parallel.shard in place of parallel.context")
    stage.model.train(training)


def _columns(stage: Stage, logits: Tensor) -> Tensor:
    """Of all logits [N, V], those that `Stage.head` gives."""
    return logits if stage.vocabulary is None else stage.vocabulary.part.of(logits)


def _trial(stage: Stage) -> tuple[Batch, tuple[int, ...]]:
    """A row of two short documents of the model's own ids, and their lengths."""
    device = next(stage.model.parameters()).device
    vocab = stage.model.config.get_text_config().vocab_size
    ids = (torch.arange(13, device=device) * 7919 + 11) % vocab
    cuts = (5, 8)
    axes = position_axes(stage.model.config.model_type)
    places = [_places(n, axes).to(device) for n in cuts]
    documents = torch.repeat_interleave(
        torch.arange(len(cuts), device=device), torch.tensor(cuts, device=device)
    )
    labels = torch.full_like(ids, IGNORE)
    return Batch(ids[None], labels[None], torch.cat(places, -1)[None], documents[None], (0,)), cuts


def plain_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of a plain forward of any family over whole rows ids [B, S].

    With two position axes their first half is context, whatever the ids are: no row has to hold a blank.
    """
    family = family_of(model.config.model_type)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if position_axes(model.config.model_type) > 1:
        places = _places(ids.shape[1], 2).to(ids.device)
        inputs["position_ids"] = places.expand(len(ids), -1, -1)
    if family.explicit_mask:
        inputs["attention_mask"] = context_mask(inputs["position_ids"], None)
    return inputs


def padded_inputs(model: PreTrainedModel, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Arguments of a plain forward of any family over rows ids [B, S] of which `real` [B, S] is 1, with the
    positions and masks that the family itself finds in the ids. Refused: a row of GLM without a blank."""
    inputs = {"input_ids": ids, "attention_mask": real}
    if family_of(model.config.model_type).explicit_mask:
        inputs["position_ids"] = infilling_positions(model.config, ids, real)
        inputs["attention_mask"] = context_mask(inputs["position_ids"], real)
    return inputs


def _places(count: int, axes: int) -> Tensor:
    """Positions of a document, [n], or with two axes [2, n]: its first half is context, the blank at its end."""
    index = torch.arange(count)
    if axes == 1:
        return index
    context = count // 2
    return torch.stack([index.clamp(max=context - 1), (index - context + 1).clamp(min=0)])


_DO = "this family needs a row in luthier/models/families.py, or its layers mix documents; use another model"


def _same(stage: Stage, what: str, ours: Tensor, plain: Tensor, do: str = _DO) -> None:
    """Refused unless ||ours - plain|| / ||plain|| is what rounding explains."""
    error = float((ours.double() - plain.double()).norm() / plain.double().norm())
    if not error <= _ROUNDING.get(stage.autocast or plain.dtype, 1e-1):
        raise Refused(
            f"model family '{stage.model.config.model_type}' was asked for",
            f"its {what} differ from its plain forward's by {error:.2g} (relative)",
            do,
        )


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
