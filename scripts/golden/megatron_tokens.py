"""Write token files with Megatron-LM's own code: ids in two and four bytes, documents of several sequences.

    python megatron_tokens.py OUT        # in an environment with megatron-core 0.16.1, torch and numpy

`expected.json` beside them holds the sequences and where documents begin, as they were given to it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

OUT = Path(sys.argv[1]).resolve()
VOCABULARY = {"small": 320, "large": 151936}


def write(name, documents, vocab_size, **options):
    """One pair of files; a document is a list of sequences."""
    kind = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(OUT / f"{name}.bin"), dtype=kind, **options)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence), *([1] if options else []))
        builder.end_document()
    builder.finalize(str(OUT / f"{name}.idx"))
    return {"documents": documents, "vocab_size": vocab_size, "dtype": np.dtype(kind).name}


OUT.mkdir(parents=True, exist_ok=True)
draw = np.random.default_rng(7)
found = {}
for name, vocab_size in VOCABULARY.items():
    # ids of a text, then EOS, which is 2 in the tests' tokenizer
    lengths = (12, 1, 40, 7, 25, 3, 60)
    documents = [[[*draw.integers(3, vocab_size, n).tolist(), 2]] for n in lengths]
    found[name] = write(name, documents, vocab_size)
several = [[[5, 6, 7], [8]], [[9, 10, 2]], [[11], [12, 13], [14, 2]]]
found["several"] = write("several", several, 320)
found["modes"] = write("modes", [[[5, 6]], [[7, 2]]], 320, multimodal=True)
(OUT / "expected.json").write_text(json.dumps(found) + "\n")
