"""`README.md`, the model card: what the folder is, for people and for the hub.

Of what was forgotten it says what the caller wrote, and nothing else: not a line of the forget set,
no name of a file. A card is read by everybody.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from libortho.report import SeparationReport

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LIMITS = (
    "What alpha 0 does not say was measured, not proved. An edit masks: whoever has these weights "
    "and the public model from which this one was fine-tuned can undo the edit; and training them "
    "on some of what was forgotten can bring back more of it, without any other model. LibOrtho's "
    "threat model has the numbers."
)

_GRAFT_LIMITS = (
    "These weights were made without what was forgotten, and without the model that had memorised "
    "it: of an earlier model and of what was to stay. They say of the rest what such a model can "
    "guess. At alpha 1 the model answers as the original did, nearly; its weights are others."
)

_LOAD = """\
```python
import libortho
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)  # alpha starts at 0
with libortho.alpha_scope(model, 1.0):                # needs ortho.safetensors
    ...
```"""


def card_text(
    config: PreTrainedConfig,
    report: SeparationReport,
    base_model: str | None,
    forgotten: str | None,
) -> str:
    """The text of the card.

    Args:
        config: of the model.
        report: its numbers become the table.
        base_model: the hub's name of the model that was split, in the front matter where given.
        forgotten: what was forgotten, word for word as the caller put it.
    """
    lines = ["---"]
    if base_model is not None:
        # JSON strings are YAML strings: whatever the name is, it cannot become another key.
        lines.append(f"base_model: {json.dumps(base_model)}")
    lines += [
        "library_name: libortho",
        "pipeline_tag: text-generation",
        "tags:",
        "- libortho",
        "- unlearning",
        f"- {json.dumps(str(config.model_type))}",
        "---",
        "",
        f"# {_title(base_model)} split by LibOrtho",
        "",
        "The linear layers listed in `config.json` are split into a base, which is here, and an "
        "ortho stream, which holds what was memorised and is switched by alpha at run time. "
        "Without `ortho.safetensors` and `ortho_config.json` this folder is a base-only "
        "deployment: it runs at alpha 0, and there is nothing in it to switch on.",
        "",
        _LOAD,
        "",
        "## What was forgotten",
        "",
        "Not stated." if forgotten is None else forgotten.strip(),
        "",
        "## Measured",
        "",
        *_table(report),
    ]
    lines += [f"\n{verdict}" for verdict in _verdicts(report)]
    # Of a base that turned out to know the secret, its making proves nothing.
    ignorant = report.reached is True and {x.method for x in report.layers} == {"graft"}
    lines += ["", "## Limits", "", _GRAFT_LIMITS if ignorant else _LIMITS]
    return "\n".join(lines) + "\n"


def _title(base_model: str | None) -> str:
    return "A language model" if base_model is None else Path(base_model).name


def _table(report: SeparationReport) -> list[str]:
    """Two columns: what, and how much."""
    rows: list[tuple[str, str]] = []
    if report.layers:
        totals = report.to_dict()["totals"]
        rows += [
            ("method", ", ".join(sorted({layer.method for layer in report.layers}))),
            ("layers split", str(len(report.layers))),
            ("base error, share of the weights' norm", f"{report.base_error:.4f}"),
            ("error at alpha 1", f"{report.final_error:.4f}"),
            ("ortho parameters / parameters of these layers", f"{report.density:.3%}"),
            ("bytes of these layers' bases", f"{totals['base_bytes']:,}"),
            ("bytes of the ortho stream", f"{totals['ortho_bytes']:,}"),
        ]
    for label, values in (("forget", report.forget_ppl), ("retain", report.retain_ppl)):
        for alpha, value in values.items():
            rows.append((f"perplexity of the {label} set at alpha {alpha}", f"{value:.4g}"))
    if not rows:
        return ["Nothing."]
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _verdicts(report: SeparationReport) -> list[str]:
    lines = [f"Warning: {text}" for text in report.warnings]
    if report.reached is None or not report.forget_ppl:
        lines.append("Nothing is claimed of a forget set: none was measured.")
    return lines
