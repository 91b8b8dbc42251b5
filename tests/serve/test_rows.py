"""The running batch against `generate`, one prompt at a time, in every model family."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fastapi")

from libortho import alpha_scope, replace_linear_layers
from libortho.layer import OrthoLinear
from libortho.serve.rows import RunningRows, check_model

ALPHAS = [0.0, 1.0, 0.25, 0.0, 1.0]


def alone(model, prompt: list[int], alpha: float, steps: int) -> list[int]:
    """The greedy continuation without a cache or a batch."""
    ids = list(prompt)
    for _ in range(steps):
        with alpha_scope(model, alpha), torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_rows_that_come_and_go_say_what_they_would_alone(family, large_ortho, random_tokens) -> None:
    model = replace_linear_layers(family.build(), [family.mlp, *family.attention])
    large_ortho(model)
    assert check_model(model, 64)
    prompts = [list(item.ids) for item in random_tokens([3, 9, 5, 14, 4])]
    wanted = [alone(model, p, a, 6) for p, a in zip(prompts, ALPHAS, strict=True)]
    assert wanted[0] != alone(model, prompts[0], 1.0, 6), "the ortho stream must matter"
    batch = RunningRows(model)
    made: dict[int, list[int]] = {}
    here: list[int] = []

    def take(rows: list[int], logits: torch.Tensor) -> None:
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            made.setdefault(row, []).append(token)

    def join(rows: list[int]) -> None:
        take(rows, batch.join([prompts[r] for r in rows], [ALPHAS[r] for r in rows]))
        here.extend(rows)

    def step() -> None:
        take(here, batch.step([made[r][-1] for r in here]))

    def leave(row: int) -> None:
        batch.keep([i for i, r in enumerate(here) if r != row])
        here.remove(row)

    join([0, 3])  # a short prompt beside a long one
    step()
    join([1])
    step()
    leave(3)  # the longest leaves: columns that only it had written go
    join([2, 4])  # and longer ones than the rest join
    for _ in range(3):
        step()
    for row, tokens in made.items():
        assert tokens == wanted[row][: len(tokens)], f"row {row} at alpha {ALPHAS[row]}"
    assert len(made[0]) == 6
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
            return torch.stack((out, out), 1).reshape(-1, out.shape[-1])[: len(flat)].reshape(
                *x.shape[:-1], -1
            )

    model = replace_linear_layers(tiny_llama(), "down_proj")
    assert check_model(model, 64)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.down_proj, OrthoLinear)
    mlp.down_proj = Routed(mlp.down_proj)
    assert not check_model(model, 64)


def test_a_state_that_is_no_kv_cache_is_refused(tiny_llama, monkeypatch) -> None:
    import libortho.serve.rows as rows
    from transformers.cache_utils import DynamicSlidingWindowLayer, Cache

    model = replace_linear_layers(tiny_llama(), "down_proj")
    monkeypatch.setattr(
        rows, "new_cache", lambda: Cache(layers=[DynamicSlidingWindowLayer(4) for _ in range(2)])
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps DynamicSlidingWindowLayer"):
        check_model(model, 64)
