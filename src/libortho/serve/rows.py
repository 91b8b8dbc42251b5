"""The rows of one running batch: each answer's own KV cache, own position and own alpha.

Rows are padded to the left, so that all of them write the same column next. A row's cache is
filled by its own prompt at its own alpha and thrown away with the row: there is no prefix cache,
and no entry of one row is ever read by another (the attention of a batch never crosses rows).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from libortho.alpha import alpha_scope, ortho_layers
from libortho.data.tokens import Tokens
from libortho.scoring import last_position
from libortho.serve.sampling import LEAST_LOGPROB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_AT_ONCE = 256
"""Tokens of a given text whose logits are in memory together."""


class RunningRows:
    """A batch that rows join and leave between two steps.

    Attributes:
        alphas: of each row.
        attention: (rows, columns) int64, 1 where a row's token stands, 0 where it is padded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.alphas: list[float] = []
        self.attention = torch.zeros(0, 0, dtype=torch.long)
        self._cache: Any = None
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self._last_only = last_position(model)

    def __len__(self) -> int:
        return len(self.alphas)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]], alphas: Sequence[float]) -> Tensor:
        """Run the prompts of new rows, which come after those that are there.

        Args:
            prompts: token ids, at least one each.
            alphas: one for each prompt.

        Returns:
            Logits of what follows each prompt, (new rows, vocabulary).
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        positions = (attention.cumsum(dim=1) - 1).clamp_min(0)
        cache = new_cache()
        logits = self._forward(ids, attention, positions, alphas, cache)
        if self._cache is None:
            self._cache, self.attention = cache, attention
        else:
            columns = max(longest, self.attention.shape[1])
            _merge(self._cache, cache, columns)
            self.attention = torch.cat([_widen(x, columns) for x in (self.attention, attention)])
        self.alphas += alphas
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to every row.

        Returns:
            Logits of what follows, (rows, vocabulary).
        """
        self.attention = pad(self.attention, (0, 1), value=1)
        positions = self.attention.sum(dim=1, keepdim=True) - 1
        ids = torch.tensor(tokens).unsqueeze(1)
        return self._forward(ids, self.attention, positions, self.alphas, self._cache)

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Append given tokens to the one row that there is.

        Returns:
            Logits of what follows each of them, (tokens, vocabulary).
        """
        assert len(self) == 1, "rows of several lengths are not padded here"
        self.attention = pad(self.attention, (0, len(tokens)), value=1)
        positions = torch.arange(self.attention.shape[1])[None, -len(tokens) :]
        ids = torch.tensor([list(tokens)])
        return self._forward(ids, self.attention, positions, self.alphas, self._cache, last=False)[
            0
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (in rising order), with their caches."""
        if len(rows) == len(self):
            return
        if not rows:
            self.clear()
            return
        index = torch.tensor(rows)
        self.alphas = [self.alphas[i] for i in rows]
        attention = self.attention[index]
        # Columns that only rows which left had written.
        empty = int(attention.any(dim=0).int().argmax())
        self.attention = attention[:, empty:]
        for layer in self._cache.layers:
            place = index.to(layer.keys.device)
            layer.keys = layer.keys[place][:, :, empty:]
            layer.values = layer.values[place][:, :, empty:]

    def clear(self) -> None:
        """Drop all rows."""
        self.alphas, self._cache = [], None
        self.attention = torch.zeros(0, 0, dtype=torch.long)

    def _forward(
        self,
        ids: Tensor,
        attention: Tensor,
        positions: Tensor,
        alphas: Sequence[float],
        cache: Any,
        last: bool = True,
    ) -> Tensor:
        """Logits of the last position, (rows, vocabulary), or of all, (rows, length, ...)."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        device = weight.device
        more = dict(self._last_only) if last else {}
        if self._positions:
            more["position_ids"] = positions.to(device)
        with scope_of_rows(self.model, alphas):
            output = self.model(
                input_ids=ids.to(device),
                attention_mask=attention.to(device),
                past_key_values=cache,
                use_cache=True,
                **more,
            )
        logits: Tensor = output.logits
        return logits[:, -1] if last else logits


def given_logprobs(model: PreTrainedModel, tokens: Tokens, alpha: float) -> Iterator[list[float]]:
    """Log-probabilities of the predicted tokens of a sequence, in nats, some at a time.

    Between two parts anything else may run. The first costs as much as the prompt of an answer, the
    others read at most `READ_AT_ONCE` tokens: whatever the length, no more logits are in memory.
    """
    row = RunningRows(model)
    given = tokens.ids[tokens.prompt :]
    logits = row.join([tokens.ids[: tokens.prompt]], [alpha])
    yield _logprobs(logits, given[:1])
    for start in range(0, len(given) - 1, READ_AT_ONCE):
        labels = given[start + 1 : start + 1 + READ_AT_ONCE]
        logits = row.read(given[start : start + len(labels)])
        yield _logprobs(logits, labels)


def _logprobs(logits: Tensor, labels: Sequence[int]) -> list[float]:
    wanted = torch.tensor(labels, device=logits.device)
    nll = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    found: list[float] = (-nll).clamp_min(LEAST_LOGPROB).tolist()
    return found


@contextmanager
def scope_of_rows(model: nn.Module, alphas: Sequence[float]) -> Iterator[None]:
    """`alpha_scope` with a value a row, or one value where all rows agree."""
    one = len(set(alphas)) == 1
    with alpha_scope(model, alphas[0] if one else torch.tensor(alphas, dtype=torch.float64)):
        yield


def new_cache() -> Any:
    """An empty KV cache whose layers all keep every position, (rows, heads, columns, head_dim).

    Without the model's config on purpose: a sliding layer would throw positions away column by
    column, which is wrong for rows that start at different columns. The mask still slides.
    """
    from transformers import DynamicCache

    return DynamicCache()


def _merge(cache: Any, other: Any, columns: int) -> None:
    """Append the rows of `other` to `cache`, both widened to `columns`."""
    for mine, new in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (mine, new)]
            parts = [pad(x, (0, 0, columns - x.shape[2], 0)) for x in parts]
            setattr(mine, name, torch.cat(parts))


def _widen(attention: Tensor, columns: int) -> Tensor:
    return pad(attention, (columns - attention.shape[1], 0))


@torch.no_grad()
def check_model(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether rows of one batch may have different alphas in this model.

    They may where every split layer sees all rows of a batch, in order. A layer of an expert, which
    sees the tokens routed to it, does not: alpha by row would then scale the wrong tokens, and the
    engine makes batches of one alpha.

    Raises:
        ValueError: the model keeps a state that is no plain KV cache.
    """
    from transformers.cache_utils import DynamicLayer

    rows, columns = 3, 5
    shapes: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for name, layer in ortho_layers(model).items():
        shapes[name] = []
        seen = shapes[name]
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        )
    try:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (rows, columns), generator=generator)
        probe = RunningRows(model)
        probe.join(ids.tolist(), [0.0] * rows)
    finally:
        for handle in handles:
            handle.remove()
    layers = getattr(probe._cache, "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["nothing"]
        raise ValueError(
            f"{type(model).__name__} keeps {', '.join(kinds)} between tokens: expected a plain KV "
            "cache in every layer"
        )
    whole = {(rows, columns), (rows, 1), (rows * columns,)}  # (rows, 1): a head at the last token
    return all(len(seen) == 1 and tuple(seen[0][:-1]) in whole for seen in shapes.values())
