"""All attacks on all models, and what the numbers come to beside a model that never knew."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libortho
from libortho.attacks.common import AttackData, Findings, Score, Subject
from libortho.attacks.registry import ATTACKS
from libortho.attacks.relearning import STEPS
from libortho.evaluation.bars import Bar, at_least, at_most
from libortho.evaluation.entries import number
from libortho.evaluation.folder import JobFolder, slug
from libortho.evaluation.tofu import versions
from libortho.files import write_json
from libortho.training import Progress

BASE, REFERENCE, ORIGINAL = "alpha 0", "reference", "alpha 1"
"""The models that bars are about, by name."""

ATTACKED_FORMAT = 2
"""Raised when an attack measures the same model otherwise."""

RECALL_MARGIN = 0.05
MEMBERSHIP_MARGIN = 0.02
INT4_SHIFT = 0.02
LEAST_STEPS = 0.7


@dataclass(frozen=True)
class Source:
    """Where a model to be attacked is.

    Attributes:
        folder: a split checkpoint, or whatever `load_model` takes.
        alpha: at which a split is attacked.
    """

    folder: str
    alpha: float = 0.0


def run_attacks(
    sources: Mapping[str, Source],
    layers: tuple[str, ...],
    data: AttackData,
    configs: Mapping[str, Any],
    folder: Path,
    progress: Progress,
    described: Mapping[str, Any],
    judged: Sequence[str] = (BASE,),
) -> dict[str, Any]:
    """Run every attack on every model, one model in memory at a time; see the module's text.

    What was found is kept in `folder`, and a run that was killed goes on where it was.

    Args:
        sources: by name, among them `BASE`; `REFERENCE` makes the bars.
        layers: the linear layers that were split.
        configs: name of an attack -> its config.
        folder: empty, or that of an interrupted run of the same attacks.
        progress: called as work goes on.
        described: what else the results depend on (files of questions, the pretrained model),
            JSON-ready; it is in the result, too.
        judged: names of the sources that bars are made for.

    Returns:
        The results, JSON-ready, also written to `attacks.json` in `folder`.

    Raises:
        FileExistsError: `folder` holds something else.
        ValueError: two sources whose names are one name of a file; or, with OSError, as the loading
            of models does.
    """
    _check_names(sources)
    store = JobFolder(folder, _identity(sources, layers, data, configs, described))
    results: dict[str, Any] = {name: {"scores": {}, "missing": {}} for name in configs}
    seconds: dict[str, dict[str, float]] = {name: {} for name in configs}
    for who, source in sources.items():
        subject: Subject | None = None
        for name, config in configs.items():
            file = f"{slug(who)}-{name}.json"
            if not store.has(0, file):
                if subject is None:
                    progress(f"{who}: load", 0, 1)
                    subject = Subject.load(who, source.folder, layers, source.alpha)
                clock = time.perf_counter()
                found = ATTACKS[name].run(subject, data, config, _named(who, name, progress))
                store.write(0, file, _kept(found, time.perf_counter() - clock))
            held = store.read(0, file)
            results[name]["scores"][who] = held["scores"]
            results[name]["missing"][who] = held["missing"]
            seconds[name][who] = held["seconds"]
        del subject
        gc.collect()
    summary = {
        "models": {who: dataclasses.asdict(source) for who, source in sources.items()},
        "data": {name: len(getattr(data, name)) for name in ("forget", "retain", "holdout")},
        "attacks": {
            name: {"config": dataclasses.asdict(configs[name]), **result, "seconds": seconds[name]}
            for name, result in results.items()
        },
        "bars": [bar.to_dict() for who in judged for bar in attack_bars(results, who)],
        **described,
        "versions": versions(),
    }
    write_json(folder / "attacks.json", summary)
    return summary


def _check_names(names: Iterable[str]) -> None:
    """What is kept of two models must not be one file: one would be shown with the other's."""
    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(slug(name), name)
        if other != name:
            raise ValueError(
                f"models {other!r} and {name!r} are both {slug(name)!r} as files: expected names "
                "that differ in more than spaces and hyphens"
            )


def _named(who: str, attack: str, progress: Progress) -> Progress:
    return lambda stage, done, total: progress(f"{who}: {attack}, {stage}", done, total)


def _kept(found: Findings, seconds: float) -> dict[str, Any]:
    return {
        "scores": [score.to_dict() for score in found.scores],
        "missing": dict(found.missing),
        "seconds": seconds,
    }


