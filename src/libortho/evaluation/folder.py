"""A job's folder: what has been made and measured already, so that a killed job can go on.

job.json                               what the job is; another job may not use the folder
split/                                 the main method's split, of the first seed
seed-0/<method>/split/                 every other split
seed-0/<method>.json                   how a split or a baseline was made: time, memory, report
seed-0/<method>/states/                a baseline's runs, until it is measured
seed-0/<model>/TOFU_EVAL.json          measurements, in OpenUnlearning's files and shape
seed-0/<model>/TOFU_SUMMARY.json
seed-0/<model>/missing.json            what could not be measured, and why
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from libortho.evaluation.entries import write_openunlearning
from libortho.evaluation.suite import Evaluation
from libortho.files import sweep, unfinished, write_json


class JobFolder:
    """The folder of one job.

    Args:
        path: made if it is not there.
        identity: what the results depend on, JSON-ready.

    Raises:
        FileExistsError: `path` holds files of no job, or of another.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        marker = path / "job.json"
        text = json.dumps(identity, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if marker.is_file():
            if json.loads(marker.read_text("utf-8")).get("digest") != digest:
                raise FileExistsError(
                    f"{path} holds the results of another job (or of another version): "
                    "choose another --out"
                )
            return
        sweep(path, unfinished(marker))  # of a job that was killed as it began
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not empty: choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        shown = {key: identity[key] for key in ("libortho", "model", "methods", "seeds")}
        write_json(marker, {"digest": digest, **shown})

    def split(self, seed: int, method: str, *, main: bool) -> Path:
        """Where a split lies or is to lie."""
        return self.path / "split" if main else self._seed(seed) / slug(method) / "split"

    def states(self, seed: int, method: str) -> Path:
        """Where the runs of a baseline are kept while it is tuned."""
        return self._seed(seed) / slug(method) / "states"

    def has(self, seed: int, name: str) -> bool:
        """Whether a file of a seed is there."""
        return (self._seed(seed) / name).is_file()

    def read(self, seed: int, name: str) -> Any:
        """A JSON file of a seed."""
        return json.loads((self._seed(seed) / name).read_text("utf-8"))

    def write(self, seed: int, name: str, data: Any) -> None:
        """Write a JSON file of a seed, whole or not at all."""
        write_json(self._seed(seed) / name, data)

    def evaluation(self, seed: int, row: str) -> Evaluation | None:
        """A model's measurements, if they were finished."""
        return read_evaluation(self._seed(seed) / slug(row))

    def keep(self, seed: int, row: str, evaluation: Evaluation) -> None:
        """Write a model's measurements."""
        write_evaluation(evaluation, self._seed(seed) / slug(row))

    def _seed(self, seed: int) -> Path:
        return self.path / f"seed-{seed}"


def read_evaluation(folder: Path) -> Evaluation | None:
    """What `write_evaluation` wrote, or None where it did not come to its end."""
    marker = folder / "missing.json"  # written last
    if not marker.is_file():
        return None
    held = json.loads(marker.read_text("utf-8"))
    logs = json.loads((folder / "TOFU_EVAL.json").read_text("utf-8"))
    return Evaluation(logs, held["missing"], held["settings"])


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """One model's measurements: OpenUnlearning's two files, and what is missing from them."""
    write_openunlearning(evaluation.logs, folder)
    held = {"missing": evaluation.missing, "settings": evaluation.settings}
    write_json(folder / "missing.json", held)


def slug(name: str) -> str:
    """ "geometric, alpha 0.5" -> "geometric-alpha-0.5"."""
    return name.replace(", ", "-").replace(" ", "-")
