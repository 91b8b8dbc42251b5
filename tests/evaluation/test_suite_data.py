"""What a model is measured on: a task's sets, and sets that are refused."""

from __future__ import annotations

import dataclasses

import pytest

from libortho.data import Example, Task
from libortho.evaluation.suite import SuiteConfig
from libortho.evaluation.suite_data import SuiteData


def test_data_of_a_task(data) -> None:
    task = Task(
        name="t",
        forget=data.forget,
        retain=(*data.retain, Example("a house", "where ?")),
        unseen=data.real_authors,
        source="",
        real_authors=data.real_authors,
        absent={"holdout": "nobody is left", "world_facts": "no file"},
    )
    made = SuiteData.of_task(task, "text")
    assert made.retain == data.retain  # what has no perturbed answers is not measured
    assert made.wikitext == "text"
    assert made.holdout == ()  # what says how far to forget is not what that is measured on
    assert made.absent == {"holdout": "nobody is left", "world_facts": "no file"}
    plain = dataclasses.replace(task, retain=(Example("a house", "where ?"),))
    assert SuiteData.of_task(plain).retain == plain.retain


def test_bad_input(data) -> None:
    with pytest.raises(ValueError, match="the retain set is empty"):
        SuiteData(data.forget, ())
    with pytest.raises(ValueError, match=r"forget\[0\] has no question \('a text'\)"):
        SuiteData((Example("a text"),), data.retain)
    with pytest.raises(ValueError, match="limit=0"):
        SuiteConfig(limit=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        SuiteConfig(max_new_tokens=0)
