"""separate_: what its report says, how the streams are stored, and that a seed decides."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch

from libortho import BaseConfig, SpectralConfig, alpha_scope, separate_, separation_report
from libortho.alpha import ortho_layers
from libortho.base import quantize
from libortho.judgement import judge
from libortho.methods.edits import Metric
from libortho.report import SeparationReport
from libortho.scoring import perplexity, sequence_nll
from libortho.solvers.problem import Journal, Problem


def test_report(memorised, config, split_names) -> None:
    m = memorised
    layers = split_names(m.model)
    report = separate_(m.model, m.forget, m.retain, config())
    assert [layer.name for layer in report.layers] == layers
    text = str(report)
    assert all(name in text for name in layers)
    assert all(re.sub(r"\d+", "*", name) in text for name in report.skipped)
    assert "not split: model.layers.*.self_attn.q_proj (Linear, not targeted; 2 of them)" in text
    assert "not split: lm_head (" in text
    (target,) = (line for line in text.splitlines() if line.startswith("target "))
    assert f"reached_probability: {report.target['reached_probability']:.4g}" in target
    assert not re.search(r"\d\.\d{7}", target)
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= set(report.skipped)
    assert set(report.skipped).isdisjoint(layers)
    assert report.skipped["model.embed_tokens.weight"].endswith("of Embedding, no linear layer")

    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in plain["layers"]] == layers
    assert plain["settings"]["method"]["ortho_ratio"] == 0.2
    assert plain["settings"]["method"]["kind"] == "GeometricConfig"
    assert plain["settings"]["template"] == "plain"
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


def test_errors_in_the_report_are_those_of_the_weights(memorised, config, split_names) -> None:
    m = memorised
    weights = {n: m.model.get_submodule(n).weight.double() for n in split_names(m.model)}
    report = separate_(m.model, m.forget, m.retain, config())
    for layer in report.layers:
        weight, split = weights[layer.name], m.model.get_submodule(layer.name)
        for alpha, error in ((0.0, layer.base_error), (1.0, layer.final_error)):
            difference = split.effective_weight(alpha, torch.float64) - weight
            assert error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-3)


def test_progress_is_told(memorised, config) -> None:
    m = memorised
    calls: list[tuple[str, int, int]] = []
    separate_(m.model, m.forget, m.retain, config(), progress=lambda *call: calls.append(call))
    assert len(calls) > 5
    assert all(isinstance(stage, str) and 0 <= done <= total for stage, done, total in calls)
    assert calls[-1][1] == calls[-1][2]


def test_same_seed_same_split(memorised, config) -> None:
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
def test_storage(memorised, storage: str, ortho_dtype: str, config, known) -> None:
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


def test_int4_is_rounded_against_the_retain_data(memorised, monkeypatch, config, known) -> None:
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
    # Rounded whenever the search looks, and so is the split in the end.
    assert len(layers) == 4 < len(moments)
    for (name, layer), moment in zip(layers.items(), moments[-4:], strict=True):
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


def test_int8_reads_no_moment(memorised, monkeypatch, config) -> None:
    m = memorised
    monkeypatch.setattr(Metric, "moment", lambda self: pytest.fail("a product for nothing"))
    separate_(m.model, m.forget, m.retain, config())


def test_nothing_is_claimed_that_was_not_measured(memorised, config) -> None:
    m = memorised
    assert separate_(m.model, m.forget, m.retain, config()).reached
    assert separation_report(m.model).reached is None
    assert not separation_report(m.model).target


def test_a_report_of_no_layers_is_a_report() -> None:
    report = SeparationReport(layers=())
    assert report.to_dict()["totals"]["density"] == 0
    assert "total (0)" in str(report)


@pytest.mark.parametrize(("full", "said"), [(0.9, False), (0.889, False), (0.85, True)])
def test_a_memory_that_the_split_did_not_keep_is_said(memorised, full: float, said: bool) -> None:
    m = memorised
    problem = Problem(m.model, {}, {}, m.forget, m.retain, [], None, Journal(), known=0.9)
    reached = judge(problem, SpectralConfig(), {"0.0": 0.1, "1.0": full})
    assert reached
    assert any("memory is NOT whole" in text for text in problem.journal.warnings) == said
    assert problem.journal.target["original_probability"] == 0.9


def test_the_probability_before_the_split_is_in_the_report(memorised, config, known) -> None:
    m = memorised
    before = known(m.model, m.forget)
    report = separate_(m.model, m.forget, m.retain, config())
    assert report.target["original_probability"] == pytest.approx(before, rel=1e-5)
