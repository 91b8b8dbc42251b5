"""The entries of one model as they are made, and why some could not be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libortho.data.examples import Example
from libortho.data.tokens import Template, encode
from libortho.evaluation import entries
from libortho.evaluation.entries import Entry
from libortho.evaluation.metrics import UTILITY_PARTS
from libortho.evaluation.scored import Part
from libortho.scoring import sequence_nll

QUICK = "not part of the quick suite"


class Book:
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
                self.missing[name] = QUICK
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
