"""The running batch against `generate`, one prompt at a time, in every model family."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fastapi")

from libortho import alpha_scope, replace_linear_layers
from libortho.layer import OrthoLinear
from libortho.serve.rows import RunningRows, check_model

ALPHAS = [0.0, 1.0, 0.25, 0.0, 1.0]


def alone(model, ids: list[int], alpha: float) -> torch.Tensor:
    """Logits at every position of one sequence, without a cache or a batch."""
    with alpha_scope(model, alpha), torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_rows_that_come_and_go_compute_what_they_would_alone(
    family, large_ortho, random_tokens
) -> None:
    model = replace_linear_layers(family.build(), [family.mlp, *family.attention])
    large_ortho(model)
    assert check_model(model, 64)
    starts = [3, 9, 5, 14, 4]
    texts = [list(item.ids) for item in random_tokens([n + 8 for n in starts])]
    wanted = [alone(model, text, alpha) for text, alpha in zip(texts, ALPHAS, strict=True)]
    other = alone(model, texts[0], 1.0)
    assert (wanted[0] - other).abs().max() > 0.05, "the ortho stream must matter"
    batch = RunningRows(model)
    at = list(starts)
    here: list[int] = []

    def compare(rows: list[int], logits: torch.Tensor) -> None:
        for row, found in zip(rows, logits, strict=True):
            torch.testing.assert_close(found, wanted[row][at[row] - 1], atol=2e-4, rtol=1e-4)

    def join(rows: list[int]) -> None:
        prompts = [texts[row][: at[row]] for row in rows]
        compare(rows, batch.join(prompts, [ALPHAS[row] for row in rows]))
        here.extend(rows)

    def step() -> None:
        tokens = [texts[row][at[row]] for row in here]
        for row in here:
            at[row] += 1
        compare(here, batch.step(tokens))

    def leave(row: int) -> None:
        batch.keep([i for i, r in enumerate(here) if r != row])
        here.remove(row)

    join([0, 3])  # a short prompt beside a long one
    step()
    join([1])
    step()
    leave(3)  # the longest leaves: columns that only it had written go
    assert batch.attention.shape[1] == at[1]
    join([2, 4])
    for _ in range(3):
        step()
    assert [at[row] - starts[row] for row in range(5)] == [5, 4, 3, 2, 3]
    for row in (0, 1, 2, 4):
        leave(row)
    assert len(batch) == 0
    assert batch._cache is None


def test_an_expert_that_sees_some_rows_only_forbids_mixed_batches(tiny_llama) -> None:
    class Routed(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            out = self.inner(flat[::2])
            return (
                torch.stack((out, out), 1)
                .reshape(-1, out.shape[-1])[: len(flat)]
                .reshape(*x.shape[:-1], -1)
            )

    model = replace_linear_layers(tiny_llama(), "down_proj")
    assert check_model(model, 64)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.down_proj, OrthoLinear)
    mlp.down_proj = Routed(mlp.down_proj)
    assert not check_model(model, 64)


def test_a_state_that_is_no_kv_cache_is_refused(tiny_llama, monkeypatch) -> None:
    from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

    import libortho.serve.rows as rows

    model = replace_linear_layers(tiny_llama(), "down_proj")
    monkeypatch.setattr(
        rows, "new_cache", lambda: Cache(layers=[DynamicSlidingWindowLayer(4) for _ in range(2)])
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps DynamicSlidingWindowLayer"):
        check_model(model, 64)
