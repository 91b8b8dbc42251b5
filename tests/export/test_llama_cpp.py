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
ALPHAS = (1.0, 0.0, 0.4)


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


def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    """What the split model says of the next token: log-probabilities, (alphas, vocabulary)."""
    with alpha_scope(model, list(ALPHAS)), torch.no_grad():
        return model(torch.tensor([prompt] * len(ALPHAS))).logits[:, -1].log_softmax(-1)


def next_token(server: Any, prompt: list[int], **options: Any) -> torch.Tensor:
    """The logarithms of the next token's probabilities, (vocabulary,)."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
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
    # llama.cpp lists no probabilities of a token without text: a special one, part of a letter.
    names = bpe.convert_ids_to_tokens(range(len(bpe)))
    written = {i for i, name in enumerate(names) if i > 2 and name.isascii()}
    prompts = ([1, 40, 200, 17, first, last] for first in range(3, 99) for last in range(3, 290))
    prompt = next(p for p in prompts if set(reference(model, p).argmax(-1).tolist()) <= written)
    wanted = reference(model, prompt)
    for alpha, expected in zip(ALPHAS, wanted, strict=True):
        found = next_token(server, prompt, lora=[{"id": 0, "scale": alpha}])
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)
    assert float((wanted[0] - wanted[1]).abs().max()) > 0.5
    private = next_token(server, prompt)  # of a request that says nothing
    torch.testing.assert_close(private, wanted[1], atol=0.02, rtol=0.0)