def _identity(
    sources: Mapping[str, Source],
    layers: tuple[str, ...],
    data: AttackData,
    configs: Mapping[str, Any],
    described: Mapping[str, Any],
) -> dict[str, Any]:
    from libortho.evaluation.finetuned import model_identity

    return {
        "libortho": libortho.__version__,
        "format": ATTACKED_FORMAT,
        "model": sources[BASE].folder,
        "methods": {name: dataclasses.asdict(config) for name, config in configs.items()},
        "seeds": [0],
        "sources": {
            who: [model_identity(source.folder), source.alpha] for who, source in sources.items()
        },
        "layers": layers,
        "examples": [
            [dataclasses.asdict(e) for e in part]
            for part in (data.forget, data.retain, data.holdout)
        ],
        "unrelated": data.unrelated,
        "template": data.template,
        "described": dict(described),
    }


# -- bars ----------------------------------------------------------------------------------------


def attack_bars(results: Mapping[str, Mapping[str, Any]], who: str = BASE) -> list[Bar]:
    """What a base must keep to; none without both it and the reference.

    Args:
        results: attack -> {"scores": {model: [a score as `Score.to_dict` makes it]}}.
        who: the base's name, which every bar of another than `BASE` begins with.
    """
    found: list[Bar] = []
    for attack, result in results.items():
        scores = {
            model: {one["name"]: Score.from_dict(one) for one in listed}
            for model, listed in result["scores"].items()
        }
        if who not in scores or REFERENCE not in scores:
            return []
        base, reference = scores[who], scores[REFERENCE]
        if attack == "perturbation":
            found += _int4(base)
        found += _beside(attack, base, reference)
    named = "" if who == BASE else f"{who}: "
    return [dataclasses.replace(bar, bar=named + bar.bar) for bar in found]


def _beside(attack: str, base: dict[str, Score], reference: dict[str, Score]) -> list[Bar]:
    """The worst score of an attack, beside the reference's, of those that both models have.

    What the base lacks it has not withstood, and steps that the reference lacks are beside nothing.
    What else only the base has (an ortho file) is a matter of its own.
    """
    alone = [name for name in reference if name not in base]
    alone += [n for n, own in base.items() if n not in reference and own.measure == STEPS]
    both = {name: (base[name], reference[name]) for name in base if name in reference}
    steps = {name: pair for name, pair in both.items() if pair[0].measure == STEPS}
    excess = {n: ours.value - theirs.value for n, (ours, theirs) in both.items() if n not in steps}
    found = [_steps(attack, steps)] if steps else []
    if alone:
        found.append(
            at_most(f"{attack}: scores of one model alone ({', '.join(alone)})", len(alone), 0)
        )
    if excess:
        name = max(excess, key=lambda n: _worst(excess[n]))
        margin = MEMBERSHIP_MARGIN if attack == "membership" else RECALL_MARGIN
        bar = f"{attack}: {both[name][0].measure} beyond the reference's (worst: {name})"
        found.append(at_most(bar, excess[name], margin))
    return found


def _steps(attack: str, pairs: Mapping[str, tuple[Score, Score]]) -> Bar:
    """Where the base recalls and the reference never did, the ratio is below what is shown.

    Such a bar does not hold. Where neither recalls, the ratio is 1.
    """

    def never(pair: tuple[Score, Score]) -> bool:
        ours, theirs = pair
        return bool(ours.details["reached"]) and not theirs.details["reached"]

    ratios = {name: _ratio(ours.value, theirs.value) for name, (ours, theirs) in pairs.items()}
    name = min(ratios, key=lambda n: (not never(pairs[n]), ratios[n]))
    bar = f"{attack}: steps over the reference's (worst: {name}"
    if never(pairs[name]):
        bar += ", which the reference never recalls"
    made = at_least(f"{bar})", ratios[name], LEAST_STEPS)
    return dataclasses.replace(made, holds=made.holds and not never(pairs[name]))


def _ratio(ours: float, theirs: float) -> float:
    """ours / theirs; 1 where both know from the start."""
    return (ours / theirs) if theirs else (1.0 if not ours else math.inf)


def _worst(value: float) -> float:
    """For a maximum: NaN, which compares with nothing, above all else. Its bar does not hold."""
    return math.inf if math.isnan(value) else value


def _int4(base: Mapping[str, Score]) -> list[Bar]:
    moves = {n: abs(number(s.details["shift"])) for n, s in base.items() if n.startswith("INT4")}
    if not moves:
        return []
    name = max(moves, key=lambda n: _worst(moves[n]))
    bar = f"perturbation: move of the forget probability by re-quantisation (worst: {name})"
    return [at_most(bar, moves[name], INT4_SHIFT)]
