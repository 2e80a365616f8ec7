"""Quantised frozen weights: their numbers are in `codes.py`, modules and products in `linears.py`."""

from luthier.quantize.codes import Scheme, Spec, dequantize, make_spec, quantize
from luthier.quantize.linears import QuantizedLinear, QuantizedTensor

__all__ = [
    "QuantizedLinear",
    "QuantizedTensor",
    "Scheme",
    "Spec",
    "dequantize",
    "make_spec",
    "quantize",
]
