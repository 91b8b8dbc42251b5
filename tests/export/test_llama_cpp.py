"""The target gguf in llama.cpp itself: alpha is the adapter's scale, per request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from libortho import alpha_scope
from libortho.export import GgufExport, export_split

llama_cpp = pytest.importorskip("xllamacpp")

VOCABULARY = 300
PROMPT = [1, 40, 200, 17, 99, 7, 23]


def serve(folder: Path) -> Any:
    """A llama.cpp server with both files, the adapter at scale 0 until a request says more."""
    params = llama_cpp.CommonParams()
    params.model.path = str(folder / "base.gguf")
    params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(folder / "ortho.gguf"), 0.0)]
    params.n_ctx = 64
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    return llama_cpp.Server(params)


def next_token(server: Any, **options: Any) -> torch.Tensor:
    """The logarithms of the next token's probabilities, (vocabulary,)."""
    answer = server.handle_completions(
        {
            "prompt": PROMPT,
            "max_tokens": 1,
            "temperature": 0.0,
            "n_probs": VOCABULARY,
            "cache_prompt": False,
            **options,
        }
    )
    (first,) = answer["choices"][0]["logprobs"]["content"]
    found = torch.full((VOCABULARY,), torch.nan)
    for entry in first["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_alpha_is_the_scale_of_a_request(family, families, split, bpe, tmp_path: Path) -> None:
    model = families[family].build(vocab_size=VOCABULARY)
    # q_proj: a Llama's rows are in another order there, in the adapter too.
    split(model, ("q_proj", "down_proj"))
    export_split(model, tmp_path / "out", GgufExport(storage="f32"), tokenizer=bpe)
    server = serve(tmp_path / "out")
    seen = []
    for alpha in (1.0, 0.0, 0.4):
        with alpha_scope(model, alpha), torch.no_grad():
            logits = model(torch.tensor([PROMPT])).logits[0, -1]
        found = next_token(server, lora=[{"id": 0, "scale": alpha}])
        torch.testing.assert_close(found, logits.log_softmax(-1), atol=0.02, rtol=0.0)
        seen.append(found)
    assert float((seen[0] - seen[1]).abs().max()) > 0.5
    assert torch.equal(next_token(server), seen[1])  # a request that says nothing is private
