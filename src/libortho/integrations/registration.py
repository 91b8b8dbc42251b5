"""Make `AutoModelForCausalLM.from_pretrained` know split checkpoints, without importing it here.

transformers takes a quantisation format from outside once a class is registered for it, and
registering imports transformers, which takes longer than all of LibOrtho. So that `import libortho`
stays light and still suffices, it registers at once only where transformers is imported already,
and else leaves a finder that waits for transformers' own import of its modelling code, steps aside
and registers when that is done.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.modeling_utils"
"""Imported by whatever loads a model, and by nothing that only reads a config."""


def register() -> None:
    """Register LibOrtho's format with transformers now; once is enough, more does no harm."""
    importlib.import_module("libortho.integrations.transformers")


def register_with_transformers() -> None:
    """Register as soon as transformers can load a model, which may be now or never."""
    if AWAITED in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds nothing itself: asks the others for `AWAITED`, once, and adds `register` to it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # it may be tried again
                raise
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
