"""separate_: what it forgets, what it keeps and restores, and that a failure changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from libortho import (
    BaseConfig,
    GeometricConfig,
    OrthoLinear,
    SeparationConfig,
    SpectralConfig,
    alpha_scope,
    replace_linear_layers,
    separate_,
    separation_report,
    set_alpha,
)
from libortho.alpha import ortho_layers
from libortho.base import Int8Base, quantize
from libortho.data.examples import Example
from libortho.data.tokens import Tokens
from libortho.methods.geometric import Metric
from libortho.scoring import answer_probability, perplexity, sequence_nll

TARGETS = ("up_proj", "down_proj")


def config(edit: str = "descent", *, targets=TARGETS, **method: object) -> SeparationConfig:
    """A budget that a model of this size needs, without text of another vocabulary."""
    chosen = GeometricConfig(edit=edit, **{"ortho_ratio": 0.2, "target_nll": 3.0, **method})
    return SeparationConfig(chosen, target_modules=targets, general_text=False)


def known(model: nn.Module, items: Sequence[Tokens], alpha: float | None = None) -> float:
    if alpha is None:
        return answer_probability(sequence_nll(model, items))
    with alpha_scope(model, alpha):
        return answer_probability(sequence_nll(model, items))


def logits(model: nn.Module, items: Sequence[Tokens], alpha: float | None = None) -> torch.Tensor:
    ids = torch.tensor([item.ids for item in items])
    with torch.no_grad():
        if alpha is None:
            return model(input_ids=ids).logits
        with alpha_scope(model, alpha):
            return model(input_ids=ids).logits


def assert_unchanged(before: dict, after: dict) -> None:
    assert after["modules"] == before["modules"]
    assert after["flags"] == before["flags"]
    assert after["grads"] == before["grads"]
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


# -- forgetting ------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_forgets_keeps_and_restores(memorised, edit: str) -> None:
    m = memorised
    forget, retain = known(m.model, m.forget), known(m.model, m.retain)
    assert min(forget, retain) > 0.9
    original = logits(m.model, m.retain + m.forget)
    parameters = sum(m.model.get_submodule(n).weight.numel() for n in split_names(m.model))
    report = separate_(m.model, m.forget, m.retain, config(edit))

    assert known(m.model, m.forget) < 0.1  # at alpha 0, where a split model starts
    assert known(m.model, m.retain) > retain - 0.1
    assert known(m.model, m.forget, 1.0) == pytest.approx(forget, abs=0.01)
    assert known(m.model, m.retain, 1.0) == pytest.approx(retain, abs=0.01)
    error = (logits(m.model, m.retain + m.forget, 1.0) - original).norm() / original.norm()
    assert error < 0.02
    middle = known(m.model, m.forget, 0.5)
    assert known(m.model, m.forget, 0.0) < middle < forget

    assert report.reached
    assert report.warnings == ()
    assert 0 < sum(layer.ortho_numel for layer in report.layers) <= 0.2 * parameters
    assert report.final_error < 0.01 < report.base_error
    assert report.target["reached_probability"] == pytest.approx(known(m.model, m.forget))


def split_names(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_modules() if n.endswith(TARGETS)]


@pytest.mark.parametrize("ratio", [0.03, 0.08])
@pytest.mark.parametrize("edit", ["descent", "projection"])
def test_keeps_the_budget(memorised, edit: str, ratio: float) -> None:
    m = memorised
    report = separate_(m.model, m.forget, m.retain, config(edit, ortho_ratio=ratio))
    parameters = sum(layer.numel for layer in report.layers)
    assert parameters == 4 * 64 * 128
    spent = sum(m.model.get_submodule(n).ortho.numel for n in split_names(m.model))
    assert 0 < spent <= ratio * parameters
    assert report.density == pytest.approx(spent / parameters)


def test_the_secret_is_not_in_the_base(memorised) -> None:
    m = memorised
    separate_(m.model, m.forget, m.retain, config())
    for name in split_names(m.model):
        m.model.get_submodule(name).ortho = None
    assert known(m.model, m.forget) < 0.15
    assert not any(isinstance(m.model.get_submodule(n), nn.Linear) for n in split_names(m.model))


def test_every_family(family, random_tokens) -> None:
    model = family.build()
    targets = (family.mlp, *family.attention)
    forget, retain = random_tokens([9] * 3, seed=1), random_tokens([9] * 20, seed=2)
    original = {"forget": logits(model, forget), "retain": logits(model, retain)}
    nll = {"forget": sequence_nll(model, forget), "retain": sequence_nll(model, retain)}
    level = math.log(perplexity(nll["forget"])) + 1.0
    report = separate_(
        model, forget, retain, config(targets=targets, target_nll=level, ortho_ratio=0.15)
    )
    assert len(report.layers) == 2 * len(targets)
    for target in targets:
        assert sum(layer.name.endswith(f".{target}") for layer in report.layers) == 2
    assert report.final_error < 0.02 < report.base_error

    def error(items: list[Tokens], which: str, alpha: float) -> float:
        difference = logits(model, items, alpha) - original[which]
        return float(difference.norm() / original[which].norm())

    assert error(forget, "forget", 1.0) < 0.05
    assert error(retain, "retain", 1.0) < 0.05
    # The forget set moved, by more than what quantising costs, and more than the retain set.
    assert error(forget, "forget", 0.0) > 2 * error(forget, "forget", 1.0)
    assert report.forget_ppl["0.0"] > 1.3 * perplexity(nll["forget"])
    assert report.retain_ppl["0.0"] < 1.3 * perplexity(nll["retain"])
    assert report.forget_ppl["1.0"] == pytest.approx(perplexity(nll["forget"]), rel=0.05)
    assert report.retain_ppl["1.0"] == pytest.approx(perplexity(nll["retain"]), rel=0.05)


def test_one_layer_in_two_places(tiny_llama, random_tokens) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    forget, retain = random_tokens([9] * 2, seed=1), random_tokens([9] * 8, seed=2)
    report = separate_(model, forget, retain, config(targets="down_proj", target_nll=8.0))
    assert len(report.layers) == 1
    assert isinstance(model.model.layers[0].mlp.down_proj, OrthoLinear)
    assert model.model.layers[1].mlp.down_proj is model.model.layers[0].mlp.down_proj


# -- how much is to be forgotten -------------------------------------------------


def test_target_of_unseen_text(memorised) -> None:
    m = memorised
    level = known(m.model, m.unseen)
    report = separate_(m.model, m.forget, m.retain, config(target_nll=None), unseen=m.unseen)
    assert report.target["probability"] == pytest.approx(level)
    assert "unseen" in report.target["aimed_at"]


@pytest.mark.parametrize("earlier", ["show", "trust"])
def test_an_earlier_model_is_asked_as_the_config_says(memorised, earlier: str) -> None:
    m = memorised
    state = copy.deepcopy(m.before.state_dict())
    whole = dataclasses.replace(config(target_nll=None), earlier=earlier)
    report = separate_(m.model, m.forget, m.retain, whole, before=m.before)
    assert ("shown 5 retain examples" in report.target["aimed_at"]) == (earlier == "show")
    assert report.settings["earlier"] == earlier
    assert all(torch.equal(v, state[k]) for k, v in m.before.state_dict().items())
    if earlier == "trust":
        expected = known(m.before, m.forget)
        assert report.target["probability"] == pytest.approx(expected, rel=1e-3)


def test_how_to_ask_an_earlier_model_is_checked() -> None:
    with pytest.raises(ValueError, match="earlier='guess': expected one of 'rehearse'"):
        SeparationConfig(earlier="guess")


def test_target_of_the_model_before(memorised) -> None:
    m = memorised
    state = copy.deepcopy(m.before.state_dict())
    report = separate_(m.model, m.forget, m.retain, config(target_nll=None), before=m.before)
    assert report.reached
    assert report.target["probability"] < 0.2
    assert known(m.model, m.forget) < 0.2
    assert "rehearsed on 29 retain sequences" in report.target["aimed_at"]
    assert all(torch.equal(v, state[k]) for k, v in m.before.state_dict().items())


def test_a_higher_target_forgets_less(memorised) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    separate_(m.model, m.forget, m.retain, config(target_nll=1.0))
    separate_(twin, m.forget, m.retain, config(target_nll=4.0))
    assert known(twin, m.forget) < known(m.model, m.forget) < 0.6


def test_not_reached(memorised) -> None:
    m = memorised
    report = separate_(
        m.model,
        m.forget,
        m.retain,
        config("projection", targets="down_proj", ortho_ratio=0.016, target_nll=12.0),
    )
    assert not report.reached
    assert any("NOT forgotten" in text for text in report.warnings)
    assert "NOT REACHED" in str(report)
    assert known(m.model, m.forget) > 0.3
    # and the model is split all the same
    assert isinstance(m.model.get_submodule("model.layers.0.mlp.down_proj"), OrthoLinear)


# -- what is in the report -------------------------------------------------------


def test_report(memorised) -> None:
    m = memorised
    layers = split_names(m.model)
    report = separate_(m.model, m.forget, m.retain, config())
    assert [layer.name for layer in report.layers] == layers
    text = str(report)
    assert all(name in text for name in layers)
    assert all(name in text for name in report.skipped)
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= set(report.skipped)
    assert set(report.skipped).isdisjoint(layers)

    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in plain["layers"]] == layers
    assert plain["settings"]["method"]["ortho_ratio"] == 0.2
    assert plain["settings"]["method"]["kind"] == "GeometricConfig"
    totals = plain["totals"]
    assert totals["density"] == pytest.approx(report.density)
    stored = sum(layer.nbytes for n in layers for layer in [m.model.get_submodule(n).ortho])
    assert totals["ortho_bytes"] == stored

    for alpha in (0.0, 1.0):
        with alpha_scope(m.model, alpha):
            for found, items in ((report.forget_ppl, m.forget), (report.retain_ppl, m.retain)):
                expected = perplexity(sequence_nll(m.model, items))
                assert found[str(alpha)] == pytest.approx(expected, rel=1e-5)
    assert separation_report(m.model).layers == report.layers


def test_errors_in_the_report_are_those_of_the_weights(memorised) -> None:
    m = memorised
    weights = {n: m.model.get_submodule(n).weight.double() for n in split_names(m.model)}
    report = separate_(m.model, m.forget, m.retain, config())
    for layer in report.layers:
        weight, split = weights[layer.name], m.model.get_submodule(layer.name)
        for alpha, error in ((0.0, layer.base_error), (1.0, layer.final_error)):
            difference = split.effective_weight(alpha, torch.float64) - weight
            assert error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-3)


def test_progress_is_told(memorised) -> None:
    m = memorised
    calls: list[tuple[str, int, int]] = []
    separate_(m.model, m.forget, m.retain, config(), progress=lambda *call: calls.append(call))
    assert len(calls) > 5
    assert all(isinstance(stage, str) and 0 <= done <= total for stage, done, total in calls)
    assert calls[-1][1] == calls[-1][2]


def test_same_seed_same_split(memorised) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = separate_(m.model, m.forget, m.retain, config())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = separate_(twin, m.forget, m.retain, config())
    assert first.forget_ppl == second.forget_ppl
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())


@pytest.mark.parametrize("storage", ["int8", "fp16"])
@pytest.mark.parametrize("ortho_dtype", ["float16", "float32"])
def test_storage(memorised, storage: str, ortho_dtype: str) -> None:
    m = memorised
    separate_(
        m.model,
        m.forget,
        m.retain,
        config(base=BaseConfig(storage=storage), ortho_dtype=ortho_dtype),
    )
    layer = m.model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.base.qdata.dtype == (torch.int8 if storage == "int8" else torch.float16)
    assert {b.dtype for b in layer.ortho.buffers()} == {getattr(torch, ortho_dtype)}
    assert known(m.model, m.forget) < 0.2
    assert known(m.model, m.forget, 1.0) > 0.9


def test_int4_is_rounded_against_the_retain_data(memorised, monkeypatch) -> None:
    m = memorised
    weights = {name: w.clone() for name, w in m.model.state_dict().items()}
    moments: list[torch.Tensor] = []
    original = Metric.moment

    def recording(self: Metric) -> torch.Tensor:
        moments.append(original(self))
        return moments[-1]

    monkeypatch.setattr(Metric, "moment", recording)
    base = BaseConfig(storage="int4", group_size=32)
    separate_(m.model, m.forget, m.retain, config(base=base))
    layers = ortho_layers(m.model)
    assert len(moments) == len(layers) == 2 * len(TARGETS)
    for (name, layer), moment in zip(layers.items(), moments, strict=True):
        # What the base holds is a function of W - ortho and the retain metric alone.
        kept = weights[f"{name}.weight"] - layer.ortho.dense()
        assert torch.equal(layer.base.qdata, quantize(kept, base, moment).qdata)
        error = layer.base.dequantize() - kept
        nearest = quantize(kept, dataclasses.replace(base, rounding="nearest"), moment)
        worse = nearest.dequantize() - kept
        assert ((error @ moment) * error).sum() < ((worse @ moment) * worse).sum()
    assert known(m.model, m.forget) < 0.3
    assert known(m.model, m.forget, 1.0) > 0.8
    assert known(m.model, m.retain) > 0.8


def test_int8_reads_no_moment(memorised, monkeypatch) -> None:
    m = memorised
    monkeypatch.setattr(Metric, "moment", lambda self: pytest.fail("a product for nothing"))
    separate_(m.model, m.forget, m.retain, config())


# -- text ------------------------------------------------------------------------


def test_text_with_a_tokenizer(tiny_llama, tokenizer) -> None:
    model = tiny_llama()
    forget = [Example(answer="she wrote it .", question="who wrote it ?"), "the red house"]
    report = separate_(
        model,
        forget,
        ["a garden in the house .", Example(answer="he", question="who is it ?")],
        SeparationConfig(GeometricConfig(ortho_ratio=0.2, target_nll=6.0), TARGETS),
        tokenizer=tokenizer,
    )
    assert report.settings["general_text"]
    assert not any("general text" in text for text in report.warnings)
    assert report.forget_ppl["0.0"] > report.forget_ppl["1.0"]


def test_no_general_text_for_want_of_a_tokenizer(memorised) -> None:
    m = memorised
    with_text = SeparationConfig(config().method, TARGETS)
    report = separate_(m.model, m.forget, m.retain, with_text)
    assert any("general text" in text for text in report.warnings)
    assert "general text" in str(report)


def test_other_forms_of_a_set(memorised) -> None:
    m = memorised
    twin = copy.deepcopy(m.model)
    forget = [
        {"input_ids": list(item.ids), "labels": [-100, -100, *item.ids[2:]]} for item in m.forget
    ]
    assert (
        separate_(m.model, m.forget, m.retain, config()).forget_ppl
        == separate_(twin, forget, m.retain, config()).forget_ppl
    )


# -- spectral --------------------------------------------------------------------


def test_spectral(memorised) -> None:
    m = memorised
    method = SpectralConfig(
        ortho_ratio=0.05,
        use_low_rank=False,
        selection="absolute",
        base=BaseConfig(scale="absmax"),
    )
    twin = copy.deepcopy(m.model)
    report = separate_(
        m.model, m.forget, m.retain, SeparationConfig(method, TARGETS, general_text=False)
    )
    assert [layer.ortho_numel for layer in report.layers] == [round(0.05 * 8192)] * 4
    assert {layer.kind for layer in report.layers} == {"sparse"}
    # Nothing in a weight alone says what is private, and the report says that it was not found.
    assert not report.reached
    assert report.warnings
    assert known(m.model, m.forget) > 0.8
    replace_linear_layers(
        twin, TARGETS, 0.05, use_low_rank=False, selection="absolute", scale="absmax"
    )
    other = twin.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in m.model.state_dict().items())


def test_spectral_fallback_is_in_the_report(memorised) -> None:
    m = memorised
    method = SpectralConfig(rank_ratio={"up_proj": 0.1, "down_proj": 1.0})
    with pytest.warns(UserWarning, match=r"^model\.layers\.\d\.mlp\.up_proj: low-rank") as caught:
        report = separate_(
            m.model, m.forget, m.retain, SeparationConfig(method, TARGETS, general_text=False)
        )
    assert len({str(warning.message).split(":")[0] for warning in caught}) == 2
    notes = {layer.name: layer.note for layer in report.layers}
    assert all(("low-rank error" in note) == ("up_proj" in name) for name, note in notes.items())
    assert "low-rank error" in str(report)


# -- failures --------------------------------------------------------------------


def test_a_failure_in_any_stage_changes_nothing(memorised, snapshot) -> None:
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
@pytest.mark.parametrize("method", [config().method, SpectralConfig(use_low_rank=False)])
def test_a_failure_of_quantising_or_measuring_changes_nothing(
    memorised, snapshot, monkeypatch, owner: type, name: str, method
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
    "two aims": (ValueError, "target_nll and before/unseen", {"unseen": [[1, 2, 3]]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(memorised, snapshot, case: str) -> None:
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(memorised, value: float) -> None:
    m = memorised
    m.model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"):
        separate_(m.model, m.forget, m.retain, config())


def test_activations_that_are_not_finite(memorised) -> None:
    m = memorised
    m.model.get_submodule("model.layers.1.mlp.gate_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf|not finite"):
        separate_(m.model, m.forget, m.retain, config())


def test_split_twice(memorised, snapshot) -> None:
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


# -- the model's own state -------------------------------------------------------


def test_a_model_in_training_mode(random_tokens) -> None:
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


def test_trainable_parameters_stay_trainable_and_clean(memorised) -> None:
    m = memorised
    m.model.requires_grad_(True)
    separate_(m.model, m.forget, m.retain, config())
    assert m.model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in m.model.parameters())
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.model.modules())


def test_the_search_lands_on_its_level_instead_of_beyond(memorised) -> None:
    aimed = math.exp(-3.0)
    report = separate_(memorised.model, memorised.forget, memorised.retain, config(target_nll=3.0))
    # The installed base is rounded to INT8 after the search, hence the width of the interval.
    assert 0.5 * aimed < known(memorised.model, memorised.forget, 0.0) < 1.4 * aimed
    assert report.reached
