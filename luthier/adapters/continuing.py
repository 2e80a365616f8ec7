"""Going on with an adapter of a folder: which options of the run hold, and which are the folder's."""

from __future__ import annotations

from torch import nn

from luthier.adapters.placing import adapters_of, plan_of
from luthier.adapters.targets import options_of
from luthier.config import GENERAL, AdapterConfig
from luthier.errors import Refused

OF_TRAINING = frozenset({"dropout", "lora_plus"})  # they can change from one run to the next


def take_options(
    model: nn.Module, asked: AdapterConfig, found: AdapterConfig, path: str
) -> tuple[AdapterConfig, list[str]]:
    """Going on with an adapter takes its own options, but for those of training alone, if they are set.
    Another one that is set is refused; a default that differs is a remark."""
    if asked.method != found.method:
        raise Refused(
            f"adapter.method={asked.method} with adapter.path={path}",
            f"that adapter is {found.method}",
            f"give adapter.method={found.method}",
        )
    changed = asked.changed()
    adapters = adapters_of(model)
    for key, wanted in changed.items():
        has = getattr(found, key)
        match key:
            case "targets" | "layers":
                same = plan_of(model, asked).keys() == adapters.keys()
            case "rank_pattern" | "alpha_pattern":
                sizes = {n: options_of(asked, n) for n in adapters}
                same = all(
                    (o.rank, o.scale_alpha)
                    == (adapters[n].config.rank, adapters[n].config.scale_alpha)
                    for n, o in sizes.items()
                )
            case "alpha":
                has = found.scale_alpha
                same = wanted == has
            case "form":  # two of LoKr's differ in their first values only
                has = found.form_
                same = wanted == has or {wanted, has} == {"peft", "paddlenlp"}
            case _:
                same = wanted == has or key in GENERAL | OF_TRAINING
        if not same:
            raise Refused(
                f"adapter.{key}={wanted} with adapter.path={path}",
                f"that adapter has {key}={has}",
                f"leave adapter.{key} out: training goes on with the adapter's own",
            )
    news = {key: changed[key] for key in OF_TRAINING if key in changed}
    for adapter in adapters.values():
        adapter.config = adapter.config.model_copy(update=news)
    quiet_keys = GENERAL | OF_TRAINING & news.keys() | {"targets", "alpha"}
    remarks = [
        f"adapter.{key} is {has}, from {path}"
        for key, has in found.changed().items()
        if key not in quiet_keys and getattr(asked, key) != has
    ]
    return found.model_copy(update=news), remarks
