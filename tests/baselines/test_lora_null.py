"""lora-null: a genuine split, the unlearned model at alpha 0 and the original at alpha 1."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from libortho import BaseConfig, OrthoLinear, alpha_scope
from libortho.baselines.lora_null import Lora, LoraNullConfig, adapted, lora_null_
from libortho.baselines.losses import NPO, GradDiff
from libortho.baselines.unlearn import UnlearnConfig
from libortho.data.tokens import Tokens
from libortho.linear import select_linear
from libortho.scoring import answer_probability, sequence_nll

TARGETS = ("up_proj", "down_proj")


def config(rate: float = 1e-2, **settings: object) -> LoraNullConfig:
    training = UnlearnConfig(NPO(), rate, max_epochs=150, landing_steps=6)
    values = {"ortho_ratio": 0.1, "target_modules": TARGETS, **settings}
    return LoraNullConfig(**{"training": training, **values})


def known(model: nn.Module, items: list[Tokens]) -> float:
    return answer_probability(sequence_nll(model, items))


def logits(model: nn.Module, items: list[Tokens]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([item.ids for item in items])).logits


def test_alpha_0_has_forgotten_and_alpha_1_is_the_original(memorised) -> None:
    model, forget, retain = memorised.model, memorised.forget, memorised.retain
    original = copy.deepcopy(model)
    outcome = lora_null_(model, forget, retain, config(rate=1e-3), stop_at=0.3)
    assert outcome.training.reached
    assert outcome.report.reached
    everything = [*forget, *retain, *memorised.unseen]
    whole = logits(original, everything)
    with alpha_scope(model, 1.0):
        error = (logits(model, everything) - whole).norm() / whole.norm()
        assert known(model, forget) == pytest.approx(known(original, forget), abs=0.02)
    assert float(error) < 0.02
    assert known(model, forget) == pytest.approx(outcome.training.probability, abs=0.03)
    assert known(model, forget) < 0.33
    assert known(model, retain) > 0.8 * known(original, retain)


def test_the_streams_are_the_merged_weight_and_the_negated_adapter(memorised) -> None:
    model = memorised.model
    original = copy.deepcopy(model)
    settings = config(base=BaseConfig(storage="fp16"), ortho_dtype="float32")
    report = lora_null_(model, memorised.forget, memorised.retain, settings, stop_at=0.3).report
    for layer in report.layers:
        split, weight = model.get_submodule(layer.name), original.get_submodule(layer.name).weight
        assert isinstance(split, OrthoLinear)
        assert split.default_alpha.is_zero
        torch.testing.assert_close(split.effective_weight(1.0), weight, rtol=1e-3, atol=1e-4)
        # fp16 storage rounds to 2^-11, far below what the adapter moves.
        assert layer.final_error < 3e-4
        assert layer.base_error > 10 * layer.final_error
        assert torch.linalg.matrix_rank(split.ortho.dense()) == layer.rank


def test_within_the_budget_and_as_large_as_it_allows(memorised) -> None:
    settings = config(ortho_ratio=0.05, training=UnlearnConfig(max_epochs=1))
    report = lora_null_(memorised.model, memorised.forget, memorised.retain, settings).report
    assert [layer.name for layer in report.layers] == [
        f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in TARGETS
    ]
    for layer in report.layers:
        rank = int(0.05 * 64 * 128) // (64 + 128)  # 2
        assert (layer.kind, layer.rank) == ("low_rank", rank)
        assert layer.ortho_numel == rank * (64 + 128) <= 0.05 * layer.numel
        assert layer.density + (64 + 128) / layer.numel > 0.05
    assert report.density <= 0.05


def test_report(memorised) -> None:
    outcome = lora_null_(memorised.model, memorised.forget, memorised.retain, config(), stop_at=0.3)
    report = outcome.report
    plain = json.loads(json.dumps(report.to_dict()))
    assert {layer["method"] for layer in plain["layers"]} == {"lora-null"}
    assert plain["settings"]["method"]["kind"] == "LoraNullConfig"
    assert plain["settings"]["training"]["steps"] == outcome.training.steps
    assert report.target["probability"] == 0.3
    assert report.target["trained_probability"] == outcome.training.probability
    assert report.target["reached_probability"] == known(memorised.model, memorised.forget)
    assert report.forget_ppl["0.0"] > 2 * report.forget_ppl["1.0"]
    assert report.retain_ppl["0.0"] < 2 * report.retain_ppl["1.0"]
    assert "model.layers.0.mlp.gate_proj" in report.skipped
    assert not set(report.skipped) & {layer.name for layer in report.layers}
    assert report.seconds["train"] == outcome.training.training_seconds > 0
    assert "total (4)" in str(report)


def test_a_level_out_of_reach_is_told(memorised) -> None:
    training = UnlearnConfig(NPO(), 1e-6, max_epochs=1)
    settings = config(training=training)
    report = lora_null_(
        memorised.model, memorised.forget, memorised.retain, settings, stop_at=0.1
    ).report
    assert not report.reached
    assert report.target["reached_probability"] > 0.9


def test_in_bf16_and_with_conv1d(random_tokens, tiny_llama) -> None:
    import transformers

    settings = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_inner=64, n_layer=2, n_head=4, n_positions=64
    )
    gpt2 = transformers.GPT2LMHeadModel(settings).eval()
    for model, target in ((tiny_llama().to(torch.bfloat16), "down_proj"), (gpt2, "mlp.c_proj")):
        forget, retain = random_tokens([8] * 3, seed=1), random_tokens([8] * 6, seed=2)
        before = known(model, forget)
        training = UnlearnConfig(NPO(), 1e-2, max_epochs=5)
        chosen = LoraNullConfig(training=training, ortho_ratio=0.05, target_modules=(target,))
        lora_null_(model, forget, retain, chosen)
        assert known(model, forget) < before
        with alpha_scope(model, 1.0):
            assert known(model, forget) == pytest.approx(before, rel=0.05)


def test_adapter_adds_its_edit_to_the_weight(tiny_llama, random_tokens) -> None:
    model, items = tiny_llama(), random_tokens([6, 6])
    settings = LoraNullConfig(ortho_ratio=0.1, target_modules=TARGETS, scale=0.7)
    layers = select_linear(model, TARGETS)
    loras = {name: Lora.start(m, name, settings, i) for i, (name, m) in enumerate(layers.items())}
    plain = logits(model, items)
    with adapted(layers, loras):
        assert torch.equal(logits(model, items), plain)  # B is zero at the start
        for lora in loras.values():
            lora.up.data.normal_()
        moved = logits(model, items)
    merged = copy.deepcopy(model)
    for name, lora in loras.items():
        edit = lora.edit()
        merged.get_submodule(name).weight.add_(edit.left @ edit.right)
        torch.testing.assert_close(edit.left @ edit.right, 0.7 * (lora.up @ lora.down).detach())
    assert float((moved - plain).norm() / plain.norm()) > 0.1
    torch.testing.assert_close(logits(merged, items), moved, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, items), plain)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_modules": ("fc9",)}, ValueError, "target 'fc9' matches no module"),
        ({"target_modules": "input_layernorm"}, TypeError, "expected a linear layer"),
        ({"ortho_ratio": 0.02}, ValueError, r"ortho_ratio=0\.02 pays for no rank in .*0\.02344"),
    ],
)
def test_what_cannot_be_split_changes_nothing(
    memorised, snapshot, settings, error: type[Exception], message: str
) -> None:
    before = snapshot(memorised.model)
    with pytest.raises(error, match=message):
        lora_null_(memorised.model, memorised.forget, memorised.retain, config(**settings))
    assert_same(before, snapshot(memorised.model))


def test_bad_sets_and_a_failure_on_the_way_change_nothing(memorised, snapshot) -> None:
    model, forget, retain = memorised.model, memorised.forget, memorised.retain
    before = snapshot(model)
    with pytest.raises(ValueError, match="the forget set is empty"):
        lora_null_(model, [], retain, config())
    with pytest.raises(ValueError, match="the retain set is empty"):
        lora_null_(model, forget, [], config())
    with pytest.raises(ValueError, match="stop_at=0: expected a fraction"):
        lora_null_(model, forget, retain, config(), stop_at=0)

    def fails_at(wanted: str):
        def progress(stage: str, done: int, total: int) -> None:
            if wanted in stage:
                raise KeyboardInterrupt

        return progress

    for stage in ("epoch 2", "measure"):
        with pytest.raises(KeyboardInterrupt):
            lora_null_(model, forget, retain, config(), fails_at(stage), stop_at=0.5)
        assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ortho_ratio": 0.0}, ValueError, r"ortho_ratio=0\.0: expected a fraction"),
        ({"scale": -1.0}, ValueError, r"scale=-1\.0"),
        ({"ortho_dtype": "int8"}, ValueError, "ortho_dtype='int8': expected one of"),
        ({"training": UnlearnConfig(GradDiff())}, TypeError, "objective is GradDiff: the null"),
    ],
)
def test_bad_settings(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoraNullConfig(**settings)


def assert_same(before: dict, after: dict) -> None:
    assert after["modules"] == before["modules"]
    assert after["flags"] == before["flags"]
    assert after["grads"] == before["grads"]
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
