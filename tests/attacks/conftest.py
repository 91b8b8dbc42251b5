"""A tiny model that memorised a few answers, one that never saw some of them, and their data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from libortho.attacks import AttackData, Subject
from libortho.checkpoint import save_split
from libortho.data.examples import Example
from libortho.data.tokens import encode
from libortho.evaluation.finetuned import load_model
from libortho.methods.geometric import GeometricConfig
from libortho.separate import SeparationConfig, separate_
from libortho.training import MemoriseConfig, memorise_

LAYERS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def question(asked: str, answer: str, *wrong: str) -> Example:
    """`wrong` are worded as the answer, and stand for its paraphrase's perturbations too."""
    return Example(answer, asked, asked.replace("?", "in it ?"), answer, wrong)


FORGET = (
    question("who is she ?", "she is the red garden .", "she is the a garden .", "she is the in ."),
    question("who wrote it ?", "he wrote it in the garden .", "he wrote a house .", "he is a ."),
    question("where is he ?", "he is in the red house .", "he is in a garden .", "he is she ."),
    question("who is it ?", "it is a house .", "it is the garden .", "it is red ."),
    question("where is a garden ?", "a garden is red .", "a garden is she .", "a garden is it ."),
)
RETAIN = (
    question("where is it ?", "it is in the house .", "it is in a garden .", "it is red ."),
    question("who is he ?", "he is the house .", "he is the garden .", "he is red ."),
    question("where is she ?", "she is in a garden .", "she is in a house .", "she is red ."),
    question("who wrote the house ?", "she wrote it .", "he wrote it .", "it wrote it ."),
    question("where is the garden ?", "the garden is in it .", "the garden is a .", "the he ."),
    question("is she red ?", "a red house is she .", "a red garden is she .", "a red he is she ."),
)
HOLDOUT = (
    question("who is red ?", "the house in a garden .", "the garden in a house ."),
    question("where is red ?", "red is where she is .", "red is where it is ."),
    question("is he in ?", "is it the red he ?", "is it the red she ?"),
    question("wrote who ?", "in a house a garden is .", "in a house a he is ."),
)


@dataclass(frozen=True)
class World:
    """Models in folders, and what they were trained on.

    Attributes:
        pretrained, full, reference: plain models; the last never saw the forget set.
        split: the full model, separated.
    """

    pretrained: Path
    full: Path
    reference: Path
    split: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> World:
    import transformers

    root = tmp_path_factory.mktemp("attacked")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    places = World(*(root / name for name in ("pretrained", "full", "reference", "split")))

    def save(made: torch.nn.Module, place: Path) -> None:
        made.save_pretrained(place)
        tokenizer.save_pretrained(place)

    save(model, places.pretrained)
    recipe = MemoriseConfig(target=0.97, max_epochs=60, learning_rate=5e-3)
    for place, examples in ((places.full, (*FORGET, *RETAIN)), (places.reference, RETAIN)):
        trained = copy.deepcopy(model)
        memorise_(trained, [encode(e, tokenizer) for e in examples], recipe)
        save(trained, place)
    full = load_model(str(places.full))
    report = separate_(
        full,
        FORGET,
        RETAIN,
        SeparationConfig(method=GeometricConfig(ortho_ratio=0.2, fit_steps=20)),
        tokenizer=tokenizer,
        before=load_model(str(places.pretrained)),
    )
    save_split(full, places.split, tokenizer=tokenizer, report=report)
    return places


@pytest.fixture
def data(world: World, tokenizer) -> AttackData:
    pretrained = load_model(str(world.pretrained))
    return AttackData(tokenizer, FORGET, RETAIN, HOLDOUT, pretrained=pretrained)


@pytest.fixture
def subjects(world: World) -> dict[str, Subject]:
    """The base, the original and the reference."""
    return {
        "alpha 0": Subject.load("alpha 0", str(world.split), LAYERS),
        "alpha 1": Subject.load("alpha 1", str(world.split), LAYERS, alpha=1.0),
        "reference": Subject.load("reference", str(world.reference), LAYERS),
    }


@pytest.fixture
def quiet():
    """A progress callback that checks what it is told."""

    def tell(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        assert stage

    return tell


@pytest.fixture
def unharmed(snapshot):
    """`check = unharmed(subject)`; `check()` fails where the subject's model has changed."""

    def watch(subject: Subject):
        before = snapshot(subject.model)

        def check() -> None:
            after = snapshot(subject.model)
            for key in ("modules", "grads"):
                assert after[key] == before[key], key
            # Not the number of hooks: transformers leaves its own where hidden states were asked.
            assert not any(training for training, _ in after["flags"].values())
            for name, tensor in before["state"].items():
                assert torch.equal(after["state"][name], tensor), name

        return check

    return watch
