"""`libortho eval`: how well a split model knows a text, at each alpha."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from libortho.alpha import alpha_scope, check_alpha
from libortho.data.examples import read_jsonl, read_words
from libortho.data.tokens import Template, Tokens, encode
from libortho.errors import DataError
from libortho.scoring import answer_probability, perplexity, sequence_nll

WINDOW = 512
"""Tokens per sequence into which a plain text file is cut."""


def parse_alphas(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0], each checked.

    Raises:
        ValueError: not comma-separated numbers in [0, 1].
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--alpha {text!r}: expected numbers with commas, such as 0,0.5,1"
        ) from None
    return [check_alpha(value).rows[0] for value in values]


def read_text(path: Path, tokenizer: Any, template: Template) -> list[Tokens]:
    """The sequences of a JSONL file, or of a plain text file (any other suffix) in windows.

    Raises:
        DataError, FileNotFoundError: as `read_jsonl` and `read_words`, or as `text_windows`.
    """
    if path.suffix.lower() in (".jsonl", ".json"):
        return [encode(example, tokenizer, template) for example in read_jsonl(path)]
    text = read_words(path)
    try:
        return text_windows(text, tokenizer)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def text_windows(text: str, tokenizer: Any) -> list[Tokens]:
    """A running text as sequences of at most `WINDOW` tokens, each predicted but for its first.

    Raises:
        DataError: the text is of fewer than two tokens.
    """
    ids = tokenizer(text).input_ids
    windows = [tuple(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]
    items = [Tokens(window) for window in windows if len(window) > 1]
    if not items:
        raise DataError(f"{len(ids)} token(s), expected at least 2")
    return items


def evaluate_text(
    model: PreTrainedModel,
    items: Sequence[Tokens],
    alphas: Sequence[float],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """{"perplexity": {alpha: value}, "probability": {alpha: value}, "tokens": n, "sequences": n}.

    Args:
        items: as of `read_text`.

    Raises:
        OrthoStreamMissing: an alpha above 0 of a base-only checkpoint.
    """
    result: dict[str, Any] = {
        "sequences": len(items),
        "tokens": sum(item.targets for item in items),
        "perplexity": {},
        "probability": {},
    }
    with alpha_scope(model, max(alphas)):
        pass  # what cannot be measured at all of them is refused before it is at any
    for done, alpha in enumerate(alphas):
        progress("evaluate", done, len(alphas))
        with alpha_scope(model, alpha):
            nll = sequence_nll(model, items)
        result["perplexity"][str(alpha)] = perplexity(nll)
        result["probability"][str(alpha)] = answer_probability(nll)
    progress("evaluate", len(alphas), len(alphas))
    return result
