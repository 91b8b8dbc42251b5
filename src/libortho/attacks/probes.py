"""Probes: what the hidden states know that the output does not say.

Two of them. A linear probe is trained to tell right answers from wrong ones by the hidden state at
their end (after Azaria and Mitchell 2023, arXiv 2304.13734; Marks and Tegmark 2023, arXiv
2310.06824), on retain questions or on a part of the forget set, and then asked about forget
questions. The logit lens (nostalgebraist 2020; as an attack on deleted facts: Patil et al. 2023,
arXiv 2309.17410) reads each layer's state through the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from libortho.attacks.common import (
    AttackData,
    Findings,
    Progress,
    Score,
    Subject,
    mean_score,
    note_texts,
    question_of,
    with_question,
)
from libortho.config import check_count, check_fraction, check_positive
from libortho.data.examples import Example
from libortho.data.sampling import evenly
from libortho.data.tokens import Batch, Tokens, batches

ACCURACY = "share of right answers told"
RANK = "mean reciprocal rank"
LENS = "logit lens"


@dataclass(frozen=True)
class ProbesConfig:
    """What is probed.

    Attributes:
        depths: shares of the layers after which a linear probe looks.
        retain_questions: at most so many train a probe, evenly spread.
        folds: of the cross-validation; no question is in two of them.
        ridge: strength of the penalty, over the mean energy of a feature.
    """

    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    retain_questions: int = 200
    folds: int = 5
    ridge: float = 1.0

    def __post_init__(self) -> None:
        for depth in self.depths:
            check_fraction("depths", depth)
        check_count("folds", self.folds, 2)
        check_count("retain_questions", self.retain_questions, 1)
        check_positive("ridge", self.ridge)

    @classmethod
    def small(cls, seed: int) -> ProbesConfig:
        """Fewer questions to learn from; it is a few forward passes."""
        return cls(retain_questions=80)


def probes(
    subject: Subject, data: AttackData, config: ProbesConfig, progress: Progress
) -> Findings:
    """Linear probes, and the logit lens.

    A probe is right about a question when it rates the right answer above every perturbed one;
    chance is 1 / answers. The depth is chosen by cross-validation on what the probe is trained on,
    never on what it is judged by.
    """
    missing: dict[str, str] = {}
    scores: list[Score] = []
    progress("probe", 0, 3)
    forget = _Choices.of(subject.model, data, data.forget, config.depths)
    progress("probe", 1, 3)
    taught = evenly(data.retain, config.retain_questions)
    retain = _Choices.of(subject.model, data, taught, config.depths)
    progress("probe", 2, 3)
    if len(forget.questions) < config.folds or len(retain.questions) < config.folds:
        missing["linear probe"] = (
            f"{len(forget.questions)} forget and {len(retain.questions)} retain questions have "
            f"perturbed answers: expected at least {config.folds} each"
        )
    else:
        scores += [
            _trained_on_retain(forget, retain, config),
            _cross_validated(forget, config),
        ]
    asked = with_question(data.forget)
    note_texts(missing, LENS, data.forget)
    lens = _lens(subject.model, asked, data) if asked else None
    if lens is not None:
        scores.append(lens)
    elif asked:
        missing[LENS] = f"{type(subject.model).__name__} has no final norm that is known here"
    progress("probe", 3, 3)
    return Findings(tuple(scores), missing)


# -- linear probes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choices:
    """Hidden states at the end of each answer to each question, the right one first.

    Attributes:
        depths: of the states.
        questions: per question (depths, answers, hidden), fp32, less their mean over the answers:
            what all of a question's answers share tells nothing about which is right.
    """

    depths: tuple[float, ...]
    questions: list[Tensor]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        data: AttackData,
        examples: Sequence[Example],
        depths: tuple[float, ...],
    ) -> _Choices:
        usable = [e for e in examples if e.perturbed_answers]
        answers = [(e.paraphrased_answer or e.answer, *e.perturbed_answers) for e in usable]
        items = data.encode(
            [
                Example(text, e.question)
                for e, texts in zip(usable, answers, strict=True)
                for text in texts
            ]
        )
        ends = data.tokenizer.eos_token_id is not None
        # The state at the answer's own last token, which comes before the end of sequence.
        places = [len(item.ids) - 1 - ends for item in items]
        states = states_at(model, items, places)
        layers = states.shape[1] - 1
        # The embedding of an answer's last token tells nothing: never layer 0.
        states = states[:, [max(1, round(depth * layers)) for depth in depths]]
        parts = states.split([len(texts) for texts in answers]) if answers else ()
        return cls(depths, [(part - part.mean(dim=0)).transpose(0, 1) for part in parts])

    def at(self, depth: int) -> list[Tensor]:
        """(answers, hidden) of each question at one depth."""
        return [states[depth] for states in self.questions]

    @property
    def chance(self) -> float:
        return sum(1 / states.shape[1] for states in self.questions) / len(self.questions)


def ridge_direction(questions: Sequence[Tensor], ridge: float) -> Tensor:
    """The direction w (hidden,) that minimises sum (x w - y)^2 + penalty ||w||^2.

    y is 1 for a question's first answer and 0 for others, less their mean; the penalty is `ridge`
    times the mean energy of a feature, summed over the answers (Hoerl and Kennard 1970). Solved
    in fp64.

    Args:
        questions: (answers, hidden) each, their mean over the answers taken off.
    """
    x = torch.cat(list(questions)).double()
    targets = []
    for states in questions:
        y = torch.zeros(len(states), dtype=torch.float64)
        y[0] = 1
        targets.append(y - y.mean())
    penalty = ridge * float(x.square().sum()) / x.shape[1]
    if penalty == 0:  # answers that cannot be told apart at all
        return torch.zeros(x.shape[1], dtype=torch.float64)
    # Through the smaller of the two Gram matrices.
    if x.shape[0] < x.shape[1]:
        gram = x @ x.T
        gram.diagonal().add_(penalty)
        return x.T @ torch.linalg.solve(gram, torch.cat(targets))
    gram = x.T @ x
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, x.T @ torch.cat(targets))


def _hits(questions: Sequence[Tensor], direction: Tensor) -> list[float]:
    """1 for each question whose first answer is rated above all others."""
    hits = []
    for states in questions:
        rated = states.double() @ direction
        hits.append(float(rated[0] > rated[1:].max()))
    return hits


def _validated(questions: Sequence[Tensor], config: ProbesConfig) -> list[float]:
    """Cross-validated hits, in the questions' order."""
    hits = [0.0] * len(questions)
    for fold in range(config.folds):
        held = range(fold, len(questions), config.folds)
        trained = [x for i, x in enumerate(questions) if i not in held]
        found = _hits([questions[i] for i in held], ridge_direction(trained, config.ridge))
        for i, hit in zip(held, found, strict=True):
            hits[i] = hit
    return hits


