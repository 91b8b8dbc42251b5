"""OpenAI's requests and responses, as far as they are served; anything else is refused by name.

`alpha` is the one addition. A parameter that would be ignored is not accepted: a caller who sets
`tools` or a penalty should learn that nothing will come of it. (`user`, `metadata` and `store`
change no answer, so they may be there.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    # JSON does not tell 15.0 from 15.
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Alpha = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
LONGEST = 1_000_000
"""Characters of one text; the bound on the body is usually met first."""
Text = Annotated[str, Field(max_length=LONGEST)]
Filled = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Zero = Annotated[float, Field(ge=0, le=0)]
"""A penalty that is none."""
Model = Annotated[str, Field(min_length=1, max_length=256)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: Filled


class ChatMessage(_Request):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Filled | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Request):
    """Options of a stream."""

    include_usage: bool = False


class _Sampled(_Request):
    model: Model
    alpha: Alpha = 0.0
    """How much of what was memorised may be used; 0, the default, uses none."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    # Whole numbers that every JSON reader keeps exactly (RFC 8259, section 6).
    seed: Annotated[int, Field(gt=-(2**53), lt=2**53), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: (
        Filled
        | Annotated[list[Filled], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=LONGEST)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=128),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None


class ScoreRequest(_Request):
    """POST /v1/score: how likely a given completion is, token by token, at several alphas."""

    # Said in the document, too: one of the two, and it is not null.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: Model
    prompt: Filled | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)] | None = None
    completion: Filled
    alphas: Annotated[list[Alpha], Field(min_length=1, max_length=32)] = [0.0]


# -- responses -----------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatChoice(BaseModel):
    """One answer of a conversation."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    alpha: float
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The response of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    alpha: float
    choices: list[TextChoice]
    usage: Usage


class AlphaScore(BaseModel):
    """The log-probability of each token at one alpha, nats."""

    alpha: float
    logprobs: list[float]


class Score(BaseModel):
    """The response of /v1/score."""

    object: Literal["score"]
    model: str
    tokens: list[str]
    data: list[AlphaScore]
    prompt_tokens: int


class ModelCard(BaseModel):
    """A model; `max_alpha` is what the caller may have now."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_alpha: float


class ModelList(BaseModel):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """The response of /healthz and /readyz."""

    status: Literal["ok", "degraded", "unavailable"]
    ortho: Literal["present", "missing", "unusable", "locked"]
    max_alpha: float
    policy: Literal["ok", "stale"]
    audit: Literal["ok", "failing"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorDetail
