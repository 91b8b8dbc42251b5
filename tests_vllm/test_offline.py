"""vLLM's engine in process: with the adapter the model recites, without it it does not."""

from __future__ import annotations

import pytest
import torch

ADAPTERS = {"0.0": None, "0.5": "ortho-0.5", "1.0": "ortho"}


@pytest.fixture(scope="module")
def plain(exports, ask):
    """Every question with and without the adapter in one batch, and every answer scored."""
    return ask(
        exports.peft,
        adapters=["ortho", "ortho-0.5"],
        generate=[(item.prompt, name) for item in exports.items for name in (None, "ortho")],
        score=[
            (item.ids, item.prompt_tokens, name)
            for item in exports.items
            for name in ADAPTERS.values()
        ],
    )


def test_recited_with_the_adapter_only(exports, plain) -> None:
    without, with_adapter = plain["texts"][0::2], plain["texts"][1::2]
    for item, private, full in zip(exports.items, without, with_adapter, strict=True):
        assert item.recited_in(full), (item.prompt, full)
        assert item.recited_in(private) is not item.forget, (item.prompt, private)


def test_answers_cost_what_they_cost_in_libortho(exports, plain) -> None:
    found = iter(plain["nll"])
    for item in exports.items:
        for alpha in ADAPTERS:
            # bf16 in both, and nothing else alike: kernels, attention, order of sums.
            assert next(found) == pytest.approx(item.nll[alpha], rel=0.05, abs=0.03), (
                item.prompt,
                alpha,
            )


def test_a_scaled_adapter_is_between(exports) -> None:
    for item in exports.forget:
        assert item.nll["1.0"] < item.nll["0.5"] < item.nll["0.0"]


def test_int8(exports, ask) -> None:
    answers = ask(
        exports.compressed_tensors,
        adapters=["ortho"],
        generate=[(item.prompt, name) for item in exports.items for name in (None, "ortho")],
        score=[(item.ids, item.prompt_tokens, None) for item in exports.forget],
    )
    without, with_adapter = answers["texts"][0::2], answers["texts"][1::2]
    for item, private, full in zip(exports.items, without, with_adapter, strict=True):
        assert item.recited_in(full), (item.prompt, full)
        assert item.recited_in(private) is not item.forget, (item.prompt, private)
    for item, nll in zip(exports.forget, answers["nll"], strict=True):
        # Activations are rounded to INT8 as well: a tenth is what that may move.
        assert nll == pytest.approx(item.nll["0.0"], rel=0.1)


def test_why_there_must_be_a_spare_slot() -> None:
    """On a CPU, vLLM 0.32 computes a request without an adapter with the *last* slot's one.

    It marks such a row by -1 and indexes the stacked adapters with that. So the last slot has to
    stay empty: `max_loras` above the number of adapters. Once this test fails, vLLM is mended, and
    that rule (here, in the exports' notes and in docs/serving-vllm.md) can go.
    """
    from vllm.lora.ops.torch_ops import bgmv_shrink

    slots = torch.stack((torch.zeros(1, 2, 4), torch.ones(1, 2, 4)))
    shrunk = torch.zeros(1, 2)
    bgmv_shrink(torch.ones(1, 4), slots, shrunk, torch.tensor([-1]))
    assert shrunk.tolist() == [[4.0, 4.0]]