def _trained_on_retain(forget: _Choices, retain: _Choices, config: ProbesConfig) -> Score:
    validated = [
        sum(_validated(retain.at(d), config)) / len(retain.questions)
        for d in range(len(config.depths))
    ]
    best = max(range(len(validated)), key=validated.__getitem__)
    direction = ridge_direction(retain.at(best), config.ridge)
    return mean_score(
        "linear probe, trained on retain questions",
        ACCURACY,
        _hits(forget.at(best), direction),
        forget.chance,
        {"depth": config.depths[best], "retain_accuracy": validated[best]},
    )


def _cross_validated(forget: _Choices, config: ProbesConfig) -> Score:
    """Folds of the forget set; the depth of each is chosen on the other folds."""
    hits = [0.0] * len(forget.questions)
    for fold in range(config.folds):
        held = range(fold, len(hits), config.folds)
        trained = [i for i in range(len(hits)) if i not in held]

        def inner(depth: int, trained: list[int] = trained) -> float:
            states = forget.at(depth)
            return sum(_validated([states[i] for i in trained], config))

        best = max(range(len(config.depths)), key=inner)
        states = forget.at(best)
        direction = ridge_direction([states[i] for i in trained], config.ridge)
        for i, hit in zip(held, _hits([states[i] for i in held], direction), strict=True):
            hits[i] = hit
    return mean_score(
        "linear probe, cross-validated on the forget set",
        ACCURACY,
        hits,
        forget.chance,
        {"folds": config.folds},
    )


