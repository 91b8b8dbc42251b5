"""No cross-talk between alphas under load; the long version is `make crosstalk`."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")


def test_no_answer_depends_on_its_neighbours(crosstalk, canary) -> None:
    result = crosstalk.run(canary, requests=240, connections=24)
    assert result["prompts_that_recite_at_alpha_1"] >= 6
    assert result["leaks"] == 0
    assert result["wrong"] == 0, result["first_wrong"]
    assert result["requests"] == 240


def test_the_load_would_see_a_leak(crosstalk, canary, monkeypatch) -> None:
    """The same load on a server whose rows all run at the highest alpha of their batch."""
    import libortho.serve.rows as rows

    real = rows.scope_of_rows
    monkeypatch.setattr(rows, "scope_of_rows", lambda model, alphas: real(model, [max(alphas)]))
    result = crosstalk.run(canary, requests=60, connections=12)
    assert result["leaks"] > 0


def test_the_load_would_see_a_shared_cache(crosstalk, canary, monkeypatch) -> None:
    """... and on one whose rows read the cache of their neighbour."""
    import torch

    from libortho.serve.rows import RunningRows

    real = RunningRows.step

    def step(self, tokens):
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys.roll(1, 0), layer.values.roll(1, 0)
        return real(self, tokens)

    monkeypatch.setattr(RunningRows, "step", step)
    assert torch.is_grad_enabled()
    result = crosstalk.run(canary, requests=60, connections=12)
    assert result["wrong"] > 0
