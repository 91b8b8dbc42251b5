"""Error feedback against the paper's own recursion, run slowly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libortho.base import error_feedback as module
from libortho.base import quantize
from libortho.base.error_feedback import DAMPING, error_feedback
from libortho.base.grid import Grid, choose_grid
from libortho.config import BaseConfig
from libortho.gram import Gram
from libortho.linalg import low_rank_part
from libortho.methods.edits import retain_metric

INT4 = BaseConfig(storage="int4", group_size=6)
INT8 = BaseConfig(group_size=6)


def correlated(width: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """A second moment (width, width), fp64, of inputs that share a few directions."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 3, generator=draw) @ torch.randn(3, width, generator=draw)
    own = torch.randn(tokens, width, generator=draw) * torch.rand(width, generator=draw)
    x = (2 * shared + own).double()
    return x.T @ x / tokens


def damped(moment: Tensor) -> Tensor:
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).double()


def snap(grid: Grid, column: int, group: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and numbers of one column."""
    scale, zero = (part[:, column // group] for part in grid.numbers(torch.float64))
    codes = (wanted / scale + zero).round().clamp(grid.low, grid.high)
    return codes, (codes - zero) * scale


def paper(weight: Tensor, grid: Grid, moment: Tensor, columns: list[int], group: int) -> Tensor:
    """Equations 2 and 3: after each column all others move, by the inverse of what is left of H."""
    weight = weight.clone()
    codes = torch.empty_like(weight)
    left = torch.tensor(columns)
    h = damped(moment)
    for column in columns:
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, column], number = snap(grid, column, group, weight[:, column])
        error = (weight[:, column] - number) / inverse[0, 0]
        weight[:, left] -= error.unsqueeze(1) * inverse[0]
        left = left[1:]
    return codes


def weighted(error: Tensor, moment: Tensor) -> float:
    return float(((error @ moment) * error).sum().clamp_min(0).sqrt())


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("config", [INT4, INT8])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_the_papers_recursion(config: BaseConfig, order, block: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "COLUMNS", block)
    weight, moment = torch.randn(7, 24, dtype=torch.float64), correlated(24)
    grid = choose_grid(weight, config, moment.diagonal())
    columns = list(range(24))
    if order == "activation":
        columns.sort(key=lambda c: -float(moment[c, c]))
    expected = paper(weight, grid, moment, columns, 6)
    found = error_feedback(weight, grid, moment, order)
    assert found.dtype == (torch.uint8 if config is INT4 else torch.int8)
    assert torch.equal(found.double(), expected)
    assert not torch.equal(found, grid.nearest(weight))


def test_error_is_the_sum_over_columns() -> None:
    # ||(W - Q) T||^2 = sum_j T_jj^2 ||w'_j - Q_j||^2, and no |w'_j - Q_j| is above half a step
    # where nothing is clamped: a bound that nearest rounding does not have.
    weight, moment = torch.randn(7, 24, dtype=torch.float64) * 0.1, correlated(24)
    weight[:, :2] = torch.tensor([40.0, -40.0])  # a range wide enough that feedback stays in it
    grid = choose_grid(weight, BaseConfig())
    base = quantize(weight, BaseConfig(rounding="error_feedback"), moment)
    error = base.dequantize(torch.float64) - weight
    order = moment.diagonal().argsort(descending=True)
    lower = torch.linalg.cholesky(damped(moment)[order][:, order].flip(0, 1))
    bound = (lower.diagonal().square().sum() * (grid.scale.double() / 2).square().sum()).sqrt()
    assert weighted(error, damped(moment)) <= bound
    plain = quantize(weight).dequantize(torch.float64) - weight
    assert weighted(plain, damped(moment)) > bound


@pytest.mark.parametrize("storage", ["int4", "int8"])
@pytest.mark.parametrize("scale", ["absmax", "search"])
@pytest.mark.parametrize("seed", range(3))
def test_beats_nearest_on_correlated_inputs(storage: str, scale: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight, moment = torch.randn(40, 64), correlated(64, seed=seed).float()
    errors = {}
    for rounding in ("nearest", "error_feedback"):
        config = BaseConfig(storage=storage, scale=scale, group_size=32, rounding=rounding)
        error = quantize(weight, config, moment).dequantize() - weight
        errors[rounding] = weighted(error.double(), moment.double())
    assert errors["error_feedback"] < 0.75 * errors["nearest"]


def test_uncorrelated_inputs_leave_nothing_to_feed_back() -> None:
    weight = torch.randn(9, 24)
    moment = torch.diag(torch.rand(24) + 0.1)
    nearest = quantize(weight, BaseConfig(storage="int4", group_size=6, rounding="nearest"), moment)
    assert torch.equal(quantize(weight, INT4, moment).qdata, nearest.qdata)


def test_when_the_moment_is_read() -> None:
    weight, moment = torch.randn(9, 24), correlated(24).float()

    def stored(moment: Tensor | None, **changes: object) -> list[Tensor]:
        config = BaseConfig(**changes)  # type: ignore[arg-type]
        return list(quantize(weight, config, moment).buffers())

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    four = {"storage": "int4", "group_size": 6}
    assert same(stored(moment), stored(None))
    assert same(stored(moment, storage="fp16"), stored(None, storage="fp16"))
    plain = {**four, "scale": "absmax", "rounding": "nearest"}
    assert same(stored(moment, **plain), stored(None, **plain))
    fed_back = stored(moment, **four, rounding="error_feedback")
    assert same(stored(moment, **four), fed_back)
    assert not same(stored(None, **four), fed_back)
    assert same(stored(None, **four), stored(None, **four, rounding="nearest"))
    assert not same(stored(moment, rounding="error_feedback"), stored(None))
    for config, reads in (
        (BaseConfig(), False),
        (BaseConfig(storage="int4"), True),
        (BaseConfig(storage="int4", rounding="nearest"), True),
        (BaseConfig(**plain), False),
        (BaseConfig(rounding="error_feedback"), True),
        (BaseConfig(storage="fp16", scale="search"), False),
    ):
        assert config.reads_moment == reads


def test_the_base_depends_on_what_is_left_of_the_weight_only() -> None:
    # Two weights that differ by what went into their ortho streams have one base.
    kept, moment = torch.randn(12, 24), correlated(24).float()
    bases = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ortho = low_rank_part(torch.randn(12, 24), 2).half().float()
        weight = kept.double() + ortho.double()
        bases.append(quantize(weight - ortho.double(), INT4, moment))
    for a, b in zip(bases[0].buffers(), bases[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_retain_metric_is_a_moment() -> None:
    moment = correlated(24).float()
    metric = retain_metric(Gram.of(moment.clone()), 0.1)
    expected = moment + 0.1 * moment.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(metric.moment(), expected, rtol=1e-4, atol=1e-5)


def test_few_tokens_are_enough() -> None:
    # A moment of rank 2 in 24 dimensions has no Cholesky factor but for its damping.
    x = torch.randn(2, 24)
    error = quantize(weight := torch.randn(9, 24), INT4, x.T @ x).dequantize() - weight
    plain = quantize(weight, INT4).dequantize() - weight
    assert (error @ x.T).norm() < 0.5 * (plain @ x.T).norm()


@pytest.mark.parametrize(
    ("moment", "match"),
    [
        (torch.eye(23), r"moment is \(23, 23\): expected \(24, 24\)"),
        (torch.ones(24), r"moment is \(24,\): expected \(24, 24\)"),
        (torch.zeros(24, 24), "mean diagonal of 0.0"),
        (torch.full((24, 24), float("nan")), "mean diagonal of nan"),
        (torch.diag(torch.ones(24)) + torch.diag(torch.full((23,), float("inf")), 1), "finite"),
        (torch.eye(24) - 0.2, "not positive semi-definite"),
    ],
)
def test_moments_that_are_none(moment: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quantize(torch.randn(9, 24), INT4, moment)
