"""Reading only some layers of a model's weights, as a pipeline stage needs them.

transformers' loader reads the tensors that the model it made has parameters for. So a model of some layers is made:
the other ones are put aside, on the meta device, before it looks, and put back, still there, at the end. Which
layers are read is told by `partial.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from luthier.models.stage import decoder_layers

LeaveOut = Callable[[PreTrainedModel], Collection[int]]
"""A model without values -> the numbers of layers that are not read."""


class Reading:
    """One reading of a model whose layers are not all wanted."""

    def __init__(self, leave_out: LeaveOut) -> None:
        self.leave_out = leave_out
        self.aside: dict[int, nn.Module] = {}

    def class_of(self, kind: Any) -> Any:
        """`kind`, whose new instances lack the layers."""
        reading = self

        class Partial(kind):
            __module__ = kind.__module__

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                reading.put_aside(self)

        Partial.__name__, Partial.__qualname__ = kind.__name__, kind.__qualname__
        return Partial

    def put_aside(self, model: PreTrainedModel) -> None:
        layers = decoder_layers(model)
        for number in self.leave_out(model):
            self.aside[number] = layers[number]
        self.layers = layers
        for number in self.aside:
            layers[number] = nn.Module()

    def skipped(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a layer that is not read."""
        number = re.search(r"\.(\d+)\.", name)
        return number is not None and int(number[1]) in self.aside

    def put_back(self) -> None:
        for number, layer in self.aside.items():
            self.layers[number] = layer
