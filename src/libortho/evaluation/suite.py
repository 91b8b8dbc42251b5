"""The TOFU benchmark of one model: every sequence scored once, every question answered once.

What is measured is what OpenUnlearning measures, under its names, with its shape
(`{"agg_value": ..., "value_by_index": {"0": ...}}`), and a few of our own: `forget_perplexity`,
`retain_perplexity`, `wikitext_perplexity`, `forget_fluency`, `forget_loops`, `forget_broken_words`,
`retain_loops` and `retain_broken_words`. Unlike OpenUnlearning, answers longer than 512 tokens are
not cut (TOFU has none).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.config import check_count
from libortho.data.examples import Example
from libortho.data.general import general_text
from libortho.data.tokens import Template, prompt_ids
from libortho.evaluation import entries
from libortho.evaluation.book import QUICK, Book
from libortho.evaluation.entries import Entry
from libortho.evaluation.generation import greedy
from libortho.evaluation.metrics import token_words, vocabulary
from libortho.evaluation.scored import ANSWER, PARAPHRASED, PERTURBED, Part, Scored, score
from libortho.evaluation.suite_data import SuiteData
from libortho.evaluation.text import text_windows
from libortho.scoring import sequence_nll
from libortho.training import Progress

MEASURED_FORMAT = 3
"""Raised when the suite measures the same model otherwise."""

NO_REFERENCE = "no reference model's logs were given"


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
    book = Book(data.absent, {(part.name, kind) for part, kind in pairs})
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
        book.missing |= dict.fromkeys(_LEFT_OUT, QUICK)
    else:
        _ask(model, tokenizer, data, parts, book, config, template, pretrained, tell)
    for name in ("forget_quality", "privleak"):
        book.missing[name] = NO_REFERENCE
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
    book: Book,
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


def _likelihoods(book: Book, part: Part, scored: Scored) -> None:
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


def _memorisation(book: Book, parts: Mapping[str, Part], scored: Scored) -> None:
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
