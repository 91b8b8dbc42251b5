"""LibOrtho: let an LLM's owner decide, per request, whether the model may use what it memorised.

Every chosen linear layer becomes `y = base(x) + alpha * ortho(x)`: a base that has forgotten, and a
small stream that holds what was memorised. Importing this package touches neither CUDA nor any
optional package; transformers is imported by the functions that need it, and learns of the format
of split checkpoints when it is imported itself.
"""

from libortho._version import __version__ as __version__
from libortho.alpha import alpha_scope, set_alpha
from libortho.config import BaseConfig
from libortho.errors import CheckpointError, DataError, LibOrthoError, OrthoStreamMissing
from libortho.integrations.registration import register_with_transformers
from libortho.layer import OrthoLinear, replace_linear_layers
from libortho.methods.curvature import CurvatureConfig
from libortho.methods.geometric import GeometricConfig
from libortho.methods.graft import GraftConfig
from libortho.methods.saliency import SaliencyConfig
from libortho.methods.spectral import SpectralConfig
from libortho.report import LayerReport, SeparationReport
from libortho.separate import SeparationConfig, separate_, separation_report

__all__ = [
    "BaseConfig",
    "CheckpointError",
    "CurvatureConfig",
    "DataError",
    "GeometricConfig",
    "GraftConfig",
    "LayerReport",
    "LibOrthoError",
    "OrthoLinear",
    "OrthoStreamMissing",
    "SaliencyConfig",
    "SeparationConfig",
    "SeparationReport",
    "SpectralConfig",
    "alpha_scope",
    "replace_linear_layers",
    "separate_",
    "separation_report",
    "set_alpha",
]

register_with_transformers()
