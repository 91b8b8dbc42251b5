"""Which answers of which questions are scored, and one sweep of a model over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.data.examples import Example
from libortho.data.sampling import even_index
from libortho.data.tokens import Template, Tokens, encode
from libortho.scoring import TokenStatistics, token_statistics

ANSWER, PARAPHRASED, PERTURBED = "answer", "paraphrased answer", "perturbed answer"
"""The kinds of answers that an example may have; perturbed ones are several."""


class Part:
    """A set of questions, or some of them.

    Attributes:
        name: the set's.
        examples: those that are asked.
        index: where each of them stands in the whole set.
        whole: how many questions the whole set has.
    """

    def __init__(self, name: str, examples: Sequence[Example], limit: int | None) -> None:
        self.name, self.whole = name, len(examples)
        self.index = even_index(self.whole, self.whole if limit is None else limit)
        self.examples = [examples[i] for i in self.index]

    def answers(self, kind: str) -> list[tuple[str, ...]]:
        """The answers of a kind to each question."""
        if kind == PERTURBED:
            return [e.perturbed_answers for e in self.examples]
        if kind == PARAPHRASED:
            return [
                () if e.paraphrased_answer is None else (e.paraphrased_answer,)
                for e in self.examples
            ]
        return [(e.answer,) for e in self.examples]

    def lacks(self, kind: str) -> str | None:
        """Why answers of a kind cannot be scored; None if every question has one."""
        if not self.examples:
            return f"the set {self.name} is empty"
        without = sum(not answers for answers in self.answers(kind))
        return (
            f"{without} of {len(self.examples)} questions of {self.name} have no {kind}"
            if without
            else None
        )


@dataclass(frozen=True)
class Scored:
    """What the sweep found.

    Attributes:
        statistics: (set, kind) -> per question, per answer; kinds that a set lacks are left out.
        texts: set -> what the predicted tokens of each question's answer say, special tokens left
            out.
    """

    statistics: dict[tuple[str, str], list[list[TokenStatistics]]]
    texts: dict[str, list[str]]

    def losses(self, part: Part, kind: str) -> list[list[float]]:
        """Mean NLL per token, nats, of each answer to each question."""
        return [
            [float(s.nll.double().mean()) for s in answers]
            for answers in self.statistics[part.name, kind]
        ]

    def answer(self, part: Part) -> list[TokenStatistics]:
        """The statistics of each question's answer."""
        return [statistics for (statistics,) in self.statistics[part.name, ANSWER]]

    def nll(self, part: Part, kind: str) -> list[Tensor]:
        """NLL of each token of each answer."""
        return [s.nll for answers in self.statistics[part.name, kind] for s in answers]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[tuple[Part, str]],
    template: Template,
    progress: Callable[[int, int], None],
) -> Scored:
    """Run a model over the wanted answers, each sequence once however often it is wanted."""
    places: dict[Tokens, int] = {}
    found: dict[tuple[str, str], list[list[int]]] = {}
    texts: dict[str, list[str]] = {}
    for part, kind in wanted:
        if part.lacks(kind) is not None:
            continue
        items = [
            [encode(Example(answer, e.question), tokenizer, template) for answer in answers]
            for e, answers in zip(part.examples, part.answers(kind), strict=True)
        ]
        found[part.name, kind] = [
            [places.setdefault(item, len(places)) for item in answers] for answers in items
        ]
        if kind == ANSWER:
            texts[part.name] = [
                str(tokenizer.decode(list(item.ids[item.prompt :]), skip_special_tokens=True))
                for (item,) in items
            ]
    statistics = token_statistics(model, list(places), progress=progress)
    return Scored(
        {
            key: [[statistics[at] for at in answers] for answers in rows]
            for key, rows in found.items()
        },
        texts,
    )
