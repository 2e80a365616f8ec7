"""GLM as a member of the house: packing, generation, recomputation, dropout, files, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.batch import IGNORE, PADDING, Batch
from luthier.errors import Refused
from luthier.models.attention import install
from luthier.models.dropout import seed_dropout
from luthier.models.generate import GenerateOptions, generate
from luthier.models.load import quiet, save_model
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.models.zoo.glm import GLMConfig, GLMForConditionalGeneration
from luthier.models.zoo.glm_generation import context_mask, infilling_positions, set_special_ids
from luthier.seeding import generator

MASK, GMASK, SOP, EOP = 90, 91, 92, 93
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "max_sequence_length": 48,
    "embedding_dropout_prob": 0.0,
    "attention_dropout_prob": 0.0,
    "output_dropout_prob": 0.0,
    "sop_token_id": SOP,
    "mask_token_ids": [MASK, GMASK],
}


def tiny_glm(attention: str = "auto", **overrides: Any) -> Any:
    config = GLMConfig(**TINY | overrides)
    model = GLMForConditionalGeneration._from_config(config, attn_implementation="luthier")
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator(0, name))
            p.copy_((p if p.ndim == 1 else 0.0) + 0.15 * noise)
    install(model, attention)
    return model.eval()


def row(context: int, answer: int, seed: int) -> list[int]:
    """A context with one blank, <|startofpiece|>, answer."""
    ids = torch.randint(0, 90, (context + answer,), generator=generator(seed, "row")).tolist()
    ids[context // 2] = MASK
    return [*ids[:context], SOP, *ids[context:]]


def packed_batch(rows: list[list[list[int]]], width: int) -> Batch:
    """Rows of documents as the data side makes them: positions anew in each document, aligned labels."""
    shape = (len(rows), width)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    documents = torch.full(shape, PADDING)
    positions = torch.zeros(len(rows), 2, width, dtype=torch.long)
    for i, documents_of_row in enumerate(rows):
        start = 0
        for number, document in enumerate(documents_of_row):
            stop = start + len(document)
            one = torch.tensor([document])
            positions[i, :, start:stop] = infilling_positions(GLMConfig(**TINY), one, None)[0]
            ids[i, start:stop], documents[i, start:stop] = one[0], number
            begin = start + document.index(SOP)
            labels[i, begin : stop - 1] = ids[i, begin + 1 : stop]
            start = stop
    return Batch(ids, labels, positions, documents, tuple(range(len(rows))))


DOCUMENTS = [[row(7, 4, 0), row(5, 6, 1)], [row(9, 8, 2)]]


def alone(model: Any, document: list[int]) -> tuple[Tensor, Tensor]:
    """Input ids and hidden states [S, H] of a plain call in the original's conventions."""
    ids = torch.tensor([document])
    positions = infilling_positions(model.config, ids, None)
    out = model.glm(
        input_ids=ids, position_ids=positions, attention_mask=context_mask(positions, None)
    )
    return ids[0], out.last_hidden_state[0]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_packed_rows_are_as_alone(kernel: str, relative: Callable[..., float]) -> None:
    model = tiny_glm(kernel)
    batch = packed_batch(DOCUMENTS, 26)
    hidden = Stage(model)(batch)
    weight = torch.randn(26, 32, generator=generator(0, "weight"))
    losses, wanted = [], []
    for i, documents in enumerate(DOCUMENTS):
        start = 0
        for document in documents:
            stop = start + len(document)
            _, plain = alone(model, document)
            assert (
                relative(hidden[i, start:stop], plain) < 3e-6
            )  # rounding of fp32 over three layers
            losses.append((hidden[i, start:stop] * weight[start:stop]).sum())
            wanted.append((plain * weight[start:stop]).sum())
            start = stop
    torch.stack(losses).sum().backward()
    packed = gradients(model)
    torch.stack(wanted).sum().backward()
    for name, plain in gradients(model).items():
        assert relative(packed[name], plain) < 1e-5, name


