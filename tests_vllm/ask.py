"""Run vLLM's own engine on an export and print what it says: a process of its own for each.

    python ask.py EXPORT < requests.json > answers.json

requests.json: {"adapters": [names], "generate": [[prompt, adapter or null], ...],
"score": [[ids, prompt_tokens, adapter or null], ...]}. All of "generate" is one batch, all of
"score" another. answers.json: {"texts": [...], "nll": [mean NLL of the ids after the prompt, ...]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENGINE = {
    "enable_lora": True,
    "max_lora_rank": 64,
    # One more than there are adapters: see `test_why_there_must_be_a_spare_slot`.
    "max_loras": 3,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
}


def main(folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    llm = LLM(str(folder / "base"), **ENGINE)
    adapters = {
        name: LoRARequest(name, number, str(folder / name))
        for number, name in enumerate(asked["adapters"], start=1)
    }
    adapters[None] = None
    spoken = llm.generate(
        [prompt for prompt, _ in asked["generate"]],
        SamplingParams(temperature=0, max_tokens=32),
        lora_request=[adapters[name] for _, name in asked["generate"]],
        use_tqdm=False,
    )
    scored = llm.generate(
        [{"prompt_token_ids": ids} for ids, _, _ in asked["score"]],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        lora_request=[adapters[name] for _, _, name in asked["score"]],
        use_tqdm=False,
    )
    nll = []
    for (ids, start, _), output in zip(asked["score"], scored, strict=True):
        losses = [-output.prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids))]
        nll.append(sum(losses) / len(losses))
    return {"texts": [output.outputs[0].text for output in spoken], "nll": nll}


if __name__ == "__main__":
    # vLLM logs to standard output: the answers go to what that was, and the logs elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(main(Path(sys.argv[1])), answers)
    answers.close()
