"""Split checkpoints in lm-evaluation-harness: `--model libortho`, at one alpha.

The harness (0.4.13) finds a model by name among those that are registered, and imports no other
package to look for more. So this module is the harness's own command with one more model in it:

    python -m libortho.integrations.lm_eval run --model libortho \\
        --model_args pretrained=DIR,alpha=0 --tasks TASK

From Python, importing it is enough for `lm_eval.simple_evaluate(model="libortho", ...)`.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}: lm-evaluation-harness is not installed; `pip install '.[eval]'` in a checkout "
        "of LibOrtho"
    ) from error

from libortho.alpha import check_alpha, set_alpha
from libortho.integrations.registration import register


@register_model("libortho")
class OrthoLM(HFLM):  # type: ignore[misc]
    """A split model at one alpha.

    Args:
        pretrained: the folder of a split checkpoint.
        alpha: in [0, 1]; 0 by default.
        device: by default the GPU where there is one, else the CPU (the harness always takes one).
        kwargs: whatever the harness's own `hf` model takes (dtype, batch_size, ...).

    Raises:
        ValueError: alpha is out of range, or the model has no split layer.
        OrthoStreamMissing: alpha is above 0 and the checkpoint is base-only.
        CheckpointError: as `load_split`.
    """

    def __init__(
        self, pretrained: str, alpha: float = 0.0, device: str | None = None, **kwargs: Any
    ) -> None:
        check_alpha(alpha)  # before anything is loaded
        register()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained=pretrained, device=device, **kwargs)
        set_alpha(self.model, alpha)


if __name__ == "__main__":
    cli_evaluate()
