"""How a row's next token is chosen."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fastapi")

from libortho.serve.sampling import Rule, choose


def rule(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, logprobs: int | None = None):
    return Rule(temperature, top_p, torch.Generator().manual_seed(seed), logprobs)


def test_zero_takes_the_likeliest_and_tells_log_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, -1.0]], dtype=torch.bfloat16)
    first, second = choose(logits, [rule(0.0, logprobs=2), rule(0.0)])
    expected = logits[0].float().log_softmax(0)
    assert (first.token, second.token) == (1, 0)
    assert first.logprob == pytest.approx(float(expected[1]))
    assert [i for i, _ in first.top] == [1, 2]
    assert [v for _, v in first.top] == pytest.approx(expected[[1, 2]].tolist())
    assert second.logprob is None


def draws(logits: torch.Tensor, made: Rule, count: int = 1200) -> torch.Tensor:
    tokens = [choose(logits[None], [made])[0].token for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    found = draws(logits, rule(temperature))
    assert torch.allclose(found, (logits / temperature).softmax(0), atol=0.05)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probability = torch.tensor([0.1, 0.5, 0.3, 0.1])
    found = draws(probability.log(), rule(top_p=0.7))
    assert torch.allclose(found, torch.tensor([0.0, 0.625, 0.375, 0.0]), atol=0.05)
    assert draws(probability.log(), rule(top_p=1e-6), 20)[1] == 1


def test_a_seed_repeats_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(3, 50)
    alone = [choose(logits[:1], [made])[0].token for made in [rule(seed=7)] for _ in range(20)]
    mine, other = rule(seed=7), rule(seed=8)
    among = [choose(logits, [mine, other, other])[0].token for _ in range(20)]
    assert alone == among
    assert len(set(alone)) > 3


def test_extremes() -> None:
    logits = torch.tensor([[1e30, -1e30, float("-inf")]])
    (chosen,) = choose(logits, [rule(1e-6, logprobs=3)])
    assert (chosen.token, chosen.logprob) == (0, 0.0)
    assert [value for _, value in chosen.top] == [0.0, -9999.0, -9999.0], "JSON has no infinity"
    # Less than fp32 can tell from 0, which would divide 0 by 0 and fail for every row.
    tiny, other = choose(torch.tensor([[0.0, 1.0, 2.0]] * 2), [rule(1e-320), rule(0.0)])
    assert (tiny.token, other.token) == (2, 2)
    with pytest.raises(ValueError, match="NaN"):
        choose(torch.tensor([[float("nan"), 0.0]]), [rule()])
