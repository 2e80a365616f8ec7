"""NEFTune's noise against the authors', transformers' and PaddleNLP's: the same draws, scaled by ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import FOLDER, cases
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.adapters import add_noise
from luthier.batch import PADDING, Layout, layout_scope
from luthier.config import AdapterConfig


@pytest.mark.parametrize("case", cases("neftune"))
def test_noise(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(FOLDER / case["file"])
    tensors = {name: stored[entry["key"]] for name, entry in case["tensors"].items()}
    embeddings = tensors["embeddings"]
    batch, size, _ = embeddings.shape
    lengths = case["hyper"].get("lengths") or [size] * batch  # the others know no padding
    documents = torch.full((batch, size), PADDING)
    for row, length in enumerate(lengths):
        documents[row, :length] = 0
    # what a document draws is what is stored for its tokens
    drawn = iter([u[:n] for u, n in zip(tensors["unit_noise"], lengths, strict=True)])

    def uniform(noise: Tensor, low: float, high: float, *, generator: Any) -> Tensor:
        assert low == -high
        return noise.copy_(high * next(drawn))

    monkeypatch.setattr(Tensor, "uniform_", uniform)
    model = Model(embeddings)
    scaling = "paddlenlp" if case["source"]["impl"] == "PaddleNLP" else "paper"
    config = AdapterConfig.model_validate(
        {"neftune_alpha": case["hyper"]["alpha"], "neftune_scaling": scaling}
    )
    add_noise(model, config, seed=0)
    ids = torch.arange(batch * size).view(batch, size)
    with layout_scope(Layout(documents, torch.zeros_like(documents))):
        noisy = model.embedding(ids)
        assert torch.equal(model.eval().embedding(ids), embeddings)
    torch.testing.assert_close(noisy, tensors["noisy"], **case["tolerance"])


class Model(nn.Module):
    """A model whose token i has the embedding i of all of `rows` [B, S, D]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(rows.flatten(0, 1))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding
