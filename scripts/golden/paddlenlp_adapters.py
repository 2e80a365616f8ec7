"""Write adapter folders with PaddleNLP's own code: a tiny Llama, one folder a method, and its logits.

    python paddlenlp_adapters.py OUT        # in an environment with paddlepaddle 3.1.1 and paddlenlp 3.0.0b4

Every adapter is moved away from its first values before it is saved, as training would. The logits are those of
the live PaddleNLP model, not of one that was loaded again (which is wrong for PiSSA).
"""

import json
import os
import sys
import types
from pathlib import Path

stub = types.ModuleType("paddlenlp.transformers.aistudio_utils")  # wants an older package
stub.aistudio_download = None
sys.modules["paddlenlp.transformers.aistudio_utils"] = stub

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from paddlenlp.peft import (  # noqa: E402
    LoKrConfig,
    LoKrModel,
    LoRAConfig,
    LoRAModel,
    PrefixConfig,
    PrefixModelForCausalLM,
    ReFTModel,
    VeRAConfig,
    VeRAModel,
)
from paddlenlp.peft.prefix import llama_postprocess_past_key_value  # noqa: E402
from paddlenlp.peft.reft import LoreftIntervention, ReFTConfig, TinyIntervention  # noqa: E402
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

OUT = Path(sys.argv[1]).resolve()
SIZES = dict(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000.0,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 48, (2, 10))
TARGETS = [".*q_proj.*", ".*v_proj.*", ".*down_proj.*"]


def base():
    paddle.seed(0)
    rng = np.random.default_rng(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_flash_attention=False))
    for _, p in sorted(model.named_parameters()):
        value = rng.standard_normal(p.shape) * 0.2 + (1 if p.ndim == 1 else 0)
        p.set_value(value.astype("float32"))
    model.eval()
    return model


def logits(model, **more):
    with paddle.no_grad():
        out = model(input_ids=paddle.to_tensor(IDS), **more)
    return np.ascontiguousarray((out[0] if isinstance(out, tuple) else out).numpy())


def move(model, size=0.1):
    rng = np.random.default_rng(2)
    for _, p in sorted(model.named_parameters()):
        if not p.stop_gradient:
            p.set_value((p.numpy() + size * rng.standard_normal(p.shape)).astype("float32"))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    model = base()
    hf = {}
    for name, p in model.named_parameters():
        value = p.numpy()
        turn = value.ndim == 2 and "embed_tokens" not in name
        hf[name.replace("llama.", "model.", 1)] = np.ascontiguousarray(value.T if turn else value)
    folder = OUT / "base"
    folder.mkdir(exist_ok=True)
    save_file(hf, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": "float32", **SIZES}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    os.chdir(OUT)  # PaddleNLP looks for LoKr's base by the recorded name
    model.save_pretrained("paddle_base")
    expected = {"input_ids": IDS.astype("int64"), "base": logits(model)}

    common = dict(target_modules=TARGETS, r=4, dtype="float32")
    loras = {
        "lora": dict(lora_alpha=8), "rslora": dict(lora_alpha=6, rslora=True),
        "pissa": dict(lora_alpha=8, pissa=True), "mora": dict(lora_alpha=8, use_mora=True),
        "mixer": dict(lora_alpha=8, lora_use_mixer=True),
    }  # fmt: skip
    for name, options in loras.items():
        adapted = LoRAModel(base(), LoRAConfig(**common, **options))
        adapted.mark_only_lora_as_trainable()
        adapted.eval()
        if name == "pissa":
            adapted.train()
            logits(adapted)  # it splits the weights at its first forward
            adapted.eval()
        move(adapted)
        expected[name] = logits(adapted)
        adapted.save_pretrained(str(OUT / name))

    vera = VeRAModel(
        base(),
        VeRAConfig(target_modules=TARGETS, r=4, vera_alpha=4, pissa_init=True, dtype="float32"),
    )
    vera.mark_only_vera_as_trainable(notfreezeB=True)
    vera.train()
    logits(vera)
    vera.eval()
    move(vera, 0.02)
    expected["vera"] = logits(vera)
    vera.save_pretrained(str(OUT / "vera"))

    lokr = LoKrModel(
        base(),
        LoKrConfig(
            target_modules=TARGETS,
            lokr_dim=4,
            dtype="float32",
            base_model_name_or_path="paddle_base",
        ),
    )
    lokr.mark_only_lokr_as_trainable()
    lokr.eval()
    move(lokr)
    expected["lokr"] = logits(lokr)
    lokr.save_pretrained(str(OUT / "lokr"))

    prefix = PrefixModelForCausalLM(
        base(),
        PrefixConfig(num_prefix_tokens=3, num_attention_heads=4, num_hidden_layers=2, hidden_size=32,
                     prefix_projection=False, dtype="float32"),
        postprocess_past_key_value=llama_postprocess_past_key_value,
    )  # fmt: skip
    prefix.mark_only_prefix_as_trainable()
    prefix.eval()
    move(prefix, 0.3)
    expected["prefix"] = logits(prefix, attention_mask=paddle.ones(IDS.shape, dtype="int64"))
    prefix.save_pretrained(str(OUT / "prefix"))

    locations = paddle.to_tensor([[[0, 1, 2, 7, 8, 9]] * 2] * 2)  # f3+l3 of ten tokens
    for name, kind in (("loreft", LoreftIntervention), ("tinyreft", TinyIntervention)):
        params = dict(embed_dim=32, low_rank_dimension=4, dropout=0.0, dtype="float32", act_fn="linear",
                      device="cpu", add_bias=False)  # fmt: skip
        representations = [
            dict(
                layer=i, component="block_output", low_rank_dimension=4, intervention=kind(**params)
            )
            for i in range(2)
        ]
        config = ReFTConfig(
            representations=representations, intervention_params=params, position="f3+l3"
        )
        reft = ReFTModel(config, base())
        rng = np.random.default_rng(2)
        for _key, (intervention, _) in sorted(reft.interventions.items()):
            for _, p in sorted(intervention.named_parameters()):
                p.set_value((p.numpy() + 0.1 * rng.standard_normal(p.shape)).astype("float32"))
            if name == "loreft":  # as it is meant: orthonormal, which PaddleNLP does not keep
                q, _ = np.linalg.qr(intervention.rotate_layer.weight.numpy())
                intervention.rotate_layer.weight.set_value(q.astype("float32"))
        reft.eval()
        expected[name] = logits(reft, intervention_locations=locations)
        reft.save_pretrained(name)
    save_file(expected, OUT / "expected.safetensors")
    print(
        {
            n: float(np.abs(v - expected["base"]).max())
            for n, v in expected.items()
            if n != "input_ids"
        }
    )


if __name__ == "__main__":
    main()
