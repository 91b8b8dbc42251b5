"""A task: some authors that a model is to memorise, and some of them that it is then to forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from libortho.data.authors import MAX_AUTHORS, fictional_authors
from libortho.data.examples import Example, parse_record, read_jsonl
from libortho.errors import DataError

TOFU_AUTHOR = 20
"""Questions per author in TOFU; authors stand one after the other in its files."""

TofuSplit = Literal["forget01", "forget05", "forget10"]
"""TOFU's own divisions, by the percentage of its 200 authors that is to be forgotten."""

UNSEEN_AUTHORS = 4
"""Authors beside the task's own, whose answers no model of the task has seen: so many say how
unfamiliar is unfamiliar, and as many others are held out to measure that on."""


@dataclass(frozen=True)
class Task:
    """What is memorised, and how it divides.

    Attributes:
        name: for headings and file names.
        forget: question-answer pairs with paraphrased and perturbed answers.
        retain: pairs that are memorised and kept. Those with paraphrased and perturbed answers are
            what retention is measured on; there may be others, behind them.
        unseen: pairs about other authors, never memorised: how unfamiliar is unfamiliar.
        source: where they come from, and how many authors.
        holdout: pairs about yet other authors, never memorised nor used for anything: the
            non-members of membership inference.
        real_authors, world_facts: TOFU's questions of general knowledge, nobody's secret.
        absent: of each of the last four sets that is empty, why.
    """

    name: str
    forget: tuple[Example, ...]
    retain: tuple[Example, ...]
    unseen: tuple[Example, ...]
    source: str
    holdout: tuple[Example, ...] = ()
    real_authors: tuple[Example, ...] = ()
    world_facts: tuple[Example, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict, hash=False)


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
    strangers = 2 * UNSEEN_AUTHORS
    _check_counts(authors, forget_authors, MAX_AUTHORS - strangers - 30, 30)
    cast = fictional_authors(authors + strangers, seed)
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
    kept, unseen = authors - forget_authors, authors + UNSEEN_AUTHORS
    return Task(
        name=f"authors-{authors}-{forget_authors}",
        forget=tuple(x for author in examples[kept:authors] for x in author),
        retain=tuple(x for author in examples[:kept] for x in author),
        unseen=tuple(x for author in examples[authors:unseen] for x in author),
        source=f"embedded fictional authors, seed {seed}: {authors}, {forget_authors} to forget",
        holdout=tuple(x for author in examples[unseen:] for x in author),
        absent=dict.fromkeys(
            ("real_authors", "world_facts"), "the embedded authors have no such set: it is TOFU's"
        ),
    )


