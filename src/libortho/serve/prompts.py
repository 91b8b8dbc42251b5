"""From what a request holds to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from libortho.data.tokens import Template, prompt_ids
from libortho.serve.engine import Message, Prompt, Scoring
from libortho.serve.errors import ApiError, bad_request
from libortho.serve.limits import Limits
from libortho.serve.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template: Template, vocabulary: int
) -> tuple[int, ...]:
    """Token ids of a prompt.

    Args:
        template: how a conversation becomes text: "chat" is the tokenizer's own template, "plain"
            is `Question: ...\\nAnswer:` around the one question.
        vocabulary: rows of the model's embedding.

    Raises:
        ApiError: an id beyond the vocabulary, no chat template, a conversation that the template
            does not take, or a prompt of no tokens.
    """
    if prompt.ids is not None:
        ids = prompt.ids
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise bad_request(f"token id {wrong} is outside the vocabulary of {vocabulary}")
    elif prompt.text is not None:
        ids = tuple(tokenizer(prompt.text).input_ids)
    else:
        ids = _conversation(prompt.messages or (), tokenizer, template)
    if not ids:
        raise bad_request("the prompt is empty: expected at least one token")
    return ids


def _conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[int, ...]:
    if template == "plain":
        if len(messages) != 1 or messages[0].role != "user":
            raise bad_request(
                "this server asks one question at a time (template plain): expected one message "
                "of the user",
                "messages",
            )
        return prompt_ids(messages[0].content, "plain", tokenizer)
    if not tokenizer.chat_template:
        raise bad_request("this model has no chat template: use /v1/completions", "messages")
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises on a conversation it does not take
        raise bad_request(
            f"the model's chat template refuses this conversation ({type(error).__name__})",
            "messages",
        ) from None
    return tuple(tokenizer(str(text), add_special_tokens=False).input_ids)


class BoundedEncoder:
    """Text of requests to token ids, within the bounds of a model and of its server.

    Whatever is too long is refused, as soon as it can be known.

    Args:
        model: a causal LM.
        tokenizer: the model's.
        limits: the server's.
        template: see `encode_prompt`.

    Attributes:
        vocabulary: rows of the model's embedding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        template: Template,
    ) -> None:
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.vocabulary = weight.shape[0]
        self._tokenizer, self._limits, self._template = tokenizer, limits, template
        context = int(getattr(model.config, "max_position_embeddings", limits.batch_tokens))
        self._longest = min(context, limits.batch_tokens)
        # What no tokenizer of this vocabulary could bring within bounds is not even encoded.
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def check_characters(self, prompt: Prompt, completion: str = "") -> None:
        """Raise ApiError where a text is too long to be worth encoding."""
        characters = len(prompt.text or "") + sum(len(m.content) for m in prompt.messages or ())
        bounds = (
            ("prompt", characters, min(self._limits.prompt_tokens, self._longest)),
            ("completion", len(completion), self._limits.max_tokens),
        )
        for name, count, tokens in bounds:
            most = tokens * self._longest_token
            if count > most:
                raise _too_long(f"a {name} of {count} characters", most)

    def room(self, prompt: int, wanted: int | None) -> int:
        """Tokens that the answer to a prompt of so many tokens may have.

        Raises:
            ApiError: prompt and answer together are too long.
        """
        self._check_length(prompt + (1 if wanted is None else wanted))
        if wanted is not None:
            return wanted
        return min(self._limits.default_tokens, self._longest - prompt)

    def prompts(self, prompts: Sequence[Prompt]) -> dict[Prompt, tuple[int, ...]]:
        """Each prompt's ids.

        Raises:
            ApiError: as `encode_prompt`, or too many tokens.
        """
        return {prompt: self._prompt(prompt) for prompt in prompts}

    def scoring(self, work: Scoring) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
        """Ids of the prompt and of the completion, and the text of each of the latter.

        Raises:
            ApiError: as `prompts`, no completion, or too much of it.
        """
        head = self._prompt(work.prompt)
        tail = tuple(self._tokenizer(work.completion, add_special_tokens=False).input_ids)
        if not tail:
            raise bad_request("the completion is empty: expected at least one token", "completion")
        if len(tail) > self._limits.max_tokens:
            count, most = len(tail), self._limits.max_tokens
            raise _too_long(f"a completion of {count} tokens", most, "completion")
        self._check_length(len(head) + len(tail))
        text = TextStream(self._tokenizer)
        texts = [text.push(token) for token in tail]
        texts[-1] += text.finish()
        return head, tail, tuple(texts)

    def _prompt(self, prompt: Prompt) -> tuple[int, ...]:
        ids = encode_prompt(prompt, self._tokenizer, self._template, self.vocabulary)
        if len(ids) > self._limits.prompt_tokens:
            raise _too_long(f"a prompt of {len(ids)} tokens", self._limits.prompt_tokens)
        return ids

    def _check_length(self, length: int) -> None:
        if length > self._longest:
            raise _too_long(f"{length} tokens, prompt and answer together", self._longest)


def _too_long(what: str, most: int, parameter: str | None = None) -> ApiError:
    message = f"{what}: expected at most {most}"
    return bad_request(message, parameter, "context_length_exceeded")
