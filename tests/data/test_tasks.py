"""Tasks: how many authors may be asked for, and that no example is in two places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libortho.data.examples import Example
from libortho.data.tasks import Task, embedded_task, tofu_benchmark, tofu_task
from libortho.errors import DataError


def questions(examples: tuple[Example, ...]) -> set[str | None]:
    return {example.question for example in examples}


def assert_disjoint(task: Task) -> None:
    sets = (task.forget, task.retain, task.unseen, task.holdout)
    parts = [questions(part) for part in sets]
    assert sum(map(len, parts)) == len(set().union(*parts)) == sum(map(len, sets))
    for part in sets:
        assert all(x.paraphrased_answer and x.perturbed_answers for x in part)


# -- embedded authors ------------------------------------------------------------


@pytest.mark.parametrize(("authors", "forget"), [(2, 1), (10, 2), (20, 19)])
def test_embedded(authors: int, forget: int) -> None:
    task = embedded_task(authors, forget)
    assert len(task.forget) == 10 * forget
    assert len(task.retain) == 10 * (authors - forget)
    assert len(task.unseen) == len(task.holdout) == 40
    assert_disjoint(task)
    assert embedded_task(authors, forget) == task
    assert embedded_task(authors, forget, seed=1).forget != task.forget


def test_embedded_forgets_the_last_authors() -> None:
    small, large = embedded_task(6, 2), embedded_task(6, 3)
    assert small.retain[: len(large.retain)] == large.retain
    assert set(small.forget) < set(large.forget)


@pytest.mark.parametrize(
    ("authors", "forget", "named"),
    [
        (10, 0, "forget_authors=0"),
        (10, -1, "forget_authors=-1"),
        (10**4, 10**3, "forget_authors=1000"),
        (2, 2, "authors=2"),
        (1, 2, "authors=1"),
        (0, 1, "authors=0"),
        (10**4, 2, "authors=10000"),
    ],
)
def test_embedded_counts_out_of_range(authors: int, forget: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        embedded_task(authors, forget)


def test_every_count_that_is_allowed_works() -> None:
    with pytest.raises(ValueError, match="expected 2 to") as error:
        embedded_task(10**4, 1)
    most = int(str(error.value).split(" to ")[1].split()[0])
    assert len(embedded_task(most, 1).retain) == 10 * (most - 1)
    with pytest.raises(ValueError, match="expected 1 to") as error:
        embedded_task(10**4, 10**4)
    most_forget = int(str(error.value).split(" to ")[1].split()[0])
    largest = most - 1 + most_forget
    assert len(embedded_task(largest, most_forget).forget) == 10 * most_forget


# -- TOFU ------------------------------------------------------------------------


def write_tofu(folder: Path, forget_authors: int = 3, retain_authors: int = 4) -> Path:
    for name, authors in (
        ("forget10_perturbed", forget_authors),
        ("retain_perturbed", retain_authors),
    ):
        records = [
            {
                "question": f"{name}, author {author}, question {i}?",
                "answer": f"{author}-{i}",
                "paraphrased_answer": f"it is {author}-{i}",
                "perturbed_answer": [f"it is {author}-{i + 1}"],
            }
            for author in range(authors)
            for i in range(20)
        ]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_tofu_takes_the_first_authors(tmp_path: Path) -> None:
    task = tofu_task(str(write_tofu(tmp_path)), authors=5, forget_authors=2)
    assert [x.question for x in task.forget] == [
        f"forget10_perturbed, author {a}, question {i}?" for a in (0, 1) for i in range(20)
    ]
    assert [x.question for x in task.retain] == [
        f"retain_perturbed, author {a}, question {i}?" for a in (0, 1, 2) for i in range(20)
    ]
    assert task.forget[0].perturbed_answers == ("it is 0-1",)
    assert_disjoint(task)
    assert questions(task.unseen) == {
        f"forget10_perturbed, author 2, question {i}?" for i in range(20)
    }
    assert questions(task.holdout) == {
        f"retain_perturbed, author 3, question {i}?" for i in range(20)
    }


@pytest.mark.parametrize(
    ("authors", "forget", "named"),
    [
        (5, 0, "forget_authors=0"),
        (6, 4, "forget_authors=4"),
        (2, 2, "authors=2"),
        (7, 2, "authors=7"),
    ],
)
def test_tofu_counts_out_of_range(tmp_path: Path, authors: int, forget: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        tofu_task(str(write_tofu(tmp_path)), authors, forget)


def test_tofu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"forget10_perturbed\.json"):
        tofu_task(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        tofu_task(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        tofu_task("missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        tofu_task(str(tmp_path / "file"))


def test_tofu_that_is_broken(tmp_path: Path) -> None:
    path = write_tofu(tmp_path) / "retain_perturbed.json"
    path.write_text(path.read_text() + "\n{")
    with pytest.raises(DataError, match=r"retain_perturbed\.json, line 81"):
        tofu_task(str(tmp_path))


def test_real_tofu(repository: Path) -> None:
    folder = repository.parent / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("TOFU's files are not beside the repository")
    task = tofu_task(str(folder))
    assert (len(task.forget), len(task.retain)) == (40, 200)
    assert_disjoint(task)
    assert len(task.unseen) == len(task.holdout) == 80
    largest = tofu_task(str(folder), authors=40, forget_authors=20)
    assert (len(largest.forget), len(largest.retain)) == (400, 400)


def write_pairs(path: Path, pairs: list[tuple[str, str]], **extra: object) -> None:
    records = [{"question": q, "answer": a, **extra} for q, a in pairs]
    path.write_text("\n".join(map(json.dumps, records)))


def pairs_of(examples: tuple[Example, ...]) -> list[tuple[str, str]]:
    return [(x.question or "", x.answer) for x in examples]


def write_benchmark(folder: Path) -> Path:
    """TOFU in miniature: 3 authors to forget, 5 to keep, 4 of them with perturbed answers."""
    write_tofu(folder)
    kept = [json.loads(x) for x in (folder / "retain_perturbed.json").read_text().splitlines()]
    pairs = [(r["question"], r["answer"]) for r in kept]
    more = [(f"retain90, question {i}?", f"more-{i}") for i in range(20)]
    write_pairs(folder / "retain90.json", [*more[:10], *pairs, *more[10:]])
    for name in ("real_authors", "world_facts"):
        wrong = {"perturbed_answer": ["no", "nor this"]}
        write_pairs(folder / f"{name}_perturbed.json", [(f"{name}?", "yes")], **wrong)
    return folder


def test_tofu_general_knowledge(tmp_path: Path) -> None:
    task = tofu_task(str(write_benchmark(tmp_path)), 5, 2)
    assert pairs_of(task.real_authors) == [("real_authors?", "yes")]
    assert pairs_of(task.world_facts) == [("world_facts?", "yes")]
    assert task.world_facts[0].perturbed_answers == ("no", "nor this")
    assert task.absent == {}


def test_tofu_says_what_is_absent(tmp_path: Path) -> None:
    task = tofu_task(str(write_tofu(tmp_path)), 7, 3)
    empty = (task.real_authors, task.world_facts, task.unseen, task.holdout)
    assert empty == ((), (), (), ())
    assert task.absent == {
        "unseen": "too few authors of the files are not memorised",
        "holdout": "too few authors of the files are not memorised",
        "real_authors": "real_authors_perturbed.json is not there",
        "world_facts": "world_facts_perturbed.json is not there",
    }
    assert set(embedded_task().absent) == {"real_authors", "world_facts"}
    one_left = tofu_task(str(tmp_path), 6, 3)
    assert (len(one_left.unseen), len(one_left.holdout)) == (20, 0)
    assert "unseen" not in one_left.absent
    assert one_left.absent["holdout"] == "too few authors of the files are not memorised"


def test_tofu_with_more_retain_authors_than_have_perturbed_answers(tmp_path: Path) -> None:
    source = str(write_benchmark(tmp_path))
    task = tofu_task(source, 7, 2)
    assert len(task.retain) == 100
    assert all(x.perturbed_answers for x in task.retain[:80])
    assert pairs_of(task.retain[80:]) == [
        (f"retain90, question {i}?", f"more-{i}") for i in range(20)
    ]
    assert_disjoint(tofu_task(source, 6, 2))
    assert not questions(task.retain) & questions(task.unseen)
    with pytest.raises(ValueError, match="authors=8: expected 3 to 7"):
        tofu_task(source, 8, 2)


def test_tofu_benchmark(tmp_path: Path) -> None:
    task = tofu_benchmark(str(write_benchmark(tmp_path)), "forget10")
    assert task.name == "tofu-forget10"
    assert task.source == "TOFU forget10: 8 authors, 3 to forget"
    assert (len(task.forget), len(task.retain), len(task.unseen)) == (60, 100, 0)
    assert sum(bool(x.perturbed_answers) for x in task.retain) == 80
    assert not questions(task.forget) & questions(task.retain)
    assert task.real_authors
    assert set(task.absent) == {"unseen", "holdout"}
    assert all("holdout10.json is not there" in why for why in task.absent.values())

    strangers = [(f"stranger {a}, {i}?", "never") for a in range(3) for i in range(20)]
    write_pairs(tmp_path / "holdout10.json", strangers)
    task = tofu_benchmark(str(tmp_path), "forget10")
    assert pairs_of(task.unseen) == strangers[:40]
    assert pairs_of(task.holdout) == strangers[40:]
    assert task.absent == {}
    write_pairs(tmp_path / "holdout10.json", strangers[:20])
    task = tofu_benchmark(str(tmp_path), "forget10")
    assert pairs_of(task.unseen) == strangers[:20]
    assert task.absent == {"holdout": "holdout10.json has one author, who serves as unseen"}


def test_tofu_benchmark_that_does_not_fit_together(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    with pytest.raises(ValueError, match="split='forget20': expected one of forget01, forget05"):
        tofu_benchmark(str(tmp_path), "forget20")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"forget05_perturbed\.json"):
        tofu_benchmark(str(tmp_path), "forget05")
    write_pairs(tmp_path / "retain90.json", [("another?", "edition")])
    with pytest.raises(DataError, match="has 80 pairs, 0 of which are among the 1"):
        tofu_benchmark(str(tmp_path), "forget10")


@pytest.mark.parametrize(
    ("split", "forget"), [("forget01", 40), ("forget05", 200), ("forget10", 400)]
)
def test_real_tofu_benchmark(repository: Path, split: str, forget: int) -> None:
    folder = repository.parent / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("TOFU's files are not beside the repository")
    task = tofu_benchmark(str(folder), split)  # type: ignore[arg-type]
    assert (len(task.forget), len(task.retain)) == (forget, 4000 - forget)
    everything = [
        (x["question"], x["answer"]) for x in map(json.loads, (folder / "full.json").open())
    ]
    assert sorted(pairs_of(task.forget + task.retain)) == sorted(everything)
    assert sum(bool(x.perturbed_answers and x.paraphrased_answer) for x in task.retain) == 400
    assert (len(task.real_authors), len(task.world_facts)) == (100, 117)
    # What a smaller split does not forget is in its retain set: none of it is unseen.
    assert set(task.absent) == {"unseen", "holdout"}
    assert len(tofu_task(str(folder), 40, 4).retain) == 720
