"""Loading and saving: what is read is what was written, and every faulty folder is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from luthier.config import ModelConfig
from luthier.errors import Refused
from luthier.models import folder
from luthier.models.load import build_model, fingerprint, resolve_device, resolve_dtype, save_model
from luthier.models.tokenizer import check_tokenizer, load_tokenizer, pad_id

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom")
CPU = torch.device("cpu")


def _build(path, **keys):
    return build_model(ModelConfig(path=str(path), **keys), seed=3)


@pytest.fixture
def copy(model_folder, tmp_path):
    """A llama folder to spoil."""
    target = tmp_path / "model"
    shutil.copytree(model_folder("llama"), target)
    return target


def _edit_config(path, **keys):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))


def _edit_weights(path, change):
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def _shard(path):
    """Cut the weights into two files with an index."""
    state = load_file(path / "model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({k: state[k] for k in keys}, path / name, metadata={"format": "pt"})
    weight_map = {k: name for name, keys in parts.items() for k in keys}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_build_gives_the_saved_model(family, model_folder, tiny_model, capfd):
    model = _build(model_folder(family))
    reference = tiny_model(family)
    assert not model.training and model.config._attn_implementation == "luthier"
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in model.parameters())
    assert capfd.readouterr() == ("", "")  # nothing of transformers' reaches the terminal


@pytest.mark.parametrize("family", FAMILIES)
def test_save_gives_a_folder_for_plain_transformers(
    family, tiny_model, tiny_tokenizer, tmp_path, capfd
):
    model = tiny_model(family)
    layer = next(m for m in model.modules() if hasattr(m, "weight") and m.weight.ndim == 2)
    layer.adapter = torch.nn.Linear(2, 2)  # as adapters hang below a layer
    save_model(model, tmp_path, tiny_tokenizer())
    assert capfd.readouterr() == ("", "")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(3, 12)[None]
    reference = tiny_model(family, attention="eager" if family in ("gemma2", "bloom") else "sdpa")
    assert torch.equal(plain(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert plain.config._attn_implementation in ("sdpa", "eager")  # ours is not written
    tokenizer = load_tokenizer(tmp_path)
    # a family's tokenizer class may add a token of its own
    assert tiny_tokenizer().get_vocab().items() <= tokenizer.get_vocab().items()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2's embeddings are tied
def test_save_in_another_dtype(family, tiny_model, tmp_path):
    model = tiny_model(family)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) == (family == "llama")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p.to(torch.bfloat16))


def test_a_generation_config_that_transformers_dislikes_is_kept(copy, tmp_path):
    """Published folders hold sampling values without do_sample; that must not stop a saving."""
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    (copy / "generation_config.json").write_text(json.dumps(generation))
    save_model(_build(copy), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation.items() <= saved.items()


def test_number_of_layers(model_folder, tiny_model):
    for family in ("llama", "gemma2", "gpt2"):
        model = _build(model_folder(family), num_layers=1)
        reference = tiny_model(family).state_dict()
        state = model.state_dict()
        assert 0 < len(state) < len(reference)
        for name, tensor in state.items():
            assert torch.equal(tensor, reference[name])
        assert model.config.num_hidden_layers == 1
        assert len(getattr(model.config, "layer_types", None) or [0]) == 1  # one entry per layer
        model(input_ids=torch.arange(3, 9)[None])
    with pytest.raises(Refused, match=r"num_layers=3 was asked for.*has 2 layers"):
        _build(model_folder("llama"), num_layers=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_values_depend_on_seed_and_name_alone(family, model_folder):
    """Not on the number of layers made before, nor on the global generator, which is left as it was."""
    path = model_folder(family)
    before = torch.get_rng_state()
    whole = _build(path, init="random").state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    part = _build(path, init="random", num_layers=1).state_dict()
    for name, tensor in part.items():
        if family == "gpt2" and "c_proj.weight" in name:
            continue  # its scheme divides them by the root of the number of layers
        assert torch.equal(tensor, whole[name]), name
    other = build_model(ModelConfig(path=str(path), init="random"), seed=4).state_dict()
    matrices = [n for n, t in whole.items() if t.ndim == 2]
    assert all(not torch.equal(whole[n], other[n]) for n in matrices)
    for (
        name
    ) in matrices:  # initializer_range is 0.1; gpt2 divides that of c_proj by sqrt(2 x layers)
        expected = 0.05 if family == "gpt2" and "c_proj" in name else 0.1
        assert abs(float(whole[name].std()) - expected) < 0.1 * expected, name


def test_random_needs_no_weights_and_takes_any_dtype(copy):
    (copy / "model.safetensors").unlink()
    model = _build(copy, init="random", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # rotary frequencies in bfloat16 would be wrong by whole positions
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_fingerprint_is_of_the_values(copy):
    first = fingerprint(copy)
    state = load_file(copy / "model.safetensors")
    _shard(copy)
    assert fingerprint(copy) == first
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    assert fingerprint(copy) == first
    state["model.norm.weight"][3] += 1e-6
    torch.save(state, copy / "pytorch_model.bin")
    assert fingerprint(copy) != first
    renamed = {("x." + k): v for k, v in state.items()}
    state["model.norm.weight"][3] -= 1e-6
    torch.save(renamed, copy / "pytorch_model.bin")
    assert fingerprint(copy) != first


def test_sharded_and_bin_folders_load(copy, tiny_model):
    state = load_file(copy / "model.safetensors")
    _shard(copy)
    reference = tiny_model("llama").state_dict()
    for name, tensor in _build(copy).state_dict().items():
        assert torch.equal(tensor, reference[name])
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    for name, tensor in _build(copy).state_dict().items():
        assert torch.equal(tensor, reference[name])


# --- what is refused


def _refuses(path, match, **keys):
    with pytest.raises(Refused, match=match):
        _build(path, **keys)


def test_no_folder_and_no_config(tmp_path, copy):
    _refuses(tmp_path / "nothing", "model folder '.*nothing' was asked for. it does not exist")
    _refuses(tmp_path, "has no config.json")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    _refuses(tmp_path / "m.gguf", "luthier convert")
    (copy / "config.json").write_text("{not json")
    _refuses(copy, "config.json cannot be read")


def test_hub_name(monkeypatch, copy):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(copy))
    assert _build("someone/model").config.model_type == "llama"

    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand a long text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    _refuses("someone/model", "hub gave ConnectionError: no network. check")


def test_family(copy):
    _edit_config(copy, model_type="lama")
    _refuses(copy, "family 'lama' is not known.*did you mean 'llama'")
    _edit_config(copy, model_type="t5")
    _refuses(copy, "'t5' is no causal language model")
    _edit_config(copy, model_type="gptj")
    _refuses(copy, "'gptj' was asked for. it does not use transformers' attention interface")
    auto_map = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    _edit_config(copy, model_type="x", auto_map=auto_map)
    _refuses(copy, "trust_remote_code=true")


def test_a_config_whose_values_are_wrong(copy):
    _edit_config(copy, hidden_size="many")
    _refuses(copy, "config.json is not valid")


def test_quantised_checkpoint(copy):
    _edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    _refuses(copy, r"quantised \(gptq\)")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    _refuses(copy, "there is no model.safetensors")


def test_truncated_bin(copy):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    for new in (True, False):  # torch's two formats
        torch.save(state, file, _use_new_zipfile_serialization=new)
        _build(copy)
        file.write_bytes(file.read_bytes()[:-1000])
        _refuses(copy, "pytorch_model.bin' was asked for. it cannot be read")


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_truncated_file(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _refuses(copy, r"model.safetensors' was asked for.*(truncated)")


def test_altered_header(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"x")
    _refuses(copy, "too long")
    file.write_bytes(data[:8] + b"?" + data[9:])
    _refuses(copy, "header is not that of a safetensors file")
    file.write_bytes(data.replace(b'"shape":[64]', b'"shape":[63]', 1))
    _refuses(copy, "do not match the shapes")


def test_missing_shard_and_missing_tensor_of_a_shard(copy):
    _shard(copy)
    state = load_file(copy / "b.safetensors")
    lost = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != lost}, copy / "b.safetensors")
    _refuses(copy, f"b.safetensors.*lacks 1 tensors of the index: {lost}")
    (copy / "b.safetensors").unlink()
    _refuses(copy, "1 of 2 files are missing: b.safetensors")


def test_bin_with_code_is_not_run(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (copy / "model.safetensors").unlink()
    torch.save({"x": Evil()}, copy / "pytorch_model.bin")
    _refuses(copy, "it holds Python objects, which are not loaded")
    with pytest.raises(Refused, match="it holds Python objects"):
        fingerprint(copy)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_do_not_fit(copy):
    lost = "model.layers.1.mlp.up_proj.weight"
    _edit_weights(copy, lambda state: state.pop(lost))
    _refuses(copy, f"1 missing: {lost}")
    _edit_weights(copy, lambda state: state.update({lost: torch.ones(96, 60)}))
    _refuses(copy, f"1 of another shape: {lost}")
    _edit_weights(
        copy, lambda state: state.update({lost: torch.ones(96, 64), "more.w": state[lost]})
    )
    _refuses(copy, "1 unexpected: more.w")


def test_tensors_that_do_not_fit_are_taken_on_purpose(copy):
    """They are what `init=random` gives with the same seed; all others are the checkpoint's."""
    lost, grown = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    changed = {grown: torch.ones(7, 64), "more.w": torch.ones(2)}
    _edit_weights(copy, lambda state: [state.pop(lost), state.update(changed)])
    stored = load_file(copy / "model.safetensors")
    chosen = ModelConfig.model_validate({"path": str(copy), "misfits": "accept"})
    model = build_model(chosen, seed=3)
    random = build_model(chosen.model_copy(update={"init": "random"}), seed=3)
    for name, parameter in model.named_parameters():
        wanted = random.get_parameter(name) if name in (lost, grown) else stored[name]
        assert torch.equal(parameter, wanted), name
    (remark,) = model.misfits
    assert f"1 missing: {lost}; 1 unexpected: more.w; 1 of another shape: {grown}" in remark
    assert not torch.equal(
        build_model(chosen, seed=4).get_parameter(lost), model.get_parameter(lost)
    )
    half = build_model(chosen.model_copy(update={"dtype": "bfloat16"}), seed=3)
    assert torch.equal(half.get_parameter(lost), random.get_parameter(lost).bfloat16())


def test_layers_beyond_the_config_are_refused(copy):
    """Unless model.num_layers says so: a config.json of another model must not pass."""
    _edit_config(copy, num_hidden_layers=1)
    _refuses(copy, "9 unexpected: model.layers.1.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(copy, value):
    name = "model.layers.0.self_attn.q_proj.weight"
    _edit_weights(copy, lambda state: state[name][5].fill_(value))
    _refuses(copy, f"NaN or infinite values: 1 tensors: {name}")


def test_device():
    assert resolve_device("cpu") == CPU
    with pytest.raises(Refused, match="that is no device"):
        resolve_device("gpux")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        for name in ("cuda", "gpu", "cuda:1"):
            with pytest.raises(Refused, match="sees no such device here"):
                resolve_device(name)


def test_dtype(model_folder, monkeypatch):
    config = _build(model_folder("llama")).config
    cuda = torch.device("cuda")
    for stored, cpu in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        config.dtype = stored
        assert resolve_dtype("auto", config, CPU) == getattr(torch, cpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: True)
        assert resolve_dtype("auto", config, cuda) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: False)
        old = torch.float32 if stored == "float32" else torch.float16
        assert resolve_dtype("auto", config, cuda) == old
    assert resolve_dtype("float16", config, CPU) == torch.float16
    config.dtype = None
    assert resolve_dtype("auto", config, CPU) == torch.float32


