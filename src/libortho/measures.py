"""What a split model is measured by, whoever split it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from libortho.alpha import alpha_scope
from libortho.data.sampling import spread
from libortho.data.tokens import Tokens
from libortho.linear import is_conv1d
from libortho.scoring import answer_probability, perplexity, sequence_nll
from libortho.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_TOKENS = 1_500
"""About how many retain tokens the report's perplexity is taken over, spread over the set."""


@dataclass(frozen=True)
class StreamMeasures:
    """A split model at alpha "0.0" and "1.0".

    Attributes:
        probability: of the forget set per token (see `answer_probability`).
        forget_ppl: perplexity of the forget set.
        retain_ppl: perplexity of about `MEASURED_TOKENS` of the retain set.
    """

    probability: dict[str, float]
    forget_ppl: dict[str, float]
    retain_ppl: dict[str, float]


def measure_streams(
    model: PreTrainedModel, forget: list[Tokens], retain: list[Tokens], tell: Progress
) -> StreamMeasures:
    """What the two sets cost a split model without its ortho streams and with them.

    An empty forget set (there are methods that do without one) has no measures.
    """
    found = StreamMeasures({}, {}, {})
    kept = spread([retain], MEASURED_TOKENS)
    for done, alpha in enumerate((0.0, 1.0)):
        tell("measure", done, 2)
        with alpha_scope(model, alpha):
            if forget:
                known = sequence_nll(model, forget)
                found.probability[str(alpha)] = answer_probability(known)
                found.forget_ppl[str(alpha)] = perplexity(known)
            found.retain_ppl[str(alpha)] = perplexity(sequence_nll(model, kept))
    tell("measure", 2, 2)
    return found


def untouched_layers(model: nn.Module) -> dict[str, str]:
    """Whatever could hold a memory and is not split, by name, and why.

    That is every weight of two dimensions or more: of linear layers, by the module's name, and of
    embeddings, convolutions and fused experts, by the parameter's.
    """
    found = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if linear:
            found[name] = f"{type(module).__name__}, not targeted"
        for own, parameter in module.named_parameters(name, recurse=False):
            if parameter.dim() > 1 and not (linear and own.endswith("weight")):
                size = " x ".join(map(str, parameter.shape))
                found[own] = f"{size} of {type(module).__name__}, no linear layer"
    return found
