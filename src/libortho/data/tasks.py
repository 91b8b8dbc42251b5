"""A task: some authors that a model is to memorise, and some of them that it is then to forget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from libortho.data.authors import MAX_AUTHORS, fictional_authors
from libortho.data.examples import Example, parse_record, read_jsonl
from libortho.errors import DataError

TOFU_AUTHOR = 20
"""Questions per author in TOFU; authors stand one after the other in its files."""

UNSEEN_AUTHORS = 4
"""Authors beside the task's own, whose answers no model of the task has seen."""


@dataclass(frozen=True)
class Task:
    """What is memorised, and how it divides.

    Attributes:
        name: for headings and file names.
        forget, retain: question-answer pairs with paraphrased and perturbed answers.
        unseen: pairs about other authors, never memorised: how unfamiliar is unfamiliar.
        source: where they come from, and how many authors.
    """

    name: str
    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    unseen: tuple[Example, ...]
    source: str


def _check_counts(authors: int, forget_authors: int, most_retain: int, most_forget: int) -> None:
    if not 1 <= forget_authors <= most_forget:
        raise ValueError(f"forget_authors={forget_authors}: expected 1 to {most_forget}")
    if not forget_authors < authors <= most_retain + forget_authors:
        raise ValueError(
            f"authors={authors}: expected {forget_authors + 1} to {most_retain + forget_authors} "
            f"with {forget_authors} to forget"
        )


def embedded_task(authors: int = 10, forget_authors: int = 2, seed: int = 0) -> Task:
    """The embedded fictional authors: the last `forget_authors` of them are to be forgotten.

    Raises:
        ValueError: a count out of range.
    """
    _check_counts(authors, forget_authors, MAX_AUTHORS - UNSEEN_AUTHORS - 30, 30)
    cast = fictional_authors(authors + UNSEEN_AUTHORS, seed)
    examples = [
        tuple(
            Example(
                question=fact.question,
                answer=fact.answer,
                paraphrased_question=fact.paraphrased_question,
                paraphrased_answer=fact.paraphrased_answer,
                perturbed_answers=fact.perturbed_answers,
            )
            for fact in author.facts
        )
        for author in cast
    ]
    kept = authors - forget_authors
    return Task(
        name=f"authors-{authors}-{forget_authors}",
        forget=tuple(x for author in examples[kept:authors] for x in author),
        retain=tuple(x for author in examples[:kept] for x in author),
        unseen=tuple(x for author in examples[authors:] for x in author),
        source=f"embedded fictional authors, seed {seed}: {authors}, {forget_authors} to forget",
    )


def tofu_task(source: str, authors: int = 12, forget_authors: int = 2) -> Task:
    """TOFU (Maini et al. 2024, arXiv 2401.06121): its first authors to keep and to forget.

    The forget authors are the first of TOFU's forget10 set, the others the first of its
    retain set for which TOFU has perturbed answers (20 authors).

    Args:
        source: a folder with TOFU's JSON-lines files (`forget10_perturbed.json`,
            `retain_perturbed.json`), or a name on the Hugging Face hub ("locuslab/TOFU").
        authors: how many are memorised, forget authors included.
        forget_authors: how many of them are to be forgotten.

    Raises:
        ValueError: a count out of range.
        FileNotFoundError, DataError: the files are not there or not as TOFU's.
    """
    forget = _tofu_subset(source, "forget10_perturbed")
    retain = _tofu_subset(source, "retain_perturbed")
    _check_counts(authors, forget_authors, len(retain) // TOFU_AUTHOR, len(forget) // TOFU_AUTHOR)
    split = forget_authors * TOFU_AUTHOR
    # Authors that TOFU wants forgotten but this task does not memorise; with all of forget10 in the
    # task there are none left, and retain authors beyond the task's serve.
    kept = (authors - forget_authors) * TOFU_AUTHOR
    unseen = (forget[split:] + retain[kept:])[: UNSEEN_AUTHORS * TOFU_AUTHOR]
    return Task(
        name=f"tofu-{authors}-{forget_authors}",
        forget=tuple(forget[:split]),
        retain=tuple(retain[:kept]),
        unseen=tuple(unseen),
        source=f"TOFU: {authors} authors, {forget_authors} to forget",
    )


def _tofu_subset(source: str, name: str) -> list[Example]:
    folder = Path(source)
    if folder.is_dir():
        return read_jsonl(folder / f"{name}.json")
    if folder.exists() or source.startswith((".", "/")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source}: expected a folder with TOFU's files, or a hub name such as locuslab/TOFU"
        )
    return list(_hub_subset(source, name))


def _hub_subset(source: str, name: str) -> Iterator[Example]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"reading {source} from the hub needs `pip install libortho[eval]`, or a local folder"
        ) from None
    for number, record in enumerate(load_dataset(source, name, split="train"), start=1):
        yield parse_record(record, f"{source}/{name}, row {number}")
