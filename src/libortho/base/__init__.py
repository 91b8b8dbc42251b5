"""How the dense base stream is stored: `quantize(weight, config, moment)` makes one of its forms.

Every form is a `BaseStream`: a module of buffers that multiplies, dequantises and counts its bytes.
"""

from libortho.base.grid import check_width
from libortho.base.quantiser import quantize
from libortho.base.streams import BaseStream, HalfBase, Int4Base, Int8Base, set_int8_activations

__all__ = [
    "BaseStream",
    "HalfBase",
    "Int4Base",
    "Int8Base",
    "check_width",
    "quantize",
    "set_int8_activations",
]
