"""How the dense base stream is stored: `quantize(weight, config)` makes one of the forms below.

Every form is a `BaseStream`: a module of buffers that multiplies, dequantises and counts its bytes.
"""

from libortho.base.streams import BaseStream, HalfBase, Int8Base, quantize

__all__ = ["BaseStream", "HalfBase", "Int8Base", "quantize"]
