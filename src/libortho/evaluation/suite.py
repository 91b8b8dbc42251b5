"""The TOFU benchmark of one model: every sequence scored once, every question answered once.

What is measured is what OpenUnlearning measures, under its names, with its shape
(`{"agg_value": ..., "value_by_index": {"0": ...}}`), and a few of our own: `forget_perplexity`,
`retain_perplexity`, `wikitext_perplexity`, `forget_fluency`, `forget_loops`, `forget_broken_words`,
`retain_loops` and `retain_broken_words`. Unlike OpenUnlearning, answers longer than 512 tokens are
not cut (TOFU has none).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.config import check_count
from libortho.data.examples import Example
from libortho.data.general import general_text
from libortho.data.tasks import Task
from libortho.data.tokens import Template, encode, prompt_ids
from libortho.evaluation import entries
from libortho.evaluation.entries import Entry
from libortho.evaluation.generation import greedy
from libortho.evaluation.metrics import (
    UTILITY_PARTS,
    forget_quality,
    privleak,
    token_words,
    vocabulary,
)
from libortho.evaluation.scored import ANSWER, PARAPHRASED, PERTURBED, Part, Scored, score
from libortho.evaluation.text import text_windows
from libortho.scoring import sequence_nll

Progress = Callable[[str, int, int], None]

_NO_REFERENCE = "no reference model's logs were given"
_QUICK = "not part of the quick suite"


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
        absent = dict(task.absent)
        if "unseen" in absent:
            absent["holdout"] = absent.pop("unseen")
        return cls(
            forget=task.forget,
            retain=complete or task.retain,
            holdout=task.unseen,
            real_authors=task.real_authors,
            world_facts=task.world_facts,
            wikitext=wikitext,
            absent=absent,
        )


@dataclass(frozen=True)
class SuiteConfig:
    """What of the suite is measured.

    Attributes:
        quick: only what needs one pass over the answers: probabilities, truth ratio of the forget
            set, memorisation, membership. No answers are generated, no general knowledge is asked.
        limit: at most so many questions of each utility set (retain, real authors, world facts),
            evenly spread; None for all. An entry's indices stay those of the whole set.
        max_new_tokens: of a generated answer; OpenUnlearning's is 200.

    Raises:
        ValueError: `limit` or `max_new_tokens` is below 1.
    """

    quick: bool = False
    limit: int | None = None
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, 1)
        if self.limit is not None:
            check_count("limit", self.limit, 1)


@dataclass(frozen=True)
class Evaluation:
    """One model's measurements.

    Attributes:
        logs: each metric's entry, as OpenUnlearning's TOFU_EVAL.json has them.
        missing: each metric that could not be computed, with the reason.
        settings: what it was measured with: the config's, "template", and under "questions" how
            many of each set were asked and how many there are.
    """

    logs: dict[str, Entry]
    missing: dict[str, str]
    settings: dict[str, Any]


_PREFIX = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
_KINDS = {
    "forget": (ANSWER, PARAPHRASED, PERTURBED),
    "retain": (ANSWER, PARAPHRASED, PERTURBED),
    "holdout": (ANSWER,),
    "real_authors": (ANSWER, PERTURBED),
    "world_facts": (ANSWER, PERTURBED),
}
_QUICK_KINDS = {
    "forget": (ANSWER, PARAPHRASED, PERTURBED),
    "retain": (ANSWER,),
    "holdout": (ANSWER,),
}
_OF_KNOWLEDGE = ("Q_A_Prob", "Q_A_PERT_Prob", "Q_A_Prob_normalised", "Truth_Ratio")
_LEFT_OUT = (
    *(f"{prefix}_Q_A_ROUGE" for prefix in _PREFIX.values()),
    *(f"{prefix}_{part}" for prefix in ("ra", "wf") for part in _OF_KNOWLEDGE),
    *(f"{name}_{part}" for name in ("forget", "retain") for part in ("loops", "broken_words")),
    "model_utility",
    "forget_fluency",
    "wikitext_perplexity",
)
_UTILITY_SETS = ("retain", "real_authors", "world_facts")


def evaluate_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: SuiteConfig | None = None,
    *,
    template: Template = "plain",
    pretrained: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure one model, at whatever alpha it is set to.

    Args:
        model: in evaluation mode.
        template: how a question becomes a prompt.
        pretrained: an untouched model with the same tokenizer, which judges how fluent the answers
            to the forget questions are.
        progress: told (stage, done, total).
    """
    config = config or SuiteConfig()
    tell = progress or (lambda stage, done, total: None)
    parts = {
        name: Part(name, examples, config.limit if name in _UTILITY_SETS else None)
        for name, examples in data.sets().items()
        if not config.quick or name in _QUICK_KINDS
    }
    kinds = _QUICK_KINDS if config.quick else _KINDS
    pairs = [(part, kind) for name, part in parts.items() for kind in kinds[name]]
    book = _Book(data.absent, {(part.name, kind) for part, kind in pairs})
    scored = score(
        model,
        tokenizer,
        pairs,
        template,
        lambda done, total: tell("score", done, total),
    )
    for name, part in parts.items():
        if name in _PREFIX:
            _likelihoods(book, part, scored)
    _memorisation(book, parts, scored)
    if config.quick:
        book.missing |= dict.fromkeys(_LEFT_OUT, _QUICK)
    else:
        _ask(model, tokenizer, data, parts, book, config, template, pretrained, tell)
    for name in ("forget_quality", "privleak"):
        book.missing[name] = _NO_REFERENCE
    settings = {
        **dataclasses.asdict(config),
        "template": template,
        "questions": {
            name: {"asked": len(part.examples), "of": part.whole} for name, part in parts.items()
        },
    }
    return Evaluation(book.logs, book.missing, settings)


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    parts: Mapping[str, Part],
    book: _Book,
    config: SuiteConfig,
    template: Template,
    pretrained: PreTrainedModel | None,
    tell: Progress,
) -> None:
    """What needs generated answers, or general text."""
    asked = [part for name, part in parts.items() if name in _PREFIX]
    prompts = [prompt_ids(e.question or "", template, tokenizer) for p in asked for e in p.examples]
    answers = iter(
        greedy(
            model,
            tokenizer,
            prompts,
            config.max_new_tokens,
            progress=lambda done, total: tell("answer", done, total),
        )
    )
    said = {part.name: [next(answers) for _ in part.examples] for part in asked}
    shown = iter([str(tokenizer.decode(list(p), skip_special_tokens=True)) for p in prompts])
    for part in asked:
        inputs = [next(shown) for _ in part.examples]
        book.add(
            f"{_PREFIX[part.name]}_Q_A_ROUGE",
            [(part, ANSWER)],
            partial(entries.rouge, part, inputs, said[part.name]),
        )
    book.utility()

    known = vocabulary(_texts(data, tokenizer))
    for name in ("forget", "retain"):
        book.logs[f"{name}_loops"] = entries.loops(parts[name], said[name])
        book.logs[f"{name}_broken_words"] = entries.broken(parts[name], said[name], known)
    tell("judge the answers", 0, 1)
    book.fluency(parts["forget"], said["forget"], pretrained, tokenizer, template)
    if data.wikitext is None:
        book.missing["wikitext_perplexity"] = "no general text was given"
    else:
        tell("general text", 0, 1)
        nll = sequence_nll(model, text_windows(data.wikitext, tokenizer))
        book.logs["wikitext_perplexity"] = entries.perplexity_entry(nll)


