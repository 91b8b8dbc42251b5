"""The README's Python, run as it stands, and its shell commands, held against `--help`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from libortho.alpha import ortho_layers
from libortho.cli import app


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_wheel")
def test_the_python_of_the_readme_runs(repository: Path) -> None:
    (source,) = blocks((repository / "README.md").read_text("utf-8"), "python")
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["report"].layers  # type: ignore[attr-defined]
    assert len(ortho_layers(names["model"])) == 30  # type: ignore[arg-type]


def test_the_commands_of_the_readme_exist(repository: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^    libortho (.*)$", (repository / "README.md").read_text("utf-8"), re.M)
    assert len(lines) >= 4
    for line in lines:
        words = line.split("  ")[0].split()
        known = {name for option in commands[words[0]].params for name in option.opts}
        wrong = [word for word in words if word.startswith("--") and word not in known]
        assert not wrong, f"libortho {line}: {wrong} is no option of {words[0]}"


def test_every_target_the_readme_names_is_in_the_makefile(repository: Path) -> None:
    readme, makefile = (
        (repository / name).read_text("utf-8") for name in ("README.md", "Makefile")
    )
    targets = set(re.findall(r"\bmake ([a-z-]+)", readme))
    assert targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
