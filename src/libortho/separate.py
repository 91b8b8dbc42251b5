"""separate_: split a model into what it may say and what it memorised. Read top to bottom.

check -> settle the goal -> solve by the method, and quantise -> install -> measure
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import libortho
from libortho.alpha import ortho_layers
from libortho.base import check_width
from libortho.calibration import not_finite
from libortho.config import check_choice, to_dict
from libortho.data.tokens import Template, Tokens, holds_question
from libortho.given import (
    check_apart,
    check_merged,
    check_outputs,
    checked_tokens,
    general_tokens,
)
from libortho.goal import REHEARSAL, Aiming, Earlier, check_guides, choose_goal
from libortho.ignorant import check_trainable, exchange_, ignorant_model
from libortho.judgement import judge
from libortho.layer import OrthoLinear
from libortho.linear import install, read_linear, select_linear
from libortho.measures import measure_streams, untouched_layers
from libortho.methods import METHODS, method_of
from libortho.methods.geometric import GeometricConfig
from libortho.methods.graft import GraftConfig
from libortho.report import SeparationReport, measure_layer
from libortho.scoring import answer_probability, sequence_nll
from libortho.solvers import SOLVERS, MethodConfig
from libortho.solvers.problem import Journal, Problem, Progress
from libortho.training import MemoriseConfig
from libortho.workers import ThisProcess, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_FINITE = re.compile(r"\b(nan|inf)\b|not finite|non-finite", re.IGNORECASE)
"""In the message of whatever meets NaN or Inf first: this package, torch, or LAPACK."""

NO_GENERAL_TEXT = (
    "no general text protects the model, for want of a tokenizer: pass tokenizer=, or "
    "general_text=False with a retain set that is broad enough"
)


@dataclass(frozen=True)
class SeparationConfig:
    """Configuration of a whole split.

    Attributes:
        method: a method's config; its class says which method.
        target_modules: the linear layers to split (see `select_linear`).
        general_text: protect the embedded general text beside the retain set; where that or the
            forget set holds questions, the embedded questions of common knowledge as well.
        earlier: how a model from before the memorising, if there is one, is asked what it would say
            (see `goal.Earlier`). "rehearse" takes the memory of a fine-tune.
        rehearsal: recipe of the fine-tune that "rehearse" is. Its learning rate suits a model of a
            hundred million parameters; for billions, 1e-5 to 2e-5 is usual. (That of graft's base
            is its method's, `GraftConfig.training`.)
        template: how questions become prompts, where text is given. The report has it, and the
            commands ask the split in this form, so it is to be named where tokens are given, too.
    """

    method: MethodConfig = field(default_factory=GeometricConfig)
    target_modules: tuple[str, ...] = ("down_proj",)
    general_text: bool = True
    earlier: Earlier = "rehearse"
    rehearsal: MemoriseConfig = REHEARSAL
    template: Template = "plain"

    def __post_init__(self) -> None:
        check_choice("earlier", self.earlier, Earlier)
        check_choice("template", self.template, Template)
        method_of(self.method)
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))


def separate_(
    model: PreTrainedModel,
    forget: Sequence[Any] | None,
    retain: Sequence[Any],
    config: SeparationConfig | MethodConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    before: PreTrainedModel | None = None,
    unseen: Sequence[Any] | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> SeparationReport:
    """Split the targeted layers of a causal LM in place; alpha starts at 0.

    Args:
        model: a Hugging Face causal LM. An exception leaves it as it was.
        forget: what is to be forgotten: `Example`s or strings (with a tokenizer), `Tokens`, id
            sequences, or mappings with "input_ids" and "labels". None or empty for a method that
            does without (curvature): it is not looked at there, only measured.
        retain: what must stay, in the same forms. A few hundred sequences will do; general text is
            added from the package, if there is a tokenizer and the config does not say otherwise.
        config: a `SeparationConfig`, or a method's config for the default target modules.
        tokenizer: the model's.
        before: the model before it memorised (same vocabulary). The forget set is then moved to
            what that model would say, once it knows the form of the retain set (see the config's
            `earlier`).
        unseen: sequences comparable to the forget set that the model has never seen: they say how
            unfamiliar the forget set should become, beside what the base makes of them. Without
            `before`, `unseen` and the config's `target_nll`, `DEFAULT_TARGET_NLL` is aimed at.
        progress: called as work goes on.
        workers: who does what is independent layer by layer, or text by text (see
            `integrations.ray`); this process by default.

    Returns:
        The measured report. `report.reached` is False where the budget did not suffice; the model
        is split all the same, and the caller decides. It is None where no forget set was given:
        nothing is claimed then.

    Raises:
        ValueError: a set that is missing or empty, a text that is in two sets, a target that
            matches nothing, the output layer where the method cannot split it, NaN/Inf weights, a
            layer that is split already, a PEFT adapter that is not merged, a token id outside the
            vocabulary, a budget too small for one direction or entry, a sequence of which the model
            makes NaN or Inf (it and the first such layer are named).
        TypeError: a target that is not linear, or items of an unknown form.
    """
    if config is None:
        config = SeparationConfig()
    elif not isinstance(config, SeparationConfig):
        config = SeparationConfig(method=config)
    solver = SOLVERS[type(config.method)]
    if workers is not None and not solver.shares:
        able = [repr(method) for method in sorted(METHODS) if SOLVERS[METHODS[method]].shares]
        raise ValueError(
            f"method {method_of(config.method)!r} needs gradients of the whole model at every step "
            "and has nothing to hand to workers; methods that have: " + ", ".join(able)
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a split needs gradients: call separate_ outside of inference_mode")
    journal = Journal(progress)
    check_merged(model, "the model")
    if before is not None and needs_before(config):
        check_merged(before, "the earlier model")
    layers = select_linear(model, config.target_modules)
    linears = {name: read_linear(layer, name) for name, layer in layers.items()}
    for name, (weight, _) in linears.items():
        check_width(weight.shape[1], config.method.base, name)
        if solver.moments and layers[name] is model.get_output_embeddings():
            able = [repr(method) for method in METHODS if not SOLVERS[METHODS[method]].moments]
            raise ValueError(
                f"{name} is the output layer, which method {method_of(config.method)!r} cannot "
                f"split: choose other targets, or one of {', '.join(sorted(able))}"
            )

    def tokens(items: Sequence[Any], label: str) -> list[Tokens]:
        return checked_tokens(model, before, items, label, tokenizer, config.template)

    if before is not None:
        check_outputs(model, before)
    given = {"forget": forget, "retain": retain, "unseen": unseen}
    check_sets(config, given, before)
    forget_items = [] if forget is None or len(forget) == 0 else tokens(forget, "forget")
    retain_items = tokens(retain, "retain")
    unseen_items = None if unseen is None else tokens(unseen, "unseen")
    check_apart(given)
    # Where nothing was asked, nothing was measured in any form.
    asked = any(holds_question(items) for items in given.values() if items is not None)
    template = config.template if asked else None
    with _evaluating(model), nullcontext() if before is None else _evaluating(before):
        general: list[Tokens] = []
        if solver.general and config.general_text:
            if tokenizer is None:
                journal.warnings.append(NO_GENERAL_TEXT)
            else:
                prompted = any(item.prompt > 1 for item in (*forget_items, *retain_items))
                form = config.template if prompted else None
                general = general_tokens(model, before, tokenizer, form)
        sets = {
            "forget": forget_items,
            "retain": retain_items,
            "unseen": unseen_items or [],
            "general text": general,
        }
        with _naming_texts(model, before, layers, sets):
            goal = None
            if isinstance(config.method, Aiming):
                with journal.stage("goal"):
                    journal.tell("goal", 0, 1)
                    goal = choose_goal(
                        model,
                        forget_items,
                        retain_items,
                        before=before,
                        unseen=unseen_items,
                        target_nll=config.method.target_nll,
                        earlier=config.earlier,
                        rehearsal=config.rehearsal,
                    )
                    journal.tell("goal", 1, 1)
            host, host_layers = model, layers
            if isinstance(config.method, GraftConfig):
                assert before is not None
                with journal.stage("base"):
                    host = ignorant_model(
                        model,
                        before,
                        retain_items,
                        config.method.training,
                        config.earlier,
                        lambda stage, done, total: journal.tell(f"base: {stage}", done, total),
                    )
                host_layers = select_linear(host, config.target_modules)
            known = None
            if forget_items:
                known = answer_probability(sequence_nll(model, forget_items))
            hosted = {name: read_linear(layer, name) for name, layer in host_layers.items()}
            problem = Problem(
                host,
                host_layers,
                {name: weight for name, (weight, _) in hosted.items()},
                forget_items,
                retain_items,
                general,
                goal,
                journal,
                workers or ThisProcess(),
                None if host is model else model,
                known,
            )
            splits = solver.solve(problem, config.method)
            new_layers = {}
            for name, (_, bias) in hosted.items():
                split = splits.pop(name)
                # a base that was made on another device comes to where the model's layer is
                here = linears[name][0].device
                split.base.to(here)
                split.ortho.to(here)
                bias = None if bias is None else bias.to(here)
                # measured against the original, whatever the base was made of
                report = measure_layer(name, method_of(config.method), linears[name][0], split)
                new_layers[name] = OrthoLinear.from_streams(split.base, split.ortho, bias, report)
            if host is not model:
                exchange_(model, host)
            install(model, new_layers)
            try:
                return _measure(dataclasses.replace(problem, model=model), config, template)
            except BaseException:
                install(model, layers)
                if host is not model:
                    exchange_(model, host)
                raise


def needs_before(config: SeparationConfig) -> bool:
    """Whether the base is made of an earlier model, which must be there."""
    return isinstance(config.method, GraftConfig)


def check_sets(
    config: SeparationConfig, sets: Mapping[str, Sequence[Any] | None], before: object | None
) -> None:
    """Raise ValueError where `config`'s method needs what is not there, or is told two levels.

    Args:
        config: of the split.
        sets: "forget", "retain" and "unseen" -> the set, or None.
        before: the earlier model, or anything that stands for it, or None.
    """
    if needs_before(config):
        check_trainable(before is not None, config.earlier)
    if isinstance(config.method, Aiming):
        check_guides(config.method.target_nll, before, sets["unseen"])
    forget = sets["forget"]
    given = forget is not None and len(forget) > 0
    if given or SOLVERS[type(config.method)].forget_optional:
        return
    able = [method for method, kind in METHODS.items() if SOLVERS[kind].forget_optional]
    raise ValueError(
        f"the forget set is {'missing' if forget is None else 'empty'}: method "
        f"{method_of(config.method)!r} needs at least one sequence; without any, there is "
        + " or ".join(map(repr, able))
    )


@contextmanager
def _naming_texts(
    model: PreTrainedModel,
    before: PreTrainedModel | None,
    layers: Mapping[str, nn.Module],
    sets: Mapping[str, Sequence[Tokens]],
) -> Iterator[None]:
    """Where the block fails because a model makes NaN or Inf of a sequence, say of which.

    NaN is found where it first does harm (a moment, a loss, a draw from probabilities), which is
    after a batch or a set. Which sequence it was is worth another pass only then.
    """
    try:
        yield
    except (ValueError, RuntimeError, FloatingPointError) as error:
        if not _NOT_FINITE.search(str(error)):
            raise
        for whose, looked_at in (("", model), ("the earlier model, ", before)):
            if looked_at is None:
                continue
            there = dict(looked_at.named_modules())  # an earlier model may have fewer
            chosen = {name: there[name] for name in layers if name in there}
            for label, items in sets.items():
                found = not_finite(looked_at, chosen, items)
                if found is not None:
                    raise ValueError(
                        f"{whose}{label}[{found[0]}]: this text gives NaN or Inf at {found[1]}"
                    ) from error
        raise


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout within the block; afterwards every module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _measure(
    problem: Problem, config: SeparationConfig, template: Template | None
) -> SeparationReport:
    """Report on the model as it is now, split, at both ends of alpha."""
    model, journal = problem.model, problem.journal
    with journal.stage("measure"):
        measured = measure_streams(model, problem.forget, problem.retain, journal.tell)
        values = [*measured.forget_ppl.values(), *measured.retain_ppl.values()]
        if any(math.isnan(value) for value in values):
            raise ValueError("the perplexity of the forget or retain set is NaN")
        reached = judge(problem, config.method, measured.probability)
    report = separation_report(model)
    skipped = report.skipped
    if problem.original is not None:
        skipped = {name: f"{why}: the base model's own" for name, why in skipped.items()}
    return dataclasses.replace(
        report,
        # a model may hold layers that an earlier call split
        layers=tuple(layer for layer in report.layers if layer.name in problem.layers),
        skipped=skipped,
        forget_ppl=measured.forget_ppl,
        retain_ppl=measured.retain_ppl,
        target=journal.target,
        reached=reached,
        warnings=tuple(journal.warnings),
        spectrum=journal.spectrum,
        seconds=journal.seconds,
        settings={
            "libortho": libortho.__version__,
            "torch": torch.__version__,
            "target_modules": list(config.target_modules),
            "general_text": config.general_text,
            "earlier": config.earlier,
            "rehearsal": to_dict(config.rehearsal),
            "template": template,
            "method": to_dict(config.method),
            "forget_sequences": len(problem.forget),
            "retain_sequences": len(problem.retain),
        },
    )


def separation_report(model: nn.Module) -> SeparationReport:
    """The per-layer report of a model that is split already, without any measurement of text."""
    found = ortho_layers(model)
    layers = tuple(
        dataclasses.replace(layer.report, name=name)
        for name, layer in found.items()
        if layer.report is not None
    )
    return SeparationReport(layers=layers, skipped=untouched_layers(model))
