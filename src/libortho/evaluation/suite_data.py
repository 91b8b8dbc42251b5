"""What a model is measured on: five sets of questions, and general text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from libortho.data.examples import Example
from libortho.data.tasks import Task


@dataclass(frozen=True)
class SuiteData:
    """What a model is measured on.

    Attributes:
        forget: questions that are to be forgotten.
        retain: questions that were memorised with them and are to be kept.
        holdout: questions like these that no model has seen: the non-members of membership
            inference. May be empty.
        real_authors, world_facts: general knowledge. May be empty.
        wikitext: running text, for perplexity; None to leave it out.
        absent: why a set is empty, by its name above.

    Raises:
        ValueError: no forget or retain question, or an example without a question.
    """

    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    holdout: tuple[Example, ...] = ()
    real_authors: tuple[Example, ...] = ()
    world_facts: tuple[Example, ...] = ()
    wikitext: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, examples in self.sets().items():
            if not examples and name in ("forget", "retain"):
                raise ValueError(f"the {name} set is empty: expected at least one question")
            for position, example in enumerate(examples):
                if example.question is None:
                    raise ValueError(
                        f"{name}[{position}] has no question ({example.answer[:40]!r}): "
                        "the suite measures answers to questions"
                    )

    def sets(self) -> dict[str, tuple[Example, ...]]:
        """The five sets of questions, by name."""
        names = ("forget", "retain", "holdout", "real_authors", "world_facts")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of_task(cls, task: Task, wikitext: str | None = None) -> SuiteData:
        """A task's sets; of its retain set the pairs with perturbed answers, if it has such."""
        complete = tuple(x for x in task.retain if x.perturbed_answers and x.paraphrased_answer)
        return cls(
            forget=task.forget,
            retain=complete or task.retain,
            holdout=task.holdout,
            real_authors=task.real_authors,
            world_facts=task.world_facts,
            wikitext=wikitext,
            absent=task.absent,
        )
