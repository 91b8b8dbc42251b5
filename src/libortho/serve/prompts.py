"""From what a request holds to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from libortho.data.tokens import Template, prompt_ids
from libortho.serve.engine import Message, Prompt
from libortho.serve.errors import bad_request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