@torch.no_grad()
def states_at(model: PreTrainedModel, items: Sequence[Tokens], places: Sequence[int]) -> Tensor:
    """Hidden states at one position of each sequence, (sequences, layers + 1, hidden), fp32, CPU.

    Layer 0 is the embedding; the last one is as the output layer gets it.
    """
    found: dict[int, Tensor] = {}
    for batch in batches(items):
        states = _hidden(model, batch)
        rows = torch.arange(len(batch.index))
        at = torch.tensor([places[i] for i in batch.index])
        picked = torch.stack([layer[rows, at].float().cpu() for layer in states], dim=1)
        found.update(zip(batch.index, picked, strict=True))
    if not found:
        return torch.zeros(0, 1, 1)
    return torch.stack([found[i] for i in range(len(items))])


def _hidden(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    output = model.base_model(
        input_ids=batch.ids.to(device),
        attention_mask=batch.attention.to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    states: tuple[Tensor, ...] = output.hidden_states
    return states


# -- the logit lens --------------------------------------------------------------------------------

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm")


def _final_norm(model: PreTrainedModel) -> nn.Module | None:
    for name in _FINAL_NORMS:
        found = getattr(model.base_model, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


@torch.no_grad()
def _lens(model: PreTrainedModel, examples: Sequence[Example], data: AttackData) -> Score | None:
    """Reciprocal rank of the telling token at the layer where it stands highest.

    The layer is the best one for this model on these very questions, an oracle's choice: an upper
    bound, taken alike for every model.
    """
    norm, head = _final_norm(model), model.get_output_embeddings()
    if norm is None:
        return None
    items, places = zip(*[telling_token(e, data) for e in examples], strict=True)
    # The state that predicts a token stands one before it.
    states = states_at(model, items, [place - 1 for place in places])
    wanted = torch.tensor([item.ids[place] for item, place in zip(items, places, strict=True)])
    weight = head.weight
    ranks = []
    for layer in range(states.shape[1]):
        hidden = states[:, layer].to(weight.device, weight.dtype)
        last = layer == states.shape[1] - 1
        logits = head(hidden if last else norm(hidden)).float().cpu()
        own = logits.gather(1, wanted[:, None])
        ranks.append(1 + (logits > own).sum(dim=1))
    reciprocal = torch.stack(ranks).double().reciprocal()
    best = int(reciprocal.mean(dim=1).argmax())
    return mean_score(
        LENS,
        RANK,
        reciprocal[best].tolist(),
        details={"layer": best, "by_layer": reciprocal.mean(dim=1).tolist()},
    )


def telling_token(example: Example, data: AttackData) -> tuple[Tokens, int]:
    """A sequence, and the place of the first token of its answer that tells something.

    That is where the right answer departs from all its perturbed versions, which are worded like
    the paraphrased one; the answer's first token where there are none (or where they depart
    nowhere).
    """
    right = example.paraphrased_answer if example.perturbed_answers else None
    text = right or example.answer
    item, *wrong = data.encode(
        [Example(t, question_of(example)) for t in (text, *example.perturbed_answers)]
    )
    for place in range(item.prompt, len(item.ids)):
        if all(other.ids[place : place + 1] != item.ids[place : place + 1] for other in wrong):
            return (item, place) if wrong else (item, item.prompt)
    return item, item.prompt
