"""ReFT against numbers from the authors' code and PaddleNLP's: single edits, edits at positions, whole models.

Where a slot is missing (-1), the authors edit a padding token put in front and PaddleNLP the last token of the
padded row; here nothing is edited. The tests say where that is, and compare all else.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import FOLDER, VARIABLE, cases, tensors_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters import adapters_of, attach
from luthier.adapters.reft import Edit, SubspaceEdit, TinyEdit
from luthier.adapters.reft_places import find_positions
from luthier.batch import IGNORE, Layout, layout_scope
from luthier.config import AdapterConfig

POSITIONS = FOLDER.parent / "data" / "reft_positions.json"
SOURCES = ("authors", "paddlenlp")
EDITS = [c for s in SOURCES for c in cases("loreft", prefix=f"{s}.loreft.")] + cases("tinyreft")
IN_ROWS = [c for s in SOURCES for c in cases("loreft", prefix=f"{s}.loreft_positions.")]
MODELS = cases("loreft", prefix="paddlenlp.reft_model.")
# the golden names of our parameters
NAMES = {
    "subspace": "rotate",
    "source": "source_weight",
    "source_bias": "source_bias",
    "down": "param_A",
    "up": "param_B",
    "down_scale": "param_a",
    "up_scale": "param_b",
}


def config(case: dict[str, Any], **changes: Any) -> AdapterConfig:
    hyper = case["hyper"]
    form = {"form": "tiny"} if case["method"] == "tinyreft" else {"act_fn": hyper.get("act_fn", "linear")}  # fmt: skip
    values = {"method": "reft", "rank": hyper["low_rank_dimension"], "tied": True, **form}
    return AdapterConfig.model_validate(values | changes)


def take(edit: Edit, tensors: dict[str, Tensor], case: dict[str, Any], prefix: str = "") -> None:
    with torch.no_grad():
        for name, parameter in edit.named_parameters():
            value = tensors[prefix + NAMES[name]]
            parameter.copy_(value.t() if turned(case, name) else value)


def turned(case: dict[str, Any], name: str) -> bool:
    return name == "source" and case["id"].startswith("paddlenlp.")


def gradients(
    edit: Edit, tensors: dict[str, Tensor], case: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (ours, theirs)."""
    found = {}
    for name, parameter in edit.named_parameters():
        theirs = tensors.get(f"{prefix}grad_{NAMES[name]}", tensors.get("grad_rotate_free"))
        if theirs is not None and parameter.grad is not None:
            found[name] = (parameter.grad.t() if turned(case, name) else parameter.grad, theirs)
    return found


@pytest.mark.parametrize("case", EDITS)
def test_edit(case: dict[str, Any]) -> None:
    tensors = tensors_of(case)
    kind = TinyEdit if case["method"] == "tinyreft" else SubspaceEdit
    edit = kind(config(case), case["hyper"]["embed_dim"])
    take(edit, tensors, case)
    h = tensors["h"].requires_grad_()
    out = h + edit(h)
    (out * tensors["grad_out"]).sum().backward()
    assert h.grad is not None
    close(case, {"out": (out, tensors["out"]), "grad_h": (h.grad, tensors["grad_h"])})
    pairs = gradients(edit, tensors, case)
    assert pairs.keys() == dict(edit.named_parameters()).keys()
    close(case, pairs)


@pytest.mark.parametrize("case", IN_ROWS)
def test_positions_in_a_layout(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    model = llama(hidden_size=hyper["embed_dim"], num_hidden_layers=1)
    attach(model, config(case, positions=hyper["positions"]), seed=0)
    (adapter,) = adapters_of(model).values()
    edit = adapter.get_submodule("both")
    assert isinstance(edit, Edit)
    take(edit, tensors, case)

    ahead = 1 if case["id"].startswith("authors.") else 0  # their padding token
    h = tensors["h"].requires_grad_()
    real, prompts = h[:, ahead:], hyper["last_position"]
    with layout_scope(layout(prompts, real.shape[1])):
        out = torch.cat([h[:, :ahead], adapter.after(real, real)], dim=1)
    for row, place, times in slips(tensors["locations"].tolist(), h.shape[1], bool(ahead)):
        change = edit(h[row, place])
        new = h[row, place] + change
        change = change + (times - 1) * (new - new.detach())  # once in the value
        out = out.index_put((torch.tensor(row), torch.tensor(place)), change, accumulate=True)
    (out * tensors["grad_out"]).sum().backward()
    assert h.grad is not None
    pairs = {"out": (out, tensors["out"]), "grad_h": (h.grad, tensors["grad_h"])}
    close(case, pairs | gradients(edit, tensors, case))


def slips(places: list[list[int]], width: int, ahead: bool) -> list[tuple[int, int, int]]:
    """What upstream edits for missing slots: (row, token, how often its gradient counts)."""
    if ahead:  # the authors: their padding token, for each slot
        return [(row, 0, p.count(0)) for row, p in enumerate(places) if 0 in p]
    return [(row, width - 1, 1) for row, p in enumerate(places) if -1 in p and width - 1 not in p]


@pytest.mark.parametrize("case", MODELS)
def test_whole_model(case: dict[str, Any]) -> None:
    tensors, hyper = tensors_of(case), case["hyper"]
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "rms_norm_eps")  # fmt: skip
    model = llama(**{key: hyper[key] for key in wanted})
    base = {n.removeprefix("base/"): t for n, t in tensors.items() if n.startswith("base/")}
    model.load_state_dict(base)
    ids = tensors["input_ids"]
    close(case, {"base_logits": (model(input_ids=ids).logits, tensors["base_logits"])})
    options = config(case, positions=hyper["positions"], layers=tuple(hyper["layers"]))
    attach(model, options, seed=0)
    assert (tensors["locations"] >= 0).all()  # no slot is missing
    edits = {}
    for number, adapter in zip(hyper["layers"], adapters_of(model).values(), strict=True):
        edit = adapter.get_submodule("both")
        assert isinstance(edit, Edit)
        take(edit, tensors, case, f"layer{number}/")
        edits[number] = edit
    with layout_scope(layout(hyper["last_position"], ids.shape[1])):
        logits = model(input_ids=ids, use_cache=False).logits
    (logits * tensors["grad_logits"]).sum().backward()
    close(case, {"logits": (logits, tensors["logits"])})
    for number, edit in edits.items():
        pairs = gradients(edit, tensors, case, f"layer{number}/")
        assert len(pairs) == 3
        close(case, pairs)


@pytest.mark.skipif(not POSITIONS.is_file(), reason=f"{POSITIONS} is absent: see {VARIABLE}")
def test_table_of_positions() -> None:
    for entry in json.loads(POSITIONS.read_text("utf-8"))["table"]:
        first, last = find_positions(entry["positions"], entry["last_position"])
        assert [*first, *last] == [i for i in entry["locations"] if i >= 0], entry


def llama(**values: Any) -> Any:
    small = {"vocab_size": 40, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{**small, "attn_implementation": "eager", **values})
    ).eval()


def layout(prompts: list[int], width: int) -> Layout:
    """Rows of one document each, of `width` tokens, whose prompts have these lengths."""
    position = torch.arange(width).expand(len(prompts), -1)
    lengths = torch.tensor(prompts)[:, None]
    supervised = (position >= lengths - 1) & (position < width - 1)
    labels = torch.where(supervised, 1, IGNORE)
    return Layout(torch.zeros_like(position), position, labels=labels)


def close(case: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(
            ours.detach(), theirs, **case["tolerance"], msg=lambda m, n=name: f"{n}: {m}"
        )
