"""Quantised frozen weights: their numbers are in `codes.py`, modules in `linears.py`, products in `products.py`."""

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