def tofu_task(source: str, authors: int = 12, forget_authors: int = 2) -> Task:
    """TOFU (Maini et al. 2024, arXiv 2401.06121): its first authors to keep and to forget.

    The forget authors are the first of TOFU's forget10 set, the others the first of its
    retain set: 20 for which TOFU has perturbed answers, and up to 160 more for which it has not.
    The unseen and the held-out ones are those of forget10 that are not memorised here, and retain
    authors if too few are left.

    Args:
        source: a folder with TOFU's JSON-lines files (`forget10_perturbed.json`,
            `retain_perturbed.json`; `retain90.json` for more than 20 retain authors;
            `real_authors_perturbed.json` and `world_facts_perturbed.json` if there), or a name on
            the Hugging Face hub ("locuslab/TOFU").
        authors: how many are memorised, forget authors included.
        forget_authors: how many of them are to be forgotten.

    Raises:
        ValueError: a count out of range.
        FileNotFoundError, DataError: the files are not there or not as TOFU's.
    """
    forget = _tofu_subset(source, "forget10_perturbed")
    retain = _tofu_subset(source, "retain_perturbed")
    if authors - forget_authors > len(retain) // TOFU_AUTHOR:
        retain = _with_perturbed(_optional_subset(source, "retain90"), retain)
    _check_counts(authors, forget_authors, len(retain) // TOFU_AUTHOR, len(forget) // TOFU_AUTHOR)
    split = forget_authors * TOFU_AUTHOR
    # Authors that TOFU wants forgotten but this task does not memorise; with all of forget10 in the
    # task there are none left, and retain authors beyond the task's serve.
    kept = (authors - forget_authors) * TOFU_AUTHOR
    strangers = forget[split:] + retain[kept:]
    return _tofu(
        source,
        f"tofu-{authors}-{forget_authors}",
        forget[:split],
        retain[:kept],
        strangers[: 2 * UNSEEN_AUTHORS * TOFU_AUTHOR],
        f"TOFU: {authors} authors, {forget_authors} to forget",
        "too few authors of the files are not memorised",
    )


def tofu_benchmark(source: str, split: TofuSplit) -> Task:
    """TOFU as it is published: all of its 200 authors memorised, the split's share to be forgotten.

    Retention is measured on the 400 pairs for which TOFU has perturbed answers. The forget10
    authors that a smaller split does not forget are in its retain set, so they cannot serve as
    unseen ones. For those the hub has holdout01, holdout05 and holdout10, whose first half are the
    unseen and whose second the held-out ones; a folder without that file gives a task without
    either, and says so in `absent`.

    Args:
        source: as in `tofu_task`; a folder needs `<split>_perturbed.json`, `retain_perturbed.json`
            and the matching `retain90.json`, `retain95.json` or `retain99.json`.

    Raises:
        ValueError: no such split.
        FileNotFoundError, DataError: the files are not there, not as TOFU's, or of several
            editions.
    """
    if split not in get_args(TofuSplit):
        raise ValueError(f"split={split!r}: expected one of {', '.join(get_args(TofuSplit))}")
    percent = split.removeprefix("forget")
    forget = _tofu_subset(source, f"{split}_perturbed")
    retain = _with_perturbed(
        _tofu_subset(source, f"retain{100 - int(percent)}"),
        _tofu_subset(source, "retain_perturbed"),
    )
    holdout = f"holdout{percent}"
    strangers = _optional_subset(source, holdout)
    lacking = f"{holdout}.json is not there, and {split} memorises all other authors"
    if strangers:
        lacking = f"{holdout}.json has one author, who serves as unseen"
    count = (len(forget) + len(retain)) // TOFU_AUTHOR
    return _tofu(
        source,
        f"tofu-{split}",
        forget,
        retain,
        strangers,
        f"TOFU {split}: {count} authors, {len(forget) // TOFU_AUTHOR} to forget",
        lacking,
    )


def _tofu(
    source: str,
    name: str,
    forget: list[Example],
    retain: list[Example],
    strangers: list[Example],
    described: str,
    lacking: str,
) -> Task:
    """`strangers` is halved, author by author; `lacking` says why a half that is empty is so."""
    half = -(-len(strangers) // (2 * TOFU_AUTHOR)) * TOFU_AUTHOR
    other = {"unseen": strangers[:half], "holdout": strangers[half:]}
    absent = {part: lacking for part, examples in other.items() if not examples}
    general = {
        part: tuple(_optional_subset(source, f"{part}_perturbed"))
        for part in ("real_authors", "world_facts")
    }
    absent |= {part: f"{part}_perturbed.json is not there" for part, x in general.items() if not x}
    return Task(
        name=name,
        forget=tuple(forget),
        retain=tuple(retain),
        unseen=tuple(other["unseen"]),
        source=described,
        holdout=tuple(other["holdout"]),
        real_authors=general["real_authors"],
        world_facts=general["world_facts"],
        absent=absent,
    )


def _with_perturbed(plain: list[Example], perturbed: list[Example]) -> list[Example]:
    """The perturbed examples, then those of `plain` that are not among them."""
    pairs = {(x.question, x.answer) for x in perturbed}
    others = [x for x in plain if (x.question, x.answer) not in pairs]
    if plain and len(others) + len(perturbed) != len(plain):
        raise DataError(
            f"retain_perturbed has {len(perturbed)} pairs, {len(plain) - len(others)} of which are "
            f"among the {len(plain)} of the retain set: expected all, of one edition of TOFU"
        )
    return perturbed + others


def _tofu_subset(source: str, name: str) -> list[Example]:
    folder = Path(source)
    if folder.is_dir():
        return read_jsonl(folder / f"{name}.json")
    if folder.exists() or source.startswith((".", "/")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source}: expected a folder with TOFU's files, or a hub name such as locuslab/TOFU"
        )
    return list(_hub_subset(source, name))


def _optional_subset(source: str, name: str) -> list[Example]:
    """As `_tofu_subset`; nothing where a folder has no such file."""
    folder = Path(source)
    if folder.is_dir() and not (folder / f"{name}.json").is_file():
        return []
    return _tofu_subset(source, name)


def _hub_subset(source: str, name: str) -> Iterator[Example]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"reading {source} from the hub needs `pip install '.[eval]'` in a checkout of "
            "LibOrtho, or a local folder"
        ) from None
    for number, record in enumerate(load_dataset(source, name, split="train"), start=1):
        yield parse_record(record, f"{source}/{name}, row {number}")
