"""A split model in the forms that other tools read.

    dense                 a plain Hugging Face model at one alpha; 0 is the base alone
    peft                  a plain base model, and the ortho streams as a PEFT adapter
    compressed-tensors    an INT8 base that stock vLLM loads, and LoRA beside it
    gguf                  base and LoRA for llama.cpp

`docs/export.md` says what each keeps and what it costs. The packages for it are in the extra
`export`.
"""

from libortho.export.compressed_tensors import CompressedTensorsExport
from libortho.export.dense import DenseExport
from libortho.export.gguf import GgufExport
from libortho.export.peft import PeftExport
from libortho.export.registry import TARGETS, ExportReport
from libortho.export.run import export_split

__all__ = [
    "TARGETS",
    "CompressedTensorsExport",
    "DenseExport",
    "ExportReport",
    "GgufExport",
    "PeftExport",
    "export_split",
]
