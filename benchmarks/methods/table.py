"""The adapter methods that the benchmark compares, each at its usual learning rate."""

from __future__ import annotations

# name -> overrides of the run. Rates are those that the papers or their authors' scripts use for small models
METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter.method=lora", "adapter.rank=8", "optim.lr=1e-3"),
    "lora, rsLoRA + LoRA+ + PiSSA": (
        *("adapter.method=lora", "adapter.rank=8", "adapter.rslora=true", "adapter.lora_plus=4"),
        *("adapter.pissa=true", "adapter.alpha=8", "optim.lr=3e-4"),
    ),
    "lora, PiSSA": (
        *("adapter.method=lora", "adapter.rank=8", "adapter.pissa=true", "adapter.alpha=8"),
        "optim.lr=1e-3",
    ),
    "lora, DoRA": ("adapter.method=lora", "adapter.rank=8", "adapter.dora=true", "optim.lr=1e-3"),
    "lora, MoSLoRA": (
        *("adapter.method=lora", "adapter.rank=8", "adapter.mixer=true", "optim.lr=1e-3"),
    ),
    "lora, NEFTune": (
        *("adapter.method=lora", "adapter.rank=8", "adapter.neftune_alpha=5", "optim.lr=1e-3"),
    ),
    "mora": ("adapter.method=mora", "adapter.rank=8", "optim.lr=1e-3"),
    "vera": ("adapter.method=vera", "adapter.rank=256", "optim.lr=1e-2"),
    "vera, PaddleNLP's": (
        *("adapter.method=vera", "adapter.form=paddlenlp", "adapter.rank=8", "optim.lr=1e-3"),
    ),
    "lokr": ("adapter.method=lokr", "adapter.rank=8", "adapter.factor=8", "optim.lr=3e-3"),
    "reft, LoReFT": ("adapter.method=reft", "adapter.rank=8", "optim.lr=4e-3"),
    "reft, TinyIntervention": (
        *("adapter.method=reft", "adapter.form=tiny", "adapter.rank=8", "optim.lr=4e-3"),
    ),
    "prefix": (
        *("adapter.method=prefix", "adapter.num_prefix_tokens=16"),
        *("adapter.prefix_projection=true", "optim.lr=1e-3"),
    ),
    "prompt": ("adapter.method=prompt", "adapter.num_prefix_tokens=16", "optim.lr=3e-2"),
    "ia3": (*("adapter.method=ia3", "adapter.targets=[k_proj,v_proj,down_proj]", "optim.lr=1e-2"),),
}
