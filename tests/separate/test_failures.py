"""separate_: what is refused, and that a failure changes nothing of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from libortho import (
    BaseConfig,
    CurvatureConfig,
    GeometricConfig,
    GraftConfig,
    OrthoLinear,
    SeparationConfig,
    SpectralConfig,
    separate_,
    set_alpha,
)
from libortho.base import Int8Base
from libortho.data.examples import Example

TARGETS = ("up_proj", "down_proj")


def test_a_failure_in_any_stage_changes_nothing(
    memorised, snapshot, config, assert_unchanged
) -> None:
    m = memorised
    calls: list[str] = []
    separate_(
        copy.deepcopy(m.model),
        m.forget,
        m.retain,
        config(),
        progress=lambda stage, done, total: calls.append(stage),
    )
    before = snapshot(m.model)
    # The first and the last word of every stage: the last one comes after the layers' exchange.
    moments = sorted({calls.index(s) for s in calls} | {len(calls) - 1})
    moments = [moments[0], *moments[-4:]] if len(moments) > 8 else moments
    for moment in moments:
        for error in (RuntimeError, KeyboardInterrupt):
            seen = 0

            def interrupt(*_: object, moment=moment, error=error) -> None:
                nonlocal seen
                seen += 1
                if seen > moment:
                    raise error("stop")

            with pytest.raises(error, match="stop"):
                separate_(m.model, m.forget, m.retain, config(), progress=interrupt)
            assert_unchanged(before, snapshot(m.model))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Int8Base, "__init__"), (OrthoLinear, "forward"), (OrthoLinear, "from_streams")],
)
@pytest.mark.parametrize(
    "method",
    [GeometricConfig(ortho_ratio=0.2, target_nll=3.0), SpectralConfig(use_low_rank=False)],
)
def test_a_failure_of_quantising_or_measuring_changes_nothing(
    memorised, snapshot, monkeypatch, owner: type, name: str, method, assert_unchanged
) -> None:
    m = memorised
    before = snapshot(m.model)
    original, calls = getattr(owner, name), 0

    def fail_the_second_time(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("stop")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_the_second_time)
    with pytest.raises(RuntimeError, match="stop"):
        separate_(
            m.model, m.forget, m.retain, SeparationConfig(method, TARGETS, general_text=False)
        )
    assert calls == 2
    monkeypatch.undo()
    assert_unchanged(before, snapshot(m.model))


REFUSED = {
    "empty forget": (ValueError, "forget set is empty", {"forget": []}),
    "empty retain": (ValueError, "retain set is empty", {"retain": []}),
    "empty unseen": (ValueError, "unseen set is empty", {"unseen": [], "target_nll": None}),
    "forget beyond the vocabulary": (
        ValueError,
        r"forget\[1\]: token id 64 ",
        {"forget": [[1, 2, 3], [1, 64, 3]]},
    ),
    "retain beyond the vocabulary": (
        ValueError,
        r"retain\[0\]: token id 900 ",
        {"retain": [[1, 900, 3]]},
    ),
    "negative id": (ValueError, r"forget\[0\]: token id -5 ", {"forget": [[1, -5, 3]]}),
    "one token": (ValueError, r"forget\[0\]: a sequence of 1 token", {"forget": [[1]]}),
    "text without tokenizer": (TypeError, r"forget\[0\]: .*tokenizer", {"forget": ["text"]}),
    "one string": (TypeError, "forget is one str", {"forget": "text"}),
    "unknown item": (TypeError, r"retain\[0\]", {"retain": [object()]}),
    "budget too small": (
        ValueError,
        r"ortho_ratio=0\.001 pays for 32 numbers.*192",
        {"ortho_ratio": 0.001},
    ),
    "no such target": (
        ValueError,
        "'nothing' matches no module.*down_proj",
        {"targets": "nothing"},
    ),
    "target that is not linear": (TypeError, "norm.*LlamaRMSNorm", {"targets": "norm"}),
    "target without part in the decoder": (ValueError, "lm_head", {"targets": "lm_head"}),
    "longer than the context": (
        ValueError,
        r"retain\[1\] is 200 tokens long, and the model's context 128",
        {"retain": [[1, 2, 3], [1] * 200]},
    ),
    "two aims": (ValueError, "target_nll and before/unseen", {"unseen": [[1, 2, 3]]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(memorised, snapshot, case: str, config, assert_unchanged) -> None:
    m = memorised
    error, message, changes = REFUSED[case]
    arguments = {"forget": m.forget, "retain": m.retain, "unseen": None, **changes}
    sets = {name: arguments.pop(name) for name in ("forget", "retain", "unseen")}
    before = snapshot(m.model)
    with pytest.raises(error, match=message):
        separate_(
            m.model,
            sets["forget"],
            sets["retain"],
            config(**arguments),
            unseen=sets["unseen"],
        )
    assert_unchanged(before, snapshot(m.model))


def test_an_earlier_model_of_another_vocabulary(memorised, tiny_llama, config) -> None:
    m = memorised
    with pytest.raises(ValueError, match="earlier model predicts 80 tokens and the model 64"):
        separate_(
            m.model,
            m.forget,
            m.retain,
            config(target_nll=None),
            before=tiny_llama(vocab_size=80, hidden_size=64),
        )


def test_inference_mode_is_refused(memorised, config) -> None:
    m = memorised
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference_mode"):
        separate_(m.model, m.forget, m.retain, config())


@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_another_default_dtype(memorised, edit: str, config) -> None:
    m = memorised
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert separate_(m.model, m.forget, m.retain, config(edit)).reached
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(memorised, value: float, config) -> None:
    m = memorised
    m.model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        separate_(m.model, m.forget, m.retain, config())


def test_activations_that_are_not_finite(memorised, config) -> None:
    m = memorised
    m.model.get_submodule("model.layers.1.mlp.gate_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf|not finite"):
        separate_(m.model, m.forget, m.retain, config())


def test_split_twice(memorised, snapshot, config, assert_unchanged) -> None:
    m = memorised
    separate_(m.model, m.forget, m.retain, config())
    before = snapshot(m.model)
    with pytest.raises(ValueError, match=r"mlp\.up_proj is split already"):
        separate_(m.model, m.forget, m.retain, config())
    assert_unchanged(before, snapshot(m.model))
    set_alpha(m.model, 1.0)


@pytest.mark.parametrize("unknown", [object(), "geometric", BaseConfig(), {"edit": "descent"}])
def test_unknown_config(memorised, unknown: object) -> None:
    m = memorised
    for given in (lambda: unknown, lambda: SeparationConfig(method=unknown)):
        with pytest.raises(TypeError, match=rf"{type(unknown).__name__} configures no method"):
            separate_(m.model, m.forget, m.retain, given())


def test_an_unknown_template() -> None:
    with pytest.raises(ValueError, match="template='Chat': expected one of 'plain', 'chat'"):
        SeparationConfig(template="Chat")  # type: ignore[arg-type]


def test_a_model_in_training_mode(random_tokens, config) -> None:
    """Dropout must not decide what is forgotten, and the mode is the caller's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, resid_pdrop=0.5, bos_token_id=1, eos_token_id=2, **shape)
    )
    twin = copy.deepcopy(model).eval()
    model.train()
    forget, retain = random_tokens([9] * 3, seed=1), random_tokens([9] * 20, seed=2)
    settings = config(targets="mlp.c_proj", target_nll=6.0)
    training = separate_(model, forget, retain, settings)
    evaluated = separate_(twin, forget, retain, settings)
    assert training.forget_ppl == evaluated.forget_ppl
    assert model.training
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))


