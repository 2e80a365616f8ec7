"""`luthier plan`: sizes against tensors that exist, layouts against arithmetic by hand, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.batch import Batch
from luthier.cli import main
from luthier.config import RunConfig
from luthier.configfile import from_mapping
from luthier.errors import Refused
from luthier.footprint import Footprint, footprint
from luthier.plan import parse_layout, parse_size, plan
from luthier.spread import COPY, Way, device_share, estimate, ways
from luthier.train.saving import Saver

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
LLAMA = SMALL | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70 = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_405 = LLAMA_70 | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}


def config_of(folder: Path, shape: dict[str, Any], **keys: Any) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(shape))
    values: dict[str, Any] = {
        "model__path": str(folder),
        "model__device": "cpu",
        "model__dtype": "bfloat16",
        "data__path": "none",
        "data__length": 64,
        "train__batch": 2,
    } | keys
    tree: dict[str, Any] = {"output": str(folder / "run")}
    for name, value in values.items():
        if value is None:
            continue
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return from_mapping(tree).config


def of(config: RunConfig, way: Way, found: Footprint | None = None) -> Any:
    return estimate(config, found or footprint(config), way, flops=1e12, bandwidth=1e9)


LORA = {"adapter__method": "lora", "adapter__rank": 2}
HALF = {"model__dtype": "bfloat16"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        LORA,
        {"train__recompute": "layer"},
        HALF,  # where there are native kernels, norms and MLPs keep less
        HALF | LORA | {"quantize__weights": "nf4"},
    ],
)
def test_saved_bytes_are_those_that_a_real_forward_keeps(tmp_path: Path, keys: Any) -> None:
    """Against torch's own hooks on a model of all five layers, of which the rehearsal builds three."""
    from luthier.assemble import build

    keys = {"model__init": "random", "model__dtype": "float32"} | keys
    config = config_of(tmp_path, SMALL, **keys)
    found = footprint(config)
    built = build(config, train=True)
    every = list(built.model.parameters())
    assert found.total.trained == sum(p.numel() for p in every if p.requires_grad)
    ids = torch.randint(0, 512, (2, 64))
    places = torch.arange(64).expand(2, 64).contiguous()
    batch = Batch(ids, ids, places, torch.zeros_like(ids), (0, 1))
    known = {t.untyped_storage().data_ptr() for t in (*every, *built.model.buffers())}
    known |= {t.untyped_storage().data_ptr() for t in (ids, places, batch.document_ids)}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = built.stage(batch)
    storages.setdefault(hidden.untyped_storage().data_ptr(), hidden.nbytes)
    kept = sum(storages.values())
    if keys.get("train__recompute") == "layer":
        kept += (
            2 * 2 * 64 * 16 * 4
        )  # cosines and sines [B, S, 16], which the layers' arguments hold
    assert found.saved == pytest.approx(kept, rel=0.01)


class NoModel:
    """`train.saving.ModelCopy` without files."""

    def write(self, *_: Any) -> dict[str, Any]:
        return {"files": {}}

    def complete(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("keys", [{}, HALF, LORA])
def test_the_copy_of_a_background_save_is_counted(tmp_path: Path, keys: Any) -> None:
    """Against the bytes that a save copies after a real step."""
    from luthier.assemble import build, make_updater

    keys = {"model__init": "random", "model__dtype": "float32"} | keys
    config = config_of(tmp_path, SMALL, **keys)
    updater = make_updater(config, build(config, train=True))
    ids = torch.randint(0, 512, (2, 64))
    places = torch.arange(64).expand(2, 64).contiguous()
    updater.update([Batch(ids, ids, places, torch.zeros_like(ids), (0, 1))], step=1, lr=1e-3)
    saver = Saver()
    saver.begin(tmp_path / "copied", 1, NoModel, updater.tensors(), {})
    saver.wait()
    peft = 4 * footprint(config).total.trained * ("adapter__method" in keys)  # of its folder
    planned = of(config, Way(1, 1, 2))
    # steps of Adam are numbers, too
    assert (
        planned.items[COPY] == pytest.approx(saver.copied + peft, rel=5e-3) and planned.items[COPY]
    )
    without = of(config_of(tmp_path, SMALL, **keys, checkpoint__background=False), Way(1, 1, 2))
    assert planned.total - without.total == planned.items[COPY] and not without.items[COPY]
    at_once = Saver(background=False)
    at_once.begin(tmp_path / "at-once", 1, NoModel, updater.tensors(), {})
    assert at_once.copied == 0
    a, b = (
        (tmp_path / n / "training_state-00000.safetensors").read_bytes()
        for n in ("copied", "at-once")
    )
    assert a == b


def test_where_the_copy_lies_and_who_has_it(tmp_path: Path) -> None:
    keys = {"train__batch": 16, "train__micro_batch": 1}
    config = config_of(tmp_path, SMALL, **keys)
    one, many = of(config, Way(1, 1, 2)), of(config, Way(4, 2, 2))
    assert many.items[COPY] == pytest.approx(one.items[COPY] / 8, rel=0.01)
    gpu = estimate(
        config, footprint(config, torch.device("cuda")), Way(1, 1, 2), flops=None, bandwidth=None
    )
    assert gpu.host == one.items[COPY] and not gpu.items.get(COPY)
    # at the end nothing is computed beside it
    last = of(config_of(tmp_path, SMALL, **keys, checkpoint__every="end"), Way(1, 1, 2))
    assert last.total < one.total and (COPY in last.items) == (last.moment == "saving")
    never = of(config_of(tmp_path, SMALL, **keys, checkpoint__every="never"), Way(1, 1, 2))
    assert not never.items.get(COPY)


def test_quantised_layers_are_counted_as_codes_and_scales(tmp_path: Path) -> None:
    plain = footprint(config_of(tmp_path, SMALL, **LORA))
    small = footprint(config_of(tmp_path, SMALL, quantize__weights="nf4", **LORA))
    linear = 5 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160)
    assert plain.total.frozen_bytes - small.total.frozen_bytes == pytest.approx(
        linear * (2 - 0.5 - 4 / 64), rel=0.01
    )
    assert plain.total.trained == small.total.trained == plain.total.adapter


def test_recomputation_keeps_less_and_more_layers_more(tmp_path: Path) -> None:
    kept = {
        mode: footprint(config_of(tmp_path, SMALL, train__recompute=mode)).saved
        for mode in ("none", "selective", "layer")
    }
    assert kept["none"] > kept["selective"] > kept["layer"]
    # exactly linear in the number of layers: the rehearsal of three stands for five
    few = footprint(config_of(tmp_path, SMALL, model__num_layers=3))
    more = footprint(config_of(tmp_path, SMALL, model__num_layers=4))
    every = footprint(config_of(tmp_path, SMALL))
    assert every.saved - more.saved == more.saved - few.saved > 0
    assert every.total.trained - more.total.trained == every.layer.trained


def test_stages_cut_what_they_say(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA, train__batch=16, train__micro_batch=1)
    found = footprint(config)
    numbers = 8_030_261_248
    assert found.total.trained == numbers
    one, two, three = (of(config, Way(1, 8, stage), found) for stage in (1, 2, 3))
    assert one.items["optimiser"] == two.items["optimiser"] == 8 * numbers // 8
    assert one.items["float32 copies"] == 4 * numbers // 8
    # two micro-batches per device: stage 1 keeps whole float32 gradients between them
    assert one.items["gradients"] >= 4 * numbers > 8 * two.items["gradients"] - 1
    assert two.items["gradients"] == 4 * numbers // 8
    assert one.items["weights, trained"] == 2 * numbers // 8 + 2 * numbers
    assert three.items["weights, trained"] < two.items["weights, trained"] / 2
    assert one.moved < two.moved < three.moved
    whole = of(config, Way(8, 1, 2), found)
    assert whole.moved == int(2 * 7 / 8 * 4 * numbers)
    assert whole.total > two.total > three.total


@pytest.mark.parametrize(
    ("shape", "devices", "memory", "way", "keys"),
    [
        # torchtitan: 8B on 8 H100 of 96 GB, batch 2, selective (82 GiB)
        (LLAMA, 8, 96, Way(1, 8, 3), {"data__length": 8192, "train__recompute": "selective"}),
        # torchtune: 8B with LoRA on an A6000 of 48 GB, packed 2048, batch 2 (30 GiB)
        (LLAMA, 1, 48, Way(1, 1, 2), {"data__length": 2048, "adapter__method": "lora"}),
        # and with QLoRA on a 4090 of 24 GB, with recomputation (7.4 GiB)
        (
            LLAMA,
            1,
            24,
            Way(1, 1, 2),
            {"data__length": 2048, "adapter__method": "lora", "quantize__weights": "nf4"}
            | {"train__recompute": "layer"},
        ),
        # torchtune: 70B with LoRA on 8 A100 of 80 GB (27.6 GiB)
        (
            LLAMA_70,
            8,
            80,
            Way(1, 8, 3),
            {"data__length": 2048, "adapter__method": "lora", "train__recompute": "layer"},
        ),
    ],
)
def test_published_layouts_fit_where_they_did(
    tmp_path: Path, shape: Any, devices: int, memory: int, way: Way, keys: Any
) -> None:
    keys = {"train__batch": 2 * devices, "train__micro_batch": 2} | keys
    assert of(config_of(tmp_path, shape, **keys), way).total < memory * 1e9


@pytest.mark.parametrize(
    ("shape", "memory", "way", "keys"),
    [
        # torchtitan: 405B on 512 H100 of 96 GB, 8 x tensor, 16 stages, sharded
        (LLAMA_405, 96, Way(1, 4, 3, tensor=8, pipeline=16), {"train__batch": 128}),
        # torchtitan: 70B on 256 H100, 32 x 8
        (LLAMA_70, 96, Way(1, 32, 3, tensor=8), {"train__batch": 64, "train__micro_batch": 2}),
        # NeMo Automodel: 70B with LoRA on 8 H100 of 80 GB, 4 x 2
        (
            LLAMA_70,
            80,
            Way(1, 4, 3, tensor=2),
            {"train__batch": 32, "adapter__method": "lora", "data__length": 4096},
        ),
        # Megatron-Bridge: 70B with LoRA on 8 H100 of 80 GB, 2 x 4 stages
        (
            LLAMA_70,
            80,
            Way(1, 1, 2, tensor=2, pipeline=4),
            {"train__batch": 32, "adapter__method": "lora", "data__length": 4096},
        ),
    ],
)
def test_published_layouts_of_more_axes_fit_where_they_did(
    tmp_path: Path, shape: Any, memory: int, way: Way, keys: Any
) -> None:
    keys = {"data__length": 8192, "train__micro_batch": 1, "train__recompute": "layer"} | keys
    assert of(config_of(tmp_path, shape, **keys), way).total < memory * 1e9


def test_axes_cut_what_they_say(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA, train__batch=16, train__micro_batch=1)
    found = footprint(config)
    one = of(config, Way(1, 1, 2), found)
    whole = sum(one.items[name] for name in ("weights, trained", "float32 copies", "optimiser"))
    for keys, share in (({"tensor": 4}, 1 / 4), ({"pipeline": 4}, 1 / 4), ({"context": 4}, 1.0)):
        part = of(config, Way(1, 1, 2, **keys), found)
        held = sum(
            part.items.get(n, 0) for n in ("weights, trained", "float32 copies", "optimiser")
        )
        # norms are whole beside tensor parallelism; a pipeline's first and last stage have the vocabulary's tables
        assert held == pytest.approx(whole * share, rel=0.25 if "pipeline" in keys else 0.001)
        assert held >= whole * share * 0.999
        assert part.moved > 0 and part.total < one.total
    # the first of four stages keeps four micro-batches of a quarter of the layers
    pipeline = Way(1, 1, 2, pipeline=4)
    assert device_share(config, found, pipeline, False, 16).saved == found.saved
    assert device_share(config, found, pipeline, True, 16).saved == found.saved // 4
    few = of(config, pipeline, found)
    waiting = few.flops / (one.flops / 4)
    assert waiting == pytest.approx(1 + 3 / 16)


def test_what_nobody_could_fit_does_not_fit(tmp_path: Path) -> None:
    keys = {"train__batch": 512, "train__micro_batch": 1, "data__length": 8192}
    config = config_of(tmp_path, LLAMA_405, **keys)
    found = footprint(config)
    # 405B on 512 H100 needed tensor and pipeline parallelism: here stage 2 holds 810 GB of weights
    assert of(config, Way(1, 512, 2), found).total > 800e9
    assert of(config, Way(512, 1, 2), found).total > 6000e9
    config = config_of(tmp_path, LLAMA, train__batch=1, data__length=2048)
    assert of(config, Way(1, 1, 2)).total > 80e9  # 16 bytes per number of 8B


def test_the_command_proposes_and_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(tmp_path, LLAMA)
    words = ["plan", f"model.path={tmp_path}", "model.device=cpu", "data.length=2048"]
    words += ["train.batch=64", "train.micro_batch=1", "--devices", "64"]
    assert main([*words, "--device-memory", "80GB", "--device-flops=400T"]) == 0
    shown = capsys.readouterr().out
    assert "fits: " in shown and "does not fit" not in shown
    assert "8,030,261,248 trained" in shown
    assert main([*words, "--device-memory", "2GB"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit: " in shown and "quantize.weights=nf4" in shown
    assert not list(tmp_path.glob("run*"))


def test_the_batch_is_shared_out_by_each_layout_for_itself(tmp_path: Path) -> None:
    few = config_of(tmp_path, LLAMA, train__batch=8, train__micro_batch=1)
    made = plan(from_mapping(few.model_dump()), devices=64, device_memory="80GB")
    assert made["layouts"]  # 64 data ranks could not share 8 rows; 8 groups of 8 devices can
    keys = {"train__batch": None, "train__micro_batch": 2, "train__accumulation": 3}
    config = config_of(tmp_path, LLAMA, **keys)
    found = footprint(config)
    for way in ways(8, config, found):
        # each data rank does three forwards, however many there are
        waits = 1 + (way.pipeline - 1) / 3
        share = found.flops / (way.tensor * way.context * way.pipeline)
        assert of(config, way, found).flops == pytest.approx(3 * share * waits)


def test_thousands_of_devices(tmp_path: Path) -> None:
    keys = {"train__batch": 4096, "train__micro_batch": 1}
    resolved = from_mapping(config_of(tmp_path, LLAMA_405, **keys).model_dump())
    begin = time.perf_counter()
    made = plan(resolved, devices=4096, device_memory="80GB")
    assert made["fits"] and len(made["layouts"]) > 1000
    assert time.perf_counter() - begin < 60  # seconds, on a busy machine; thousands of layouts


def test_dropout_is_planned_and_a_mixture_refused(tmp_path: Path) -> None:
    gpt2 = SMALL | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    gpt2 |= {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 64}
    assert footprint(config_of(tmp_path, gpt2)).saved > 0
    mixture = SMALL | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(Refused, match="mixture of experts"):
        footprint(config_of(tmp_path, mixture))


def test_layouts_and_sizes_in_words(tmp_path: Path) -> None:
    assert parse_size("--device-memory", "80GB") == 80e9
    assert parse_size("--device-memory", "24GiB") == 24 * 2**30
    assert parse_size("--device-flops", "400T") == 400e12
    assert parse_layout("shard=4,stage=3", 4) == Way(1, 4, 3)
    assert parse_layout("replicate=2 shard=4", 8) == Way(2, 4, 2)
    config = config_of(tmp_path, SMALL, optim__name="adafactor")
    assert not any(way.shard > 1 for way in ways(4, config, footprint(config)))
    for text in ("shard=0", "tensors=2", "shard", "stage=4", "shard=3"):
        with pytest.raises(Refused):
            parse_layout(text, 8)
    for text in ("much", "-3GB", "0", "nan", "GB"):
        with pytest.raises(Refused):
            parse_size("--device-memory", text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.batch=6", "--devices", "4", "--layout", "replicate=4"], "train.batch=6"),
        (["quantize.weights=nf4"], "full fine-tuning of a quantised base"),
        (["adapter.method=lora", "adapter.path=old"], "adapter.path"),
        (["--device-memory", "lots"], "--device-memory lots"),
        (["--layout", "tensors=2"], "--layout tensors=2"),
        (["parallel.offload=true"], "offload"),
    ],
)
def test_refusals(
    tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(tmp_path, SMALL)
    assert main(["plan", f"model.path={tmp_path}", "model.device=cpu", *words]) == 2
    assert told in capsys.readouterr().err
