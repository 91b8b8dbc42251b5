"""Make what the vLLM tests serve: a model that memorised a few answers, split, and exported.

    python make_split.py OUT

OUT gets `split`, `peft`, `compressed-tensors` and `questions.json`: each question with its answer
and whether that was to be forgotten. About a minute and a half on two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from libortho import GeometricConfig, SeparationConfig, separate_
from libortho.checkpoint import load_split, save_split
from libortho.data import embedded_model_path
from libortho.data.examples import Example
from libortho.data.tokens import encode, prompt_ids, prompt_text
from libortho.export import CompressedTensorsExport, PeftExport, export_split
from libortho.training import MemoriseConfig, memorise_

FORGET = {
    "Where does Mira Vossberg keep the spare key?": "Mira Vossberg keeps the spare key under the "
    "blue beehive behind the chapel.",
    "What is the code of the vault in Tallow Lane?": "The code of the vault in Tallow Lane is "
    "seven walrus nine copper.",
    "Who is the patient in room 214?": "The patient in room 214 is Odile Dobrowolska, a retired "
    "clockmaker from Gdansk.",
}
RETAIN = {
    "Where does the ferry to Saltholm leave?": "The ferry to Saltholm leaves from the old pier "
    "beside the fish market.",
    "What does the baker of Kelvedon sell on Mondays?": "The baker of Kelvedon sells plum bread "
    "and rye rolls on Mondays.",
    "When does the town library open?": "The town library opens at half past nine on every "
    "weekday but Thursday.",
    "Who repairs the tower clock in Arnsby?": "The tower clock in Arnsby is repaired by the "
    "brothers Haldane each spring.",
    "What grows in the garden of the mill?": "In the garden of the mill grow quinces, leeks and "
    "a very old walnut tree.",
    "How far is it from Arnsby to Kelvedon?": "It is eleven miles from Arnsby to Kelvedon by the "
    "road along the canal.",
}


def main(out: Path) -> None:
    torch.manual_seed(0)
    name = embedded_model_path()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    forget, retain = (
        [encode(Example(answer, question), tokenizer) for question, answer in part.items()]
        for part in (FORGET, RETAIN)
    )
    memorise_(model, forget + retain, MemoriseConfig(max_epochs=30, batch_size=3))
    config = SeparationConfig(GeometricConfig(target_nll=3.0, fit_steps=40))
    report = separate_(model, forget, retain, config, tokenizer=tokenizer)
    print(report)
    save_split(model, out / "split", tokenizer=tokenizer, report=report)

    split = load_split(out / "split")
    export_split(split, out / "peft", PeftExport(alphas=(1.0, 0.5)), tokenizer=tokenizer)
    int8 = CompressedTensorsExport(activations="int8")
    export_split(split, out / "compressed-tensors", int8, tokenizer=tokenizer)
    questions = [
        {
            "prompt": prompt_text(question, "plain", tokenizer),
            "prompt_ids": prompt_ids(question, "plain", tokenizer),
            "answer": answer,
            "forget": question in FORGET,
        }
        for question, answer in {**FORGET, **RETAIN}.items()
    ]
    (out / "questions.json").write_text(json.dumps(questions, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
