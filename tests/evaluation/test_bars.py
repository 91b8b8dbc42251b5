"""The bars: each of the benchmark's requirements is there, just held and just missed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from libortho.evaluation.bars import (
    QUALITY,
    Bar,
    at_least,
    at_most,
    benchmark_bars,
    demo_bars,
    limits,
    over_seeds,
)

SHARES = {
    "forget_probability": 0.1,
    "retain_probability": 0.9,
    "forget_rouge": 0.4,
    "retain_rouge": 0.8,
    "truth_ratio": 0.6,
    "model_utility": 0.5,
    "extraction_strength": 0.05,
    "exact_memorization": 0.5,
    "mia_loss": 0.5,
    "mia_zlib": 0.5,
    "mia_min_k": 0.5,
    "mia_min_k_plus_plus": 0.5,
    "forget_loops": 0.0,
}
FULL = {**SHARES, "forget_probability": 0.95, "wikitext_perplexity": 20.0, "forget_fluency": 4.0}


def table() -> dict[str, dict[str, Any]]:
    """Rows at which every bar holds, most of them by far."""
    return {
        "full": dict(FULL),
        "reference": {**SHARES, "forget_fluency": 5.0},
        "alpha 0": {**SHARES, "forget_fluency": 5.0, "forget_quality": 0.9, "seconds": 10.0},
        "alpha 1": {**FULL, "kl_to_full": 1e-5},
        "npo": {"forget_quality": 0.01, "model_utility": 0.4, "seconds": 200.0, "stopped": True},
        "rmu": {"forget_quality": 0.01, "model_utility": 0.4, "seconds": 1.0, "stopped": False},
    }


def bars(rows: dict[str, dict[str, Any]], density: float = 0.005) -> dict[str, Bar]:
    found = benchmark_bars(rows, density, ["npo", "rmu"])
    assert len({bar.bar for bar in found}) == len(found)
    return {bar.bar: bar for bar in found}


GAP = "distance to the reference"
RESTORED = "alpha 1: largest distance of a measure to the full model's (perplexities: relative)"
FLUENCY = "perplexity of its answers under the pretrained model / the reference's"
SPEED = "seconds of the fastest gradient baseline at equal forgetting / of the split"
BEATEN = "share of baselines beaten on forget quality and model utility at once"
EVERY = {
    "full model: forget probability": ("full", "forget_probability", 0.901, 0.899),
    QUALITY: ("alpha 0", "forget_quality", 0.051, 0.049),
    f"forget probability, {GAP}": ("alpha 0", "forget_probability", 0.129, 0.131),
    f"forget ROUGE-L, {GAP}": ("alpha 0", "forget_rouge", 0.449, 0.451),
    "model utility / full model's": ("alpha 0", "model_utility", 0.4851, 0.4849),
    "retain probability / full model's": ("alpha 0", "retain_probability", 0.8731, 0.8729),
    f"extraction strength, {GAP}": ("alpha 0", "extraction_strength", 0.099, 0.101),
    f"membership AUC, loss, {GAP}": ("alpha 0", "mia_loss", 0.549, 0.551),
    f"membership AUC, zlib, {GAP}": ("alpha 0", "mia_zlib", 0.451, 0.449),
    f"membership AUC, Min-K%, {GAP}": ("alpha 0", "mia_min_k", 0.549, 0.551),
    f"membership AUC, Min-K%++, {GAP}": ("alpha 0", "mia_min_k_plus_plus", 0.549, 0.551),
    FLUENCY: ("alpha 0", "forget_fluency", 6.4, 6.6),
    RESTORED: ("alpha 1", "retain_rouge", 0.8099, 0.8101),
    "alpha 1: mean token KL to the full model, nats": ("alpha 1", "kl_to_full", 9e-4, 1.1e-3),
    SPEED: ("npo", "seconds", 101.0, 99.0),
    BEATEN: ("rmu", "model_utility", 0.499, 0.501),
}


def test_every_requirement_is_there_and_holds() -> None:
    found = bars(table())
    assert set(found) == {*EVERY, "ortho parameters / targeted layers'"}
    assert all(bar.holds for bar in found.values())


@pytest.mark.parametrize("name", EVERY)
def test_just_held_and_just_missed(name: str) -> None:
    row, measure, held, missed = EVERY[name]
    for value, holds in ((held, True), (missed, False)):
        rows = table()
        rows[row][measure] = value
        if name.startswith("full model"):  # it is restored to what it was, whatever that is
            rows["alpha 1"][measure] = value
        found = bars(rows)
        assert found[name].holds is holds
        assert [bar.bar for bar in found.values() if not bar.holds] == ([] if holds else [name])


@pytest.mark.parametrize("name", [n for n in EVERY if n not in (SPEED, BEATEN, RESTORED)])
def test_what_was_not_measured_does_not_hold(name: str) -> None:
    row, measure, *_ = EVERY[name]
    rows = table()
    del rows[row][measure]
    bar = bars(rows)[name]
    assert math.isnan(bar.value)
    assert not bar.holds


def test_forgetting_too_much_is_as_bad_as_too_little() -> None:
    rows = table()
    rows["alpha 0"]["forget_probability"] = 0.069
    assert not bars(rows)[f"forget probability, {GAP}"].holds


@pytest.mark.parametrize(
    ("measure", "value", "expected"),
    [
        ("wikitext_perplexity", 20.3, 0.015),  # relative: 20.3 / 20
        ("forget_fluency", 3.9, 0.025),
        ("forget_loops", 0.02, 0.02),
        ("mia_zlib", 0.47, 0.03),
    ],
)
def test_everything_measured_is_to_be_restored(measure: str, value: float, expected: float) -> None:
    rows = table()
    rows["alpha 1"][measure] = value
    bar = bars(rows)[RESTORED]
    assert bar.value == pytest.approx(expected)
    assert not bar.holds
    del rows["alpha 1"][measure]
    assert math.isnan(bars(rows)[RESTORED].value)
    del rows["full"][measure]  # measured of neither
    assert bars(rows)[RESTORED].value == 0


def test_the_ortho_stream_is_small() -> None:
    name = "ortho parameters / targeted layers'"
    assert bars(table(), 0.0100)[name].holds
    assert not bars(table(), 0.0101)[name].holds


def test_only_baselines_that_forgot_as_much_are_raced() -> None:
    rows = table()
    assert bars(rows)[SPEED].value == 20  # not rmu's 1 second, which did not get there
    rows["rmu"]["stopped"] = True
    assert bars(rows)[SPEED].value == pytest.approx(0.1)
    rows["npo"]["stopped"] = rows["rmu"]["stopped"] = False
    assert math.isnan(bars(rows)[SPEED].value)


def test_both_must_be_better_than_every_baseline() -> None:
    rows = table()
    rows["npo"]["forget_quality"] = 0.95
    assert bars(rows)[BEATEN].value == 0.5
    del rows["npo"]["forget_quality"]
    assert bars(rows)[BEATEN].value == 0.5
    without = benchmark_bars(table(), 0.005, [])
    assert {bar.bar for bar in without if not bar.holds} == {SPEED, BEATEN}


def test_medians_over_seeds_and_the_worst_quality() -> None:
    each = [
        [at_least(QUALITY, p, 0.05), at_most("gap", gap, 0.03)]
        for p, gap in ((0.9, 0.01), (0.04, 0.02), (0.5, 0.09))
    ]
    quality, gap = over_seeds(each)
    assert quality == Bar(f"{QUALITY}, worst of 3 seeds", 0.04, ">= 0.05", False)
    assert gap == Bar("gap", 0.02, "<= 0.03", True)
    assert over_seeds(each[:1]) == each[0]
    each[0][1] = at_most("gap", math.nan, 0.03)
    assert math.isnan(over_seeds(each)[1].value)
    assert not over_seeds(each)[1].holds


def test_the_short_jobs_bars() -> None:
    found = demo_bars(table(), 0.005)
    assert all(bar.holds for bar in found)
    assert len(found) == 6
    rows = table()
    rows["alpha 0"]["forget_probability"] += limits(quick=True).forget_gap + 1e-3
    assert [bar.holds for bar in demo_bars(rows, 0.02)] == [True, False, True, True, True, False]
    del rows["reference"]
    without = demo_bars(rows, 0.005)
    assert [bar.bar for bar in without] == [bar.bar for bar in found]
    assert [bar.bar for bar in without if math.isnan(bar.value)] == [found[1].bar]
    assert not without[1].holds


def test_without_a_reference_nothing_is_called_forgotten() -> None:
    rows = table()
    del rows["reference"]
    rows["alpha 0"] = dict(rows["full"])  # nothing was forgotten
    known = {bar.bar: bar for bar in benchmark_bars(table(), 0.005, ["npo", "rmu"])}
    for bar in benchmark_bars(rows, 0.005, ["npo", "rmu"]):
        assert bar.bar in known
        assert not (bar.holds and "reference" in bar.bar)