def with_reference(evaluation: Evaluation, reference_logs: Mapping[str, Entry]) -> Evaluation:
    """The evaluation with what compares it to a model that never saw the forget set.

    That is `forget_quality` and `privleak` (of `mia_min_k`, as OpenUnlearning's).

    Args:
        reference_logs: the reference model's `logs`, or its TOFU_EVAL.json as read.

    Raises:
        ValueError: the two were measured on other forget questions.
    """
    logs, missing = dict(evaluation.logs), dict(evaluation.missing)
    for name, part in (("forget_quality", "forget_truth_ratio"), ("privleak", "mia_min_k")):
        missing.pop(name, None)
        logs.pop(name, None)
        if part not in logs:
            missing[name] = evaluation.missing.get(part, f"{part} was not measured")
        elif part not in reference_logs:
            missing[name] = f"the reference's logs have no {part}"
        else:
            logs[name] = _compared(name, logs[part], reference_logs[part])
    return dataclasses.replace(evaluation, logs=logs, missing=missing)


def _compared(name: str, own: Entry, reference: Entry) -> Entry:
    if name == "privleak":
        return {"agg_value": privleak(own["agg_value"], reference["agg_value"])}
    ours, theirs = own["value_by_index"], reference["value_by_index"]
    if set(ours) != set(theirs):
        raise ValueError(
            f"{len(ours)} forget questions against the reference's {len(theirs)}, or others: "
            "expected the same"
        )
    ratios = [[row["score"] for row in rows.values()] for rows in (ours, theirs)]
    return {"agg_value": forget_quality(*ratios)}


