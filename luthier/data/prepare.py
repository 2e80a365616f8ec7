"""The rows of a run, of whichever kind its mode wants."""

from __future__ import annotations

from luthier.config import RunConfig
from luthier.data import dataset
from luthier.data.corpus import Corpus
from luthier.data.corpus_open import prepare_corpus
from luthier.data.dataset import Dataset, LazyDataset, Progress
from luthier.data.encode import Renderer
from luthier.data.sources import Split


def prepare(
    config: RunConfig, renderer: Renderer, split: Split, progress: Progress | None = None
) -> Dataset | LazyDataset | Corpus | None:
    """What `dataset.prepare` or, for pretraining, `corpus_open.prepare_corpus` gives."""
    if config.train.mode == "pretrain":
        return prepare_corpus(config, renderer, split, progress)
    return dataset.prepare(config, renderer, split, progress)