@pytest.mark.parametrize("mode", ["layer", "selective"])
def test_recomputation_changes_nothing(mode: Any, relative: Callable[..., float]) -> None:
    model = tiny_glm().train()
    stage, batch = Stage(model), packed_batch(DOCUMENTS, 26)
    stage(batch).square().sum().backward()
    kept = gradients(model)
    set_recompute(stage, mode)
    stage(batch).square().sum().backward()
    again = gradients(model)
    assert all(relative(again[name], kept[name]) == 0.0 for name in kept)


def test_dropout_is_of_the_row() -> None:
    """All three places are reached by the house's seeds: `Stage` refuses a draw from torch's generator."""
    rates = dict.fromkeys(
        ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), 0.3
    )
    batch = packed_batch(DOCUMENTS, 26)
    for rate in rates:
        model = tiny_glm(**{rate: 0.3})
        calm = Stage(model)(batch)
        seed_dropout(model, 7)
        first, again = (Stage(model.train())(batch) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, calm)


@pytest.mark.parametrize("cache", [True, False])
def test_a_padded_batch_answers_as_alone(cache: bool, relative: Callable[..., float]) -> None:
    """Positions and masks of left-padded prompts, and of each new token, are those of the row alone."""
    model = tiny_glm()
    prompts = [row(n, 0, n) for n in (4, 9, 6)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    with quiet(), torch.no_grad():
        together = model.generate(ids, attention_mask=mask, **options)
        for i, prompt in enumerate(prompts):
            plain = list(prompt)
            for step in range(8):  # by hand: a forward over all ids so far
                logits = model.lm_head(alone(model, plain)[1][-1])
                assert relative(together.logits[step][i], logits) < 1e-5
                plain.append(int(logits.argmax()))
            assert together.sequences[i, width:].tolist() == plain[len(prompt) :]


def test_the_house_generates() -> None:
    model = tiny_glm()
    prompts = [row(n, 0, n) for n in (4, 9, 6)]
    options = GenerateOptions(max_new_tokens=6)
    found = generate(model, prompts, options, pad_id=0, stop_ids=[EOP], micro_batch=3)
    assert found == [
        generate(model, [p], options, pad_id=0, stop_ids=[EOP], micro_batch=1)[0] for p in prompts
    ]


def test_beams_take_their_rows_along() -> None:
    model = tiny_glm()
    ids = torch.tensor([row(5, 0, 3), row(5, 0, 4)])
    with quiet(), torch.no_grad():
        both = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
        each = [
            model.generate(x[None], max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
            for x in ids
        ]
    assert torch.equal(both, torch.cat(each))


def test_one_axis_of_positions_is_causal(relative: Callable[..., float]) -> None:
    """The house's [B, S] positions: axis 1 is 0, and with no mask nothing ahead is seen."""
    model = tiny_glm()
    ids = torch.tensor([row(5, 3, 0)])
    plain = model(ids).logits
    assert torch.equal(plain, model(ids, position_ids=torch.arange(9)[None]).logits)
    assert relative(model(ids[:, :4]).logits, plain[:, :4]) < 3e-6


def test_a_mask_of_two_axes_is_for_all_queries(relative: Callable[..., float]) -> None:
    """[B, S] in the original's convention: the same keys for every query, in both directions."""
    model = tiny_glm()
    ids, mask = torch.tensor([row(5, 3, 0)]), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    wide = mask[:, None, None].expand(1, 1, 9, 9)
    assert torch.equal(
        model(ids, attention_mask=mask).logits, model(ids, attention_mask=wide).logits
    )
    count = model(ids[:, :6], attention_mask=torch.tensor([6])).logits
    assert relative(model(ids, attention_mask=mask).logits[:, :6], count) < 3e-6


def test_files_are_the_originals(tmp_path: Path) -> None:
    """Original names with the `glm.` of the class that was saved, no head, "glm" in config.json."""
    from safetensors import safe_open

    model = tiny_glm()
    save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "glm.word_embeddings.weight" in names
    assert "glm.transformer.layers.0.attention.query_key_value.weight" in names
    assert not [name for name in names if "lm_head" in name or not name.startswith("glm.")]
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["num_layers"], config["max_sequence_length"]) == (
        "glm",
        3,
        48,
    )
    with quiet():
        again = GLMForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.tensor([row(5, 3, 0)])
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_special_ids_are_found(tmp_path: Path) -> None:
    """In the config, in the tokenizer files beside it, by the vocabulary of a released model."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "glm", "num_layers": 2, "vocab_size": 96})
    )
    with quiet():
        assert GLMConfig.from_pretrained(tmp_path).sop_token_id is None
        added = {"[MASK]": 80, "[sMASK]": 81, "[gMASK]": 82, "<|startofpiece|>": 83}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        found = GLMConfig.from_pretrained(tmp_path)
    assert (found.sop_token_id, found.mask_token_ids) == (83, [80, 81, 82])
    assert GLMConfig(vocab_size=50304).sop_token_id == 50257
    assert GLMConfig(vocab_size=50048).mask_token_ids == [50003, 50008, 50009]

    class Tokenizer:
        sop_token_id, mask_token_ids = 5, (6, 7)

    set_special_ids(found, Tokenizer())
    assert (found.sop_token_id, found.mask_token_ids) == (5, [6, 7])


def fill(model: Any, ids: list[int], **inputs: Any) -> None:
    model.generate(torch.tensor([ids]), max_new_tokens=2, pad_token_id=0, **inputs)


def too_many(model: Any) -> None:
    seen = torch.ones(1, 1, 6, 6)
    positions = infilling_positions(model.config, torch.tensor([row(3, 2, 0)]), None)
    model.prepare_inputs_for_generation(
        torch.tensor([row(3, 3, 0)]), position_ids=positions, generation_attention_mask=seen
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: fill(m, [1, 2, 3, SOP]), "no mask token"),
        (lambda m: fill(m, [1, 2, MASK, 3]), r"no <\|startofpiece\|>"),
        (lambda m: fill(m, [1, 2, SOP, MASK]), "no mask token before"),
        (lambda m: m(torch.zeros(1, 50, dtype=torch.long)), "position 49"),
        (
            lambda m: m(
                torch.zeros(1, 49, dtype=torch.long), position_ids=torch.full((1, 2, 49), 49)
            ),
            "position 49",
        ),
        (lambda m: m(torch.zeros(1, 4, dtype=torch.long), mems=[1]), "mems"),
        (
            lambda m: m(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, 4)),
            r"shape \[1, 4, 4\]",
        ),
        (too_many, "ends after 6"),
        (lambda m: GLMConfig(**TINY | {"sop_token_id": 96}), "sop_token_id=96"),
        (lambda m: GLMConfig(**TINY | {"mask_token_ids": [SOP]}), "must differ"),
        (lambda m: GLMConfig(**TINY | {"relative_encoding": True}), "relative_encoding=True"),
        (lambda m: GLMConfig(**TINY | {"block_position_encoding": False}), "no released model has"),
    ],
)
def test_bad_input_is_refused(act: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(Refused, match=message), quiet():
        act(tiny_glm())


def test_a_blank_without_special_ids_is_refused() -> None:
    model = tiny_glm(sop_token_id=None, mask_token_ids=None)
    with pytest.raises(Refused, match="names neither"), quiet():
        fill(model, row(5, 0, 0))


def test_rows_may_be_as_long_as_the_tables() -> None:
    model = tiny_glm()
    assert model(torch.zeros(1, 49, dtype=torch.long)).logits.isfinite().all()


def test_a_config_of_glm4_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm", "num_hidden_layers": 2}))
    with pytest.raises(Refused, match="another model's"), quiet():
        GLMConfig.from_pretrained(tmp_path)
