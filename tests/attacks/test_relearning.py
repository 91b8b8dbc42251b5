"""Relearning: what is taught, how its end is told, and a memory that merely hides."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from libortho.attacks import Subject
from libortho.attacks.relearning import (
    RECALLED,
    STEPS,
    RelearningConfig,
    crossing,
    lessons_of,
    relearning,
)
from libortho.data.sampling import evenly
from libortho.evaluation.finetuned import load_model

CONFIG = RelearningConfig(
    shares=(0.4,), retain_questions=3, steps=8, every=3, threshold=0.5, learning_rate=2e-3
)


def test_what_is_taught_and_what_is_asked(data) -> None:
    lessons, missing = lessons_of(data, dataclasses.replace(CONFIG, shares=(0.05, 0.4, 1.0)))
    forget, retain = data.encode(data.forget), data.encode(data.retain)
    one, two = lessons["5% of the forget set"], lessons["40% of the forget set"]
    assert one.taught == forget[:1]
    assert one.asked == forget[1:]
    assert two.taught == evenly(forget, 2)
    assert two.asked == [item for item in forget if item not in two.taught]
    assert len(two.asked) == 3
    assert missing == {"100% of the forget set": "of 5 question(s) nothing is left to be recalled"}
    assert lessons["retain questions"].taught == evenly(retain, CONFIG.retain_questions)
    assert lessons["retain questions"].asked == forget
    assert len(lessons["unrelated text"].taught) == len(data.unrelated)
    few = lessons_of(data, dataclasses.replace(CONFIG, retain_questions=0, unrelated=False))[0]
    assert list(few) == ["40% of the forget set"]


def test_a_model_that_knows_is_not_trained(subjects, data, quiet, unharmed) -> None:
    check = unharmed(subjects["alpha 1"])
    found = relearning(subjects["alpha 1"], data, CONFIG, quiet)
    check()
    steps = {score.name: score for score in found.scores if score.measure == STEPS}
    assert len(steps) == 3
    for name, score in steps.items():
        assert score.value == 0.0, name
        assert score.details["reached"]
        assert len(score.details["curve"]) == 1


def test_one_that_never_knew_learns_what_it_is_taught(
    subjects, data, quiet, unharmed, monkeypatch
) -> None:
    from libortho.attacks import relearning as module

    trained = []
    dense = subjects["reference"].dense
    monkeypatch.setattr(
        subjects["reference"], "dense", lambda: trained.append(dense()) or trained[-1]
    )
    check = unharmed(subjects["reference"])
    config = dataclasses.replace(CONFIG, shares=(0.4,), retain_questions=0, unrelated=False)
    found = relearning(subjects["reference"], data, config, quiet)
    check()
    steps, recall = found.scores
    assert (steps.measure, recall.measure) == (STEPS, RECALLED)
    curve = steps.details["curve"]
    assert [at for at, _ in curve] == [0, 3, 6, 8]
    assert steps.details["taught"] == 2
    assert steps.details["asked"] == 3
    assert recall.value == max(p for _, p in curve)
    assert not steps.details["reached"]
    assert steps.value == 8.0
    lesson = module.lessons_of(data, config)[0]["40% of the forget set"]
    assert module._recall(trained[0], lesson.taught) > module._recall(
        subjects["reference"].model, lesson.taught
    )


def test_training_that_diverges_is_said_of_its_lesson_alone(
    subjects, data, quiet, monkeypatch
) -> None:
    from libortho.attacks import relearning as module

    train, taught = module._train, len(data.unrelated)

    def diverging(model, items, config):
        if len(items) == taught:
            raise FloatingPointError("the gradient's norm is nan: training diverged")
        yield from train(model, items, config)

    monkeypatch.setattr(module, "_train", diverging)
    assert taught != CONFIG.retain_questions
    found = relearning(subjects["reference"], data, CONFIG, quiet)
    assert found.missing == {"unrelated text": "the gradient's norm is nan: training diverged"}
    assert [s.name for s in found.scores if s.measure == STEPS] == [
        "40% of the forget set",
        "retain questions",
    ]


def test_a_memory_that_merely_hides_comes_back(world, data, quiet) -> None:
    """The full model, with its final norm turned down: nothing was taken out of it.

    It is never taught the forget set.
    """
    model = load_model(str(world.full))
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)
    subject = Subject("hides", model, ())
    config = dataclasses.replace(
        CONFIG, shares=(), retain_questions=6, unrelated=False, steps=30, learning_rate=3e-3
    )
    found = relearning(subject, data, config, quiet)
    assert found.scores[0].details["curve"][0][1] < 0.4
    assert found.scores[0].details["reached"]
    assert 0 < found.scores[0].value < 30


def test_crossing() -> None:
    curve = [(0, 0.1), (5, 0.2), (10, 0.4), (15, 0.3)]
    assert crossing(curve, 0.3) == pytest.approx(7.5)
    assert crossing(curve, 0.4) == 10.0
    assert crossing(curve, 0.05) == 0.0
    with pytest.raises(ValueError, match=r"ends below 0\.5: it reaches 0\.4"):
        crossing(curve, 0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shares": (0.0,)}, "shares=0.0"),
        ({"threshold": 1.2}, "threshold=1.2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"retain_questions": -1}, "retain_questions=-1"),
        ({"steps": 0}, "steps=0"),
        ({"every": 0}, "every=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_configs_that_cannot_be(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RelearningConfig(**change)
