"""The spectrum of a split: energies against explicit matrices, ratios against eigenvalues."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.linalg import eigh

from libortho import GeometricConfig, SeparationConfig, SpectralConfig, separate_
from libortho.calibration import second_moments
from libortho.gram import Gram
from libortho.linear import select_linear
from libortho.methods.edits import LowRankEdit, retain_metric
from libortho.methods.projection import Projection
from libortho.solvers.problem import Journal, Problem
from libortho.solvers.spectrum import edit_spectrum, principal_directions


@pytest.mark.parametrize(("rows", "rank", "columns"), [(9, 3, 7), (4, 4, 4), (3, 1, 11), (3, 5, 8)])
def test_principal_directions(rows: int, rank: int, columns: int) -> None:
    x = torch.randn(3 * columns, columns)
    metric = retain_metric(Gram.of(x.T @ x), 0.1)
    edit = LowRankEdit(torch.randn(rows, rank), torch.randn(rank, columns))
    squares, directions = principal_directions(edit, metric)
    whitened = (edit.left @ edit.right).double() @ metric.factor.double()
    expected = torch.linalg.svdvals(whitened).square()[: min(rows, rank)]
    torch.testing.assert_close(squares[: len(expected)].double(), expected, rtol=1e-3, atol=1e-4)
    gram = directions @ metric.moment() @ directions.T
    torch.testing.assert_close(gram, torch.eye(len(directions)), rtol=0, atol=1e-3)
    # The directions add up to the edit's own energy, on any text.
    moment = torch.randn(columns, columns)
    moment = moment @ moment.T
    energies = squares * (directions @ moment @ directions.T).diagonal()
    whole = edit.left @ edit.right
    assert float(energies.sum()) == pytest.approx(float((whole @ moment * whole).sum()), rel=1e-3)


@pytest.fixture
def problem(memorised) -> Problem:
    layers = select_linear(memorised.model, ("up_proj", "down_proj"))
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    m = memorised
    return Problem(m.model, layers, weights, m.forget, m.retain, [], None, Journal())


def test_ratios_of_the_closed_form_are_generalised_eigenvalues(problem: Problem) -> None:
    retain = second_moments(problem.model, problem.layers, problem.retain)
    metrics = {
        name: retain_metric(m.mean(), 0.1, scale=2.0 + i)
        for i, (name, m) in enumerate(retain.items())
    }
    ones = [torch.ones(item.targets) for item in problem.forget]
    moments = second_moments(problem.model, problem.layers, problem.forget, weights=ones)
    forget = {name: m.mean() for name, m in moments.items()}
    edits = Projection(problem.weights, metrics, forget, 3_000).edits(3_000)
    spectrum = edit_spectrum(problem, edits, metrics)
    assert set(spectrum) == {name for name, edit in edits.items() if edit.rank}
    assert sum(len(of.forget) for of in spectrum.values()) == sum(e.rank for e in edits.values())
    for name, of in spectrum.items():
        # The edit takes the leading eigenvectors of S_f v = mu M v; its own principal directions
        # mix those, and their ratios lie between the eigenvalues. The sums are the edit's.
        whole = edits[name].left @ edits[name].right
        scale = metrics[name].scale
        for energies, moment in (
            (of.forget, forget[name].dense()),
            (of.retain, metrics[name].moment()),
        ):
            expected = scale * float((whole @ moment * whole).sum())
            assert sum(energies) == pytest.approx(expected, rel=1e-3)
        values = eigh(
            forget[name].dense().double(), metrics[name].moment().double(), eigvals_only=True
        )
        leading = values[::-1][: edits[name].rank]
        ratios = [f / r for f, r in zip(of.forget, of.retain, strict=True)]
        assert sum(ratios) == pytest.approx(float(leading.sum()), rel=1e-2)  # a trace
        assert max(ratios) <= leading[0] * (1 + 1e-3)
        assert list(of.retain) == sorted(of.retain, reverse=True)


@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_it_is_in_the_report(memorised, edit: str) -> None:
    method = GeometricConfig(edit=edit, ortho_ratio=0.2, target_nll=3.0)
    config = SeparationConfig(method, ("up_proj", "down_proj"), general_text=False)
    report = separate_(memorised.model, memorised.forget, memorised.retain, config)
    ranks = {layer.name: layer.rank for layer in report.layers if layer.rank}
    assert {name: len(of.forget) for name, of in report.spectrum.items()} == ranks
    assert all(min(*of.forget, *of.retain) >= 0 for of in report.spectrum.values())
    # What was cut out is used far more by the forget set than by what is kept.
    forget = sum(sum(of.forget) for of in report.spectrum.values())
    assert forget > 2 * sum(sum(of.retain) for of in report.spectrum.values())
    plain = json.loads(json.dumps(report.to_dict()))["spectrum"]
    assert plain[next(iter(ranks))].keys() == {"forget", "retain"}
    assert "spectrum" in report.seconds


def test_a_method_without_directions_has_none(memorised) -> None:
    config = SeparationConfig(SpectralConfig(use_low_rank=False), ("down_proj",), False)
    assert separate_(memorised.model, memorised.forget, memorised.retain, config).spectrum == {}