class _Book:
    """The entries made so far, and the reasons for those that could not be."""

    def __init__(self, absent: Mapping[str, str], scored: Container[tuple[str, str]]) -> None:
        self.logs: dict[str, Entry] = {}
        self.missing: dict[str, str] = {}
        self._absent = absent
        self._scored = scored

    def add(self, name: str, needs: Sequence[tuple[Part, str]], make: Callable[[], Entry]) -> None:
        """Make an entry if every (set, kind of answer) that it needs is there."""
        for part, kind in needs:
            reason = part.lacks(kind)
            if reason is not None:
                known = self._absent.get(part.name) if not part.examples else None
                self.missing[name] = known or reason
                return
            if (part.name, kind) not in self._scored:
                self.missing[name] = _QUICK
                return
        entry = make()
        if entry["agg_value"] is None:
            self.missing[name] = "it is defined for no question of the set"
        else:
            self.logs[name] = entry

    def utility(self) -> None:
        lacking = [name for name in UTILITY_PARTS if name not in self.logs]
        if lacking:
            self.missing["model_utility"] = f"needs {lacking[0]}: {self.missing[lacking[0]]}"
        else:
            self.logs["model_utility"] = entries.utility(self.logs)

    def fluency(
        self,
        part: Part,
        said: Sequence[str],
        judge: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
    ) -> None:
        name = f"{part.name}_fluency"
        if judge is None:
            self.missing[name] = "no pretrained model was given to judge the answers"
            return
        spoken = [i for i, answer in enumerate(said) if answer]
        if not spoken:
            self.missing[name] = "every answer is empty"
            return
        # Without the end of sequence: a model that was never taught to stop finds it unlikely.
        items = [
            encode(Example(said[i], part.examples[i].question), tokenizer, template) for i in spoken
        ]
        if tokenizer.eos_token_id is not None:
            items = [dataclasses.replace(item, ids=item.ids[:-1]) for item in items]
        nll = sequence_nll(judge, items)
        self.logs[name] = entries.fluency([part.index[i] for i in spoken], nll)


def _likelihoods(book: _Book, part: Part, scored: Scored) -> None:
    """Probabilities of right and wrong answers, and what is made of them, of one set."""
    prefix = _PREFIX[part.name]
    general = part.name in ("real_authors", "world_facts")
    own = (part, ANSWER)
    # General knowledge has no paraphrase: its right answer is the answer.
    right, wrong = (part, ANSWER if general else PARAPHRASED), (part, PERTURBED)
    names = {ANSWER: f"{prefix}_Q_A_Prob", PERTURBED: f"{prefix}_Q_A_PERT_Prob"}
    if not general:
        names[PARAPHRASED] = f"{prefix}_Q_A_PARA_Prob"
        book.add(f"{prefix}_perplexity", [own], lambda: entries.perplexity_entry(scored.nll(*own)))
    for kind, name in names.items():
        book.add(name, [(part, kind)], partial(entries.probabilities, part, kind, scored))
    if general:
        book.add(
            f"{prefix}_Q_A_Prob_normalised",
            [own, wrong],
            partial(entries.normalised, part, scored),
        )
    # OpenUnlearning's configuration spells it so for the forget set alone.
    ratio = "forget_truth_ratio" if part.name == "forget" else f"{prefix}_Truth_Ratio"
    book.add(ratio, [right, wrong], partial(entries.truth_ratios, part, right[1], scored))


def _memorisation(book: _Book, parts: Mapping[str, Part], scored: Scored) -> None:
    forget, holdout = parts["forget"], parts["holdout"]
    own = (forget, ANSWER)
    book.add("extraction_strength", [own], partial(entries.extraction, forget, scored))
    book.add("exact_memorization", [own], partial(entries.memorization, forget, scored))
    for name, attack in entries.ATTACKS.items():
        book.add(
            name,
            [own, (holdout, ANSWER)],
            partial(entries.membership, forget, holdout, attack, scored),
        )


def _texts(data: SuiteData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a word can be known from: the data, general text, the tokenizer's own words."""
    texts = [text for examples in data.sets().values() for e in examples for text in _words_of(e)]
    words = token_words(tokenizer.get_vocab())
    return [*texts, *general_text(), *words, *([data.wikitext] if data.wikitext else [])]


def _words_of(example: Example) -> list[str]:
    own = (example.question, example.answer, example.paraphrased_question)
    more = (example.paraphrased_answer, *example.perturbed_answers)
    return [text for text in (*own, *more) if text]
