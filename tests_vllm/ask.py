"""Run vLLM's own engine on an export and print what it says: a process of its own for each.

    python ask.py EXPORT < requests.json > answers.json

requests.json: {"adapters": [names], "generate": [[prompt ids, adapter or null], ...]}; all of
"generate" is one batch. answers.json: one {"text", "ids", "logprobs"} each, greedy: the
ids that follow the prompt, and the log-probability of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENGINE = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
}

LORA = {
    "enable_lora": True,
    "max_lora_rank": 64,
    # One more than there are adapters: see `test_why_there_must_be_a_spare_slot`.
    "max_loras": 3,
}


def main(folder: Path) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    llm = LLM(str(folder / "base"), **ENGINE, **(LORA if asked["adapters"] else {}))
    adapters = {
        name: LoRARequest(name, number, str(folder / name))
        for number, name in enumerate(asked["adapters"], start=1)
    }
    adapters[None] = None
    spoken = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in asked["generate"]],
        SamplingParams(temperature=0, max_tokens=32, logprobs=1),
        lora_request=[adapters[name] for _, name in asked["generate"]],
        use_tqdm=False,
    )
    answers = []
    for output in (request.outputs[0] for request in spoken):
        ids = list(output.token_ids)
        chosen = [scores[i].logprob for i, scores in zip(ids, output.logprobs, strict=True)]
        answers.append({"text": output.text, "ids": ids, "logprobs": chosen})
    return answers


if __name__ == "__main__":
    # vLLM logs to standard output: the answers go to what that was, and the logs elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(main(Path(sys.argv[1])), answers)
    answers.close()
