"""Requests made from the OpenAPI document find no crash and no undocumented answer.

More of them: `make schemathesis`.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from libortho.serve.limits import Limits

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("LIBORTHO_SCHEMATHESIS_EXAMPLES", "12"))
"""Requests per route and mode."""


def test_the_document_holds_what_is_served(running) -> None:
    import httpx2

    document = httpx2.get(f"{running.url}/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/models", "/v1/models/{model}",
        "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["properties"]["alpha"]["maximum"] == 1
    assert chat["additionalProperties"] is False
    assert "422" not in document["paths"]["/v1/chat/completions"]["post"]["responses"]


@pytest.mark.parametrize("most", [1, 7, 16])
def test_the_document_says_how_many_answers_a_request_may_ask_for(most: int) -> None:
    from libortho.serve.openapi import _answers

    said = [
        (part["properties"]["prompt"]["anyOf"][-1]["maxItems"],
         part["properties"]["n"]["anyOf"][0]["maximum"])
        for part in _answers(most)
    ]  # fmt: skip
    for prompts in range(1, 20):
        for n in range(1, 20):
            allowed = any(prompts <= p and n <= largest for p, largest in said)
            assert allowed == (prompts * n <= most)


def test_schemathesis_finds_nothing(running) -> None:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            _try(operation, mode)


def _try(operation, mode) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), small=st.integers(1, 3))
    def check(case, small) -> None:
        # Short answers: what is tested is the door, not the model.
        makes_text = operation.path.endswith("completions") and isinstance(case.body, dict)
        if mode is schemathesis.GenerationMode.POSITIVE and makes_text:
            for name in ("max_tokens", "max_completion_tokens"):
                if name in case.body or name == "max_tokens":
                    case.body[name] = small
        response = case.call(timeout=60)
        if response.status_code == 413:  # documented, but not among what it expects of bad data
            assert len(response.request.body) > Limits().body_bytes
            return
        case.validate_response(response)

    try:
        check()
    except schemathesis.core.errors.InvalidSchema:
        raise
    except Exception as error:
        if type(error).__name__ in ("Unsatisfiable", "SkipTest"):
            return  # nothing can be wrong about a route without parameters
        raise
