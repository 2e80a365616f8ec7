"""Quantised folders: what `luthier quantize` writes, and runs on folders that are quantised already.

The folders of `quantize/folders/` were written by bitsandbytes and compressed-tensors. Where these libraries are
installed, plain transformers opens what is written here.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_config, write_data
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import luthier
from luthier.cli import main
from luthier.errors import Failed, Refused
from luthier.layers import dense_weight, is_quantized
from luthier.models.load import quiet

FOLDERS = sorted(p for p in (Path(__file__).parent / "quantize/folders").iterdir() if p.is_dir())
# section quantize -> layout
FORMS = {
    "nf4": ({"weights": "nf4"}, "bitsandbytes"),
    "nf4-double": ({"weights": "nf4", "double_quant": True, "block_size": 32}, "bitsandbytes"),
    "fp4": ({"weights": "fp4"}, "bitsandbytes"),
    "int8": ({"weights": "int8"}, "bitsandbytes"),
    "int8-32": ({"weights": "int8", "block_size": 32}, "compressed-tensors"),
    "int4": ({"weights": "int4"}, "compressed-tensors"),
    "mixed": ({"weights": "int4", "modules": {"q_proj": "int8"}}, "compressed-tensors"),
}
each_form = pytest.mark.parametrize("form", FORMS)
IDS = torch.arange(24).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.fixture
def make(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """make(form, family="llama") -> a folder that `luthier quantize` wrote."""

    def write(form: str, family: str = "llama") -> Path:
        target = tmp_path / f"{family}-{form}"
        luthier.quantize_model(
            {
                "model": {"path": str(model_folder(family))},
                "quantize": FORMS[form][0],
                "output": str(target),
            }
        )
        return target

    return write


# ---- folders of others


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_a_folder_of_others_is_their_model(path: Path, relative: Any) -> None:
    expected = load_file(path / "expected.safetensors")
    model, tokenizer = luthier.load(path, dtype="float32")
    assert tokenizer is None
    wanted = expected.pop("logits")
    for name, weight in expected.items():
        found = dense_weight(model.get_submodule(name.removesuffix(".weight")), weight.dtype)
        assert relative(found, weight) < 2e-7
    # where they decode to bfloat16, their logits are those of rounded weights
    bound = 1e-6 if next(iter(expected.values())).dtype == torch.float32 else 1e-2
    assert relative(logits(model), wanted) < bound
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if is_quantized(m)}
    assert kinds.keys() == {name.removesuffix(".weight") for name in expected}
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(layer.bias, load_file(path / "model.safetensors")[f"{Q_PROJ}.bias"].float())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".codes" in n)
    assert not hasattr(model.config, "quantization_config")


Q_PROJ = "model.layers.0.self_attn.q_proj"


# ---- what is written


@each_form
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_written_folder_is_the_model_quantised_while_read(
    form: str, family: str, make: Any, model_folder: Any
) -> None:
    asked, layout = FORMS[form]
    if family in ("gpt2", "opt") and form == "mixed":
        pytest.skip("names of llama's layers")
    folder = make(form, family)
    fields = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert fields["quant_method"] == layout
    model, tokenizer = luthier.load(folder)
    again, _ = luthier.load(model_folder(family), quantize=asked)
    assert tokenizer is not None and tokenizer.chat_template
    assert torch.equal(logits(model), logits(again))
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2
    dense = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(model_folder(family)).parameters())  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size < 0.8 * dense


@each_form
def test_training_on_the_folder_is_training_on_the_base_quantised(
    form: str, make: Any, model_folder: Any, tmp_path: Path
) -> None:
    folder, data = make(form), write_data(tmp_path / "data")
    quantize = {f"quantize__{key}": value for key, value in FORMS[form][0].items()}
    runs = {
        "folder": tiny_config(folder, data, tmp_path / "a", optim__lr=1e-2),
        "base": tiny_config(
            model_folder("llama"), data, tmp_path / "b", optim__lr=1e-2, **quantize
        ),
        "asked": tiny_config(folder, data, tmp_path / "c", optim__lr=1e-2, **quantize),
    }
    for config in runs.values():
        luthier.finetune(config)
    first, *others = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "abc")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert float(sum(t.abs().sum() for n, t in first.items() if "lora_B" in n)) > 0
    ours, same = luthier.evaluate(runs["folder"]), luthier.evaluate(runs["base"])
    assert ours["loss"] == same["loss"]
    model, _ = luthier.load(folder, tmp_path / "a")
    assert not torch.equal(logits(model), logits(luthier.load(folder)[0]))


def test_the_command_says_what_it_cost(model_folder: Any, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "small"
    words = [f"model.path={model_folder('llama')}", "quantize.weights=nf4", f"output={target}"]
    assert main(["quantize", *words]) == 0
    said = capsys.readouterr().out
    assert "nf4 64" in said and "MB" in said and "bitsandbytes" in said
    model, _ = luthier.load(target)
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    error = total = 0.0
    for name, layer in model.named_modules():
        if is_quantized(layer):
            weight = base.get_submodule(name).weight.detach()
            error += float((dense_weight(layer, torch.float32) - weight).double().square().sum())
            total += float(weight.double().square().sum())
    assert f"{(error / total) ** 0.5:.2%}" in said
    # a run's own file does too: its data and adapter are not looked at
    data = write_data(tmp_path / "data")
    config = tiny_config(model_folder("llama"), data, tmp_path / "again", quantize__weights="int8")
    assert luthier.quantize_model(config)["layout"] == "bitsandbytes"


@pytest.mark.parametrize("form", ["nf4-double", "int8", "int4"])
def test_save_pretrained_of_a_loaded_model_is_that_of_the_command(
    form: str, make: Any, model_folder: Any, tmp_path: Path
) -> None:
    """Also of a model that came from such a folder."""
    written = make(form)
    kept = load_file(written / "model.safetensors")
    fields = json.loads((written / "config.json").read_text("utf-8"))["quantization_config"]
    for source, asked in ((model_folder("llama"), FORMS[form][0]), (written, None)):
        model, _ = luthier.load(source, quantize=asked)
        with quiet():
            model.save_pretrained(tmp_path / "direct")
        found = load_file(tmp_path / "direct" / "model.safetensors")
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
        said = json.loads((tmp_path / "direct" / "config.json").read_text("utf-8"))
        assert said["quantization_config"] == fields
        shutil.rmtree(tmp_path / "direct")


def test_save_pretrained_with_an_adapter_is_refused(model_folder: Any, tmp_path: Path) -> None:
    run_on(model_folder("llama"), tmp_path, quantize__weights="nf4")
    model, _ = luthier.load(model_folder("llama"), tmp_path / "run", quantize="nf4")
    with pytest.raises(Refused, match=r"no place for the adapter.*luthier merge --quantized"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("weights", ["nf4", "int8", "int4"])
def test_a_head_that_has_another_name_in_files(
    weights: str, model_folder: Any, tmp_path: Path
) -> None:
    """transformers writes GPT-NeoX's `lm_head` as `embed_out`."""
    section = {"weights": weights, "modules": ["lm_head", "query_key_value"]}
    model = {"path": str(model_folder("gpt_neox"))}
    target = tmp_path / "q"
    luthier.quantize_model({"model": model, "quantize": section, "output": str(target)})
    assert any(name.startswith("embed_out.") for name in load_file(target / "model.safetensors"))
    mine, _ = luthier.load(target)
    assert is_quantized(mine.get_submodule("lm_head"))
    again, _ = luthier.load(model["path"], quantize=section)
    assert torch.equal(logits(mine), logits(again))


def test_half_precision_is_kept_as_it_is_stored(tmp_path: Path, tiny_model: Any) -> None:
    """A float16 checkpoint is quantised from float16, also where computation would be in bfloat16."""
    tiny_model("llama", torch.float16, attention="eager").save_pretrained(tmp_path / "half")
    luthier.quantize_model({"model": {"path": str(tmp_path / "half")}, "quantize": {"weights": "nf4"}, "output": str(tmp_path / "q")})  # fmt: skip
    base, made = (load_file(tmp_path / f / "model.safetensors") for f in ("half", "q"))
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(base[name], made[name])
    peak = base[f"{Q_PROJ}.weight"].view(-1, 64).abs().amax(1).float()
    assert torch.equal(made[f"{Q_PROJ}.weight.absmax"], peak)


def test_what_was_written_wrongly_is_not_published(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.quantize import bitsandbytes

    plain = bitsandbytes.write

    def spoilt(*args: Any) -> Any:
        made = plain(*args)
        made[args[0]][3] ^= 1
        return {name: t.clone() for name, t in made.items()}

    monkeypatch.setattr(bitsandbytes, "write", lambda name, t, *rest: spoilt(name, {n: v.clone() for n, v in t.items()}, *rest))  # fmt: skip
    with pytest.raises(Failed, match="not what is in memory"):
        luthier.quantize_model({"model": {"path": str(model_folder("llama"))}, "quantize": {"weights": "nf4"}, "output": str(tmp_path / "q")})  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_fewer_layers_of_a_quantised_folder(make: Any) -> None:
    folder = make("nf4")
    config = {"model": {"path": str(folder), "num_layers": 1}}
    from luthier.config import ModelConfig
    from luthier.models.load import build_model
    from luthier.prequantized import prequantized

    chosen = ModelConfig.model_validate(config["model"])
    model = build_model(chosen, seed=0, quantization=prequantized(chosen))
    assert len(model.model.layers) == 1 and logits(model).isfinite().all()


# ---- what is refused


def run_on(folder: Path, tmp_path: Path, **keys: Any) -> None:
    data = write_data(tmp_path / "data")
    luthier.finetune(tiny_config(folder, data, tmp_path / "run", **keys))


def test_a_layer_without_scales_is_refused_before_work(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("nf4")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{Q_PROJ}.weight.absmax"]
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(Refused, match=r"q_proj\.weight\.absmax: it is missing"):
        run_on(folder, tmp_path)
    with pytest.raises(Refused, match="it is missing"):
        luthier.load(folder)
    assert not (tmp_path / "run").exists()


def test_a_layer_of_another_shape_is_refused_before_work(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("int8")
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(fields | {"intermediate_size": 48}))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(Refused, match=r"_proj\.weight: its shape is \[\d+, \d+\], layer"):
        run_on(folder, tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_other_methods_are_refused_by_name(method: str, make: Any) -> None:
    folder = make("int8")
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    fields["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Refused, match=rf"not read here \({method}\)"):
        luthier.load(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": ["int8"]}))
    with pytest.raises(Refused, match="no JSON object"):
        luthier.load(folder)


def test_quantising_twice_is_refused(make: Any, tmp_path: Path) -> None:
    folder = make("nf4")
    for scheme in ("nf4", "int8"):
        with pytest.raises(Refused, match="quantised already"):
            luthier.quantize_model({"model": {"path": str(folder)}, "quantize": {"weights": scheme}, "output": str(tmp_path / "o")})  # fmt: skip
    with pytest.raises(Refused, match="quantised already, in another form"):
        luthier.load(folder, quantize="int8")
    with pytest.raises(Refused, match="in another form"):
        run_on(folder, tmp_path, quantize__weights="nf4", quantize__block_size=128)
    assert is_quantized(luthier.load(folder, quantize="nf4")[0].get_submodule(Q_PROJ))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter__method": None, "adapter__rank": None}, "full fine-tuning of a quantised base"),
        ({"adapter__pissa": True}, "pissa=true.*quantised already"),
        ({"adapter__modules_to_save": ["q_proj"], "adapter__targets": "v_proj"}, "is quantised"),
    ],
)
def test_what_a_quantised_folder_cannot_do(keys: Any, said: str, make: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=said):
        run_on(make("nf4"), tmp_path, **keys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quantize": {}}, "asks for nothing"),
        ({"quantize": {"weights": "nf4", "modules": {"q_proj": "int8"}}}, "together"),
        ({"model": {"init": "random"}}, "random weights"),
        ({"adapter": {"path": "somewhere"}}, "luthier merge"),
        ({"output": "taken"}, "not empty"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    section: Any, said: str, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    config: dict[str, Any] = {"quantize": {"weights": "nf4"}, "output": str(tmp_path / "o")}
    config |= section
    config["model"] = {"path": str(model_folder("llama")), **config.get("model", {})}
    config["output"] = str(tmp_path / config["output"])
    with pytest.raises(Refused, match=said):
        luthier.quantize_model(config)
    assert not (tmp_path / "o").exists()


def test_merging_into_a_quantised_folder_is_refused(make: Any, tmp_path: Path) -> None:
    folder = make("nf4")
    run_on(folder, tmp_path)
    with pytest.raises(Refused, match="quantised"):
        luthier.merge(str(folder), str(tmp_path / "run"), str(tmp_path / "merged"))


# ---- the libraries themselves, where they are installed


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The quantised weights as the library that holds them decodes them."""
    found = {}
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        if kind == "Linear4bit":
            import bitsandbytes  # pyright: ignore[reportMissingImports]

            state = copy.copy(layer.weight.quant_state)
            shape, state.shape = state.shape, (state.shape.numel(),)
            # a flat view: the CPU kernel decodes rows that hold no whole blocks wrongly
            flat = bitsandbytes.functional.dequantize_4bit(layer.weight.data.view(-1, 1), state)
            found[name] = flat.view(shape)
        elif kind == "Linear8bitLt":
            found[name] = layer.weight.data * (layer.weight.SCB / 127)[:, None]
        elif isinstance(layer, nn.Linear):
            found[name] = layer.weight.data
    return found


@pytest.mark.filterwarnings("ignore")  # third parties'
@each_form
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_plain_transformers_opens_it(form: str, family: str, make: Any, relative: Any) -> None:
    pytest.importorskip(FORMS[form][1].replace("-", "_"))
    if family == "opt" and form == "mixed":
        pytest.skip("names of llama's layers")
    folder = make(form, family)
    mine, _ = luthier.load(folder)
    with quiet():
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    if FORMS[form][1] == "compressed-tensors":  # the first forward decodes the weights
        assert relative(logits(theirs), logits(mine)) < 1e-6
    found = weights_of(theirs)
    layers = {n: m for n, m in mine.named_modules() if is_quantized(m)}
    assert len(layers) >= 12
    for name, layer in layers.items():
        assert relative(found[name], dense_weight(layer, torch.float32)) < 2e-7
    others = {n: p for n, p in mine.named_parameters() if n.rpartition(".")[0] not in layers}
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in others.items())
    shutil.rmtree(folder)
