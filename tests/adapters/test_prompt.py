"""Prompt tuning against PEFT, which puts the embeddings before each row; its start; the base's own dropout.

What it shares with prefix tuning is tested in test_prefix.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import error, fill
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from luthier.adapters import adapters_of, attach, load_adapter, save_adapter
from luthier.adapters.virtual import COMMON
from luthier.batch import Batch, Layout, layout_scope
from luthier.config import AdapterConfig
from luthier.models.dropout import seed_dropout
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.seeding import generator

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's
SIZE = 5
CONFIG = AdapterConfig.model_validate({"method": "prompt", "num_prefix_tokens": SIZE})
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bloom", "mistral", "gemma2")  # two with a window
each_family = pytest.mark.parametrize("family", FAMILIES)


def peft_of(model: Any) -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SIZE)
    return get_peft_model(model, config).eval()


def padded() -> tuple[Tensor, Tensor]:
    """Ids and mask of two rows, the second padded on the right."""
    ids = torch.randint(3, 300, (2, 8), generator=generator(0, "ids"))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@each_family
def test_logits_and_gradients_are_pefts(
    tiny_model: Any, random_batch: Any, relative: Any, family: str
) -> None:
    """Rows padded on the right, and documents packed against PEFT's one by one."""
    model = tiny_model(family)
    adapter: Any = attach(model, CONFIG, seed=1)[""]
    fill(model)
    theirs = peft_of(tiny_model(family, attention="eager"))
    table = theirs.prompt_encoder["default"].embedding.weight
    table.data.copy_(adapter.embedding.data)
    ids, mask = padded()
    ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    expected = theirs(input_ids=ids, attention_mask=mask).logits[:, SIZE:][mask.bool()]
    assert relative(ours, expected) < 2e-6
    batch = random_batch(lengths_per_row=[[5, 3, 7], [8]])
    with layout_scope(Layout.of(batch)):
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    for s in Layout.of(batch).segments:
        part = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
        alone = theirs(input_ids=part).logits[0, SIZE:]
        ours = packed[s.row, s.start : s.stop]
        assert relative(ours, alone) < 2e-6
        weights = torch.randn(ours.shape, generator=generator(s.start, "weights"))
        (ours * weights).sum().backward(retain_graph=True)
        (alone * weights).sum().backward()
    assert relative(adapter.embedding.grad, table.grad) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folders_of_peft_load_here(
    tiny_model: Any, tmp_path: Path, relative: Any, family: str
) -> None:
    torch.manual_seed(0)
    theirs = peft_of(tiny_model(family, attention="sdpa"))
    theirs.save_pretrained(tmp_path)
    ids, mask = padded()
    expected = theirs(input_ids=ids, attention_mask=mask).logits[:, SIZE:][mask.bool()]
    model = tiny_model(family)
    loaded = load_adapter(model, tmp_path)
    ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert relative(ours, expected) < 2e-6
    assert loaded.config.method == "prompt" and not loaded.remarks


@each_family
def test_our_folders_load_in_peft(
    tiny_model: Any, tmp_path: Path, relative: Any, family: str
) -> None:
    model = tiny_model(family)
    attach(model, CONFIG, seed=1)
    fill(model)
    save_adapter(model, tmp_path, CONFIG, "", None)
    theirs = PeftModel.from_pretrained(tiny_model(family, attention="eager"), str(tmp_path))
    ids, mask = padded()
    ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    expected = theirs(input_ids=ids, attention_mask=mask).logits[:, SIZE:][mask.bool()]
    assert relative(ours, expected) < 2e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_starts_as_common_tokens(tiny_model: Any, family: str) -> None:
    """Also where the embedding layer scales what it gives."""
    model = tiny_model(family, vocab_size=COMMON + 200)
    adapter: Any = attach(model, CONFIG, seed=1)[""]
    with torch.no_grad():
        every = model.get_input_embeddings()(torch.arange(COMMON + 200))
    chosen = [int((every == row).all(1).nonzero()[0]) for row in adapter.embedding]
    assert len(set(chosen)) == SIZE and max(chosen) < COMMON


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_the_bases_dropout_does_not_act_on_virtual_tokens(
    tiny_model: Any, random_batch: Any, family: str, recompute: str
) -> None:
    """They are common to all rows: a row's result must not depend on the rows beside it."""
    model = tiny_model(family, dropout=0.3)
    adapter: Any = attach(model, CONFIG, seed=1)[""]
    fill(model)
    seed_dropout(model, 5)
    stage = Stage(model.train())
    set_recompute(stage, recompute)  # pyright: ignore[reportArgumentType]
    batch = random_batch(lengths_per_row=[[5, 3], [8], [2, 6]])
    whole = stage(batch)
    assert model.training and all(m.training for m in model.modules())
    whole.square().sum().backward()
    gradient, adapter.embedding.grad = adapter.embedding.grad, None
    names = ("input_ids", "labels", "position_ids", "document_ids")
    for i in range(3):
        tensors = {n: getattr(batch, n)[i : i + 1] for n in names}
        part = stage(Batch(**tensors, rows=(i,)))
        torch.testing.assert_close(part[0], whole[i])
        part.square().sum().backward()
    again: Any = adapter.embedding.grad
    assert error(again, gradient) < 1e-5
    assert not torch.allclose(Stage(model.eval())(batch), whole)
    assert adapters_of(model)
