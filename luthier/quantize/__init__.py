"""Quantised frozen weights: their numbers are in `codes.py`, modules in `linears.py`, products in `products.py`."""

from luthier.quantize.codes import dequantize, quantize
from luthier.quantize.linears import QuantizedLinear, QuantizedTensor
from luthier.quantize.spec import Scheme, Spec, make_spec

__all__ = [
    "QuantizedLinear",
    "QuantizedTensor",
    "Scheme",
    "Spec",
    "dequantize",
    "make_spec",
    "quantize",
]
