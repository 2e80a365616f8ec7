"""Prefix tuning against PEFT and the definition; and what it shares with prompt tuning: cache, packing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_table import error, fill, run
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from luthier.adapters import (
    ADAPTERS,
    adapter_parameters,
    adapters_of,
    attach,
    fold_into,
    load_adapter,
    save_adapter,
)
from luthier.adapters.prefix import NETWORK
from luthier.adapters.virtual import TABLE, draw_tokens
from luthier.batch import IGNORE, Layout
from luthier.config import AdapterConfig
from luthier.errors import Refused
from luthier.models.generate import GenerateOptions, generate
from luthier.models.recompute import set_recompute
from luthier.models.stage import Stage
from luthier.seeding import generator

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's
SIZE = 5
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bloom")
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix"},
    "paddlenlp": {"method": "prefix", "form": "paddlenlp"},
    "network": {"method": "prefix", "prefix_projection": True, "projection_size": 24},
    "prompt": {"method": "prompt"},
}
each_method = pytest.mark.parametrize("method", METHODS)


def options(method: str, **changes: Any) -> AdapterConfig:
    values = {"num_prefix_tokens": SIZE, **METHODS[method], **changes}
    return AdapterConfig.model_validate(values)


def adapted(tiny_model: Any, family: str, method: str, *model: Any, **changes: Any) -> Any:
    """A model with an adapter as if trained."""
    made = tiny_model(family, *model)
    attach(made, options(method, **changes), seed=1)
    fill(made)
    return made


def padded() -> tuple[Tensor, Tensor]:
    """Ids and mask of two rows, the second padded on the right."""
    ids = torch.randint(3, 300, (2, 8), generator=generator(0, "ids"))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


# ---- the start


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["paper", "paddlenlp"])
@pytest.mark.parametrize("network", [False, True], ids=["table", "network"])
def test_it_starts_as_tokens_of_the_model_before_each_document(
    tiny_model: Any, random_batch: Any, family: str, form: str, network: bool
) -> None:
    if form == "paddlenlp" and family in ("gpt2", "opt"):
        pytest.skip("learned positions: there is none before the first")
    model, batch = tiny_model(family), random_batch(lengths_per_row=[[5, 3], [8]])
    base = tiny_model(family)
    attach(model, options("prefix", form=form, prefix_projection=network), seed=1)
    ours = run(model, batch)
    tokens = draw_tokens(base, SIZE, generator(1, "adapter", ""))
    embed = base.get_input_embeddings()
    for s in Layout.of(batch).segments:
        x = torch.cat([tokens, embed(batch.input_ids[s.row, s.start : s.stop])])[None]
        expected = base(inputs_embeds=x, use_cache=False).logits[0, SIZE:]
        # the network solves for the keys and values by least squares
        assert error(ours[s.row, s.start : s.stop], expected) < (2e-5 if network else 2e-6)


# ---- PEFT


def peft_of(model: Any, network: bool) -> Any:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=SIZE,
        prefix_projection=network,
        encoder_hidden_size=24,  # pyright: ignore[reportArgumentType]
    )
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("network", [False, True], ids=["table", "network"])
def test_logits_and_gradients_are_pefts(tiny_model: Any, family: str, network: bool) -> None:
    method = "network" if network else "prefix"
    model = adapted(tiny_model, family, method)
    theirs = peft_of(tiny_model(family, attention="sdpa"), network)
    encoder = theirs.prompt_encoder["default"]
    adapter: Any = adapters_of(model)[""]
    mine = {k.removeprefix("prompt_encoder."): v for k, v in adapter.stored().items()}
    mine = mine if network else {"embedding.weight": adapter.embedding}
    encoder.load_state_dict(mine)
    ids, mask = padded()
    both = []
    for each in (model, theirs):
        logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        both.append(logits)
    assert error(*both) < 2e-6
    for name, parameter in encoder.named_parameters():
        assert error(mine[name].grad, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("network", [False, True], ids=["table", "network"])
def test_folders_of_peft_load_here(
    tiny_model: Any, tmp_path: Path, family: str, network: bool
) -> None:
    torch.manual_seed(0)
    theirs = peft_of(tiny_model(family, attention="sdpa"), network)
    theirs.save_pretrained(tmp_path)
    ids, mask = padded()
    expected = theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    for trainable in (False, True):
        model = tiny_model(family)
        loaded = load_adapter(model, tmp_path, trainable=trainable)
        ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert error(ours, expected) < 2e-6
        assert loaded.config.form_ == "paper" and loaded.config.num_prefix_tokens == SIZE
        assert any("without the network" in r for r in loaded.remarks) == network


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["prefix", "network"])
def test_our_folders_load_in_peft(
    tiny_model: Any, tmp_path: Path, family: str, method: str
) -> None:
    model = adapted(tiny_model, family, method)
    save_adapter(model, tmp_path, options(method), "", None)
    theirs = PeftModel.from_pretrained(tiny_model(family, attention="sdpa"), str(tmp_path))
    ids, mask = padded()
    ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert error(theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()], ours) < 2e-6


# ---- folders


@pytest.mark.parametrize("method", ["prefix", "paddlenlp", "network", "prompt"])
def test_folders_load_without_our_own_facts(
    tiny_model: Any, random_batch: Any, tmp_path: Path, method: str
) -> None:
    model, batch = adapted(tiny_model, "llama", method), random_batch()
    save_adapter(model, tmp_path, options(method), "base", None)
    (tmp_path / "luthier.json").unlink()
    again = tiny_model("llama")
    loaded = load_adapter(again, tmp_path)
    assert torch.allclose(run(again, batch), run(model, batch), atol=1e-5)
    assert loaded.config.form_ == options(method).form_ if method != "prompt" else True
    fields = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    kind = {"paddlenlp": "LUTHIER_PREFIX", "prompt": "PROMPT_TUNING"}
    assert fields["peft_type"] == kind.get(method, "PREFIX_TUNING")
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"new_in_peft": 3}))
    assert any("new_in_peft" in r for r in load_adapter(tiny_model("llama"), tmp_path).remarks)


def test_the_network_of_paddlenlps_form_loads_without_our_own_facts(
    tiny_model: Any, random_batch: Any, tmp_path: Path
) -> None:
    model = adapted(tiny_model, "llama", "network", form="paddlenlp")
    save_adapter(model, tmp_path, options("network", form="paddlenlp"), "base", None)
    (tmp_path / "luthier.json").unlink()
    again = tiny_model("llama")
    config = load_adapter(again, tmp_path).config
    assert config.prefix_projection and config.projection_size == 24
    batch = random_batch()
    assert torch.equal(run(again, batch), run(model, batch))


def test_folders_that_do_not_fit_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    for method in ("prefix", "network", "prompt"):
        model = adapted(tiny_model, "llama", method)
        folder = tmp_path / method
        save_adapter(model, folder, options(method), "base", None)
        with pytest.raises(Refused, match=r"its shape is .* would fit"):
            load_adapter(tiny_model("gpt2", n_embd=48), folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        lost = NETWORK["bias2"] if method == "network" else TABLE
        del tensors[lost]
        tensors["base_model.model.lm_head.weight"] = model.lm_head.weight.detach().clone()
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(Refused, match=f"it lacks the tensor {lost}"):
            load_adapter(tiny_model("llama"), folder)
        path = folder / "adapter_config.json"
        fields = json.loads(path.read_text("utf-8"))
        for wrong, why in (
            ({"num_virtual_tokens": "many"}, "num_prefix_tokens"),
            ({"num_transformer_submodules": 2}, "several parts"),
        ):
            path.write_text(json.dumps(fields | wrong))
            with pytest.raises(Refused, match=why):
                load_adapter(tiny_model("llama"), folder)


# ---- packing, cache, positions


@each_method
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2"])
def test_packed_is_alone(
    tiny_model: Any, random_batch: Any, monkeypatch: Any, method: str, family: str
) -> None:
    """Logits and gradients, in float64, also with layers computed again; alone is a plain call."""
    # some norms compute in float32: alone, each document's gradient to the virtual tokens is rounded there
    rounded = method == "prompt" and family in ("llama", "qwen2", "mistral")
    bound = 1e-6 if rounded else 1e-10
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of some norms
    batch, found = random_batch(lengths_per_row=[[5, 3, 7], [8]]), []
    for mode in ("none", "layer", "alone"):
        model = adapted(tiny_model, family, method, torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        if mode == "alone":
            for s in Layout.of(batch).segments:
                ids = batch.input_ids[s.row : s.row + 1, s.start : s.stop]
                logits = model(input_ids=ids, use_cache=False).logits[0]
                total = total + summed(logits, batch.labels[s.row, s.start : s.stop])
        else:
            stage = Stage(model.train())
            set_recompute(stage, mode)
            hidden = stage(batch).flatten(0, 1)
            total = summed(stage.head(hidden), batch.labels.flatten())
        total.backward()
        found.append([total, *(p.grad for p in adapter_parameters(model).values())])
    for packed, again, single in zip(*found, strict=True):
        assert error(again, packed) < 1e-12 and error(packed, single) < bound


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@each_method
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_generation_with_cache_is_without(tiny_model: Any, method: str, family: str) -> None:
    """Prompts of several lengths in one micro-batch, against one whole forward per token."""
    model = adapted(tiny_model, family, method)
    draw = generator(3, "prompts")
    prompts = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (7, 4, 9)]
    answers = generate(
        model, prompts, GenerateOptions(max_new_tokens=6), pad_id=0, stop_ids=[], micro_batch=3
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
        assert len(answer) == 6


@each_method
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_given_or_not(tiny_model: Any, method: str, family: str) -> None:
    """Also behind a cache, and as a base model called alone."""
    model = adapted(tiny_model, family, method)
    ids = torch.randint(3, 300, (2, 9), generator=generator(0, "ids"))
    places = torch.arange(9)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, position_ids=places).logits
        assert torch.equal(model(input_ids=ids).logits, whole)
        assert torch.equal(model(ids).logits, whole)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, whole)
        hidden = model.base_model(input_ids=ids)[0]
        assert torch.equal(model.get_output_embeddings()(hidden), whole)
        cache, steps = None, []
        for part in ids.split((4, 3, 1, 1), dim=1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
            assert cache.get_seq_length() == sum(x.shape[1] for x in steps)  # real tokens only
        assert error(torch.cat(steps, 1), whole) < 2e-6


@each_method
def test_a_row_padded_on_the_left_is_that_row_alone(tiny_model: Any, method: str) -> None:
    """OPT counts positions by the mask where none are given."""
    model = adapted(tiny_model, "opt", method)
    ids = torch.randint(3, 300, (2, 9), generator=generator(0, "ids"))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, 4:]).logits
        assert error(both[1, 4:], alone[0]) < 2e-6
        first = model(input_ids=ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
        second = model(
            input_ids=ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values
        )
        assert error(second.logits, both[:, 7:]) < 2e-6


@each_method
def test_virtual_tokens_are_computed_once_per_generation(
    tiny_model: Any, monkeypatch: Any, method: str
) -> None:
    model = adapted(tiny_model, "llama", method)
    adapter: Any = adapters_of(model)[""]
    calls = []
    real = type(adapter).compute
    monkeypatch.setattr(
        type(adapter), "compute", lambda self, base: calls.append(1) or real(self, base)
    )
    options_ = GenerateOptions(max_new_tokens=5)
    for _ in range(2):
        generate(model, [[5, 6], [7, 8]], options_, pad_id=0, stop_ids=[], micro_batch=2)
    assert len(calls) == 2


@each_method
def test_gradients_are_finite_differences(tiny_model: Any, random_batch: Any, method: str) -> None:
    model = adapted(tiny_model, "gpt2", method, torch.float64, num_prefix_tokens=2)
    batch = random_batch(lengths_per_row=[[3, 2]])
    parameters = list(adapter_parameters(model).values())
    assert torch.autograd.gradcheck(lambda *_: run(model, batch), parameters, fast_mode=True)


# ---- bad input


@each_method
def test_what_does_not_fit_is_refused(tiny_model: Any, method: str) -> None:
    model = tiny_model("llama")  # 256 positions
    for changes, why in (
        ({"num_prefix_tokens": 256}, "adapter.num_prefix_tokens=256.*256 positions.*less than 256"),
        ({"layers": "0"}, "adapter.layers=0.*act in all layers"),
        ({"rank": 4}, "adapter.rank=4.*no such option"),
        ({"targets": "q_proj"}, "no such option"),
    ):
        with pytest.raises(Refused, match=why):
            attach(model, options(method, **changes), seed=1)
    assert not adapters_of(model)
    kind = ADAPTERS[options(method).method]
    taken = 0 if method == "paddlenlp" else SIZE
    assert kind.reserve(options(method)) == taken
    kind.check_length(options(method), 256 - taken, 256)
    kind.check_length(options(method), 10**6, None)
    if taken:
        with pytest.raises(Refused, match=r"documents of 252 tokens.*give data.length=251 or less"):
            kind.check_length(options(method), 252, 256)


@each_method
def test_attention_that_sees_no_prefix_is_refused(
    tiny_model: Any, random_batch: Any, tmp_path: Path, method: str
) -> None:
    save_adapter(adapted(tiny_model, "llama", method), tmp_path, options(method), "base", None)
    for how in ("attach", "load"):
        model = tiny_model("llama", attention="sdpa")
        with pytest.raises(Refused, match=r"its attention .'sdpa'. does not see them"):
            if how == "attach":
                attach(model, options(method), seed=1)
            else:
                load_adapter(model, tmp_path)
            model(input_ids=random_batch().input_ids)


@each_method
def test_merging_is_refused(tiny_model: Any, method: str) -> None:
    model = adapted(tiny_model, "llama", method)
    with pytest.raises(Refused, match=r"no change of a weight.*together with the adapter"):
        fold_into(model)
    assert adapters_of(model)
