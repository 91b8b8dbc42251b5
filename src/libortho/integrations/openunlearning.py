"""Split checkpoints in OpenUnlearning's own command, at one alpha.

    python -m libortho.integrations.openunlearning CHECKOUT/src/eval.py OVERRIDES... \\
        +model.model_handler=OrthoModel +model.model_args.alpha=0

Its `eval.py` makes a model by the name of a class in its registry (`model_handler`). This module
puts one more class there and then runs the script as it is, with the other arguments.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libortho.alpha import check_alpha, set_alpha
from libortho.integrations.registration import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OrthoModel:
    """What OpenUnlearning calls to make a model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, alpha: float = 0.0, **kwargs: Any
    ) -> PreTrainedModel:
        """A split model at `alpha`; everything else goes to transformers' `from_pretrained`.

        Raises:
            ValueError: alpha is out of range, or the model has no split layer.
            OrthoStreamMissing: alpha is above 0 and the checkpoint is base-only.
        """
        from transformers import AutoModelForCausalLM

        check_alpha(alpha)  # before anything is loaded
        register()
        kwargs.pop("trust_remote_code", None)  # whatever a config of theirs says
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=False, **kwargs
        )
        set_alpha(model, alpha)
        return model


def main(arguments: list[str]) -> None:
    """Run a script of an OpenUnlearning checkout with `OrthoModel` among its models.

    Args:
        arguments: the script, such as CHECKOUT/src/eval.py, and its own arguments.

    Raises:
        SystemExit: no script is named, or it is not one of OpenUnlearning's.
    """
    script = Path(arguments[0]) if arguments else Path()
    if not script.is_file() or not (script.parent / "model").is_dir():
        raise SystemExit(
            f"{script}: expected src/eval.py of a checkout of OpenUnlearning, then its arguments"
        )
    sys.path.insert(0, str(script.resolve().parent))
    importlib.import_module("model")._register_model(OrthoModel)
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