def test_dtype_of_a_config_that_does_not_tell(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    _edit_weights(copy, lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    assert _build(copy).dtype == torch.bfloat16


def test_tokenizer(copy, tiny_tokenizer, tiny_model, tmp_path):
    tokenizer, config = load_tokenizer(copy), tiny_model("llama").config
    check_tokenizer(tokenizer, config)  # 286 ids in 320 rows
    assert load_tokenizer(tmp_path / "model").eos_token_id == 2
    config.vocab_size = 285
    with pytest.raises(
        Refused, match=r"1 of its tokens \(up to 285, '.*'\) exceed the embedding's 285"
    ):
        check_tokenizer(tokenizer, config)
    for name in folder.TOKENIZER_FILES:
        (copy / name).unlink(missing_ok=True)
    assert load_tokenizer(copy) is None


def test_tokenizer_that_cannot_be_read(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"tokenizer of .* cannot be read"):
        load_tokenizer(copy)


def test_tokenizer_that_needs_sentencepiece(copy, monkeypatch):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr("luthier.models.tokenizer.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'luthier\[tokenizers\]'"):
        load_tokenizer(copy)


def test_pad_id(tiny_tokenizer, tiny_model):
    config = tiny_model("llama").config
    assert pad_id(tiny_tokenizer(), config) == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()._tokenizer, eos_token="</s>")
    assert pad_id(bare, config) == 2
    config.pad_token_id, config.eos_token_id = None, [7, 8]
    assert pad_id(None, config) == 7
    config.eos_token_id = None
    assert pad_id(None, config) == 0