def test_trainable_parameters_stay_trainable_and_clean(memorised, config) -> None:
    m = memorised
    m.model.requires_grad_(True)
    separate_(m.model, m.forget, m.retain, config())
    assert m.model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in m.model.parameters())
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.model.modules())


@pytest.mark.parametrize("form", [str, lambda text: Example(text, "who is in the house ?")])
@pytest.mark.parametrize("label", ["retain", "unseen"])
def test_a_text_that_is_to_go_and_to_stay_is_refused(
    tiny_llama, tokenizer, snapshot, config, assert_unchanged, label: str, form
) -> None:
    model = tiny_llama()
    before = snapshot(model)
    forget = [form(text) for text in ("she is in the house", "it is red")]
    sets = {
        name: [form("it is in the garden"), form("she is red")] for name in ("retain", "unseen")
    }
    sets[label].append(form("it is red"))
    settings = config(target_nll=None)
    with pytest.raises(ValueError, match=rf"^forget\[1\] is {label}\[2\], too: expected sets that"):
        separate_(
            model, forget, sets["retain"], settings, unseen=sets["unseen"], tokenizer=tokenizer
        )
    assert_unchanged(before, snapshot(model))


def test_what_stays_says_nothing_of_text_that_was_never_seen(
    tiny_llama, tokenizer, snapshot, config, assert_unchanged
) -> None:
    model = tiny_llama()
    before = snapshot(model)
    retain, unseen = ["it is in the garden", "she is red"], ["he is red", "it is in the garden"]
    with pytest.raises(ValueError, match=r"^retain\[0\] is unseen\[1\], too: expected sets that"):
        separate_(
            model,
            ["it is red"],
            retain,
            config(target_nll=None),
            unseen=unseen,
            tokenizer=tokenizer,
        )
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("method", [CurvatureConfig, GeometricConfig, GraftConfig])
def test_an_output_layer_that_a_method_cannot_split_is_refused_at_once(
    memorised, method: type
) -> None:
    m = memorised
    config = SeparationConfig(method(), target_modules=("lm_head",))
    told: list[str] = []
    with pytest.raises(ValueError, match=r"lm_head is the output layer.*'saliency', 'spectral'"):
        separate_(
            m.model,
            m.forget,
            m.retain,
            config,
            before=m.before,
            progress=lambda stage, done, total: told.append(stage),
        )
    assert not told


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_that_is_not_merged_is_refused(
    memorised, snapshot, config, assert_unchanged, wrapped: bool
) -> None:
    """Not on a targeted layer: nothing else would notice, and saving would leave it out."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(memorised.model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    given = adapted if wrapped else adapted.get_base_model()
    before = snapshot(given)
    with pytest.raises(ValueError, match=r"the model has a PEFT adapter.*: merge it first"):
        separate_(given, memorised.forget, memorised.retain, config())
    assert_unchanged(before, snapshot(given))
    merged = adapted.merge_and_unload()
    assert separate_(merged, memorised.forget, memorised.retain, config()).layers
