"""Building the C++ operators: what is asked of the machine, what is said without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from libortho.kernels import native
from libortho.kernels.native import __main__ as command


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path)
    return tmp_path


def test_without_a_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.BuildError, match="no C\\+\\+ compiler: set CXX"):
        native.build()
    command.main()
    assert "PyTorch's own serve here" in capsys.readouterr().out
    assert not native.library_path().exists()


def test_a_compiler_that_fails_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = empty_cache / "broken-c++"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.BuildError, match="no such header"):
        native.build()
    assert list(native.library_path().parent.iterdir()) == []


def test_a_finished_build_is_moved_into_place_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = empty_cache / "fake-c++"
    program.write_text(
        '#!/bin/sh\necho x >> "$(dirname "$0")/calls"\n'
        'while [ "$1" != "-o" ]; do shift; done\necho library > "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    first, second = native.build(), native.build()
    assert first == second == native.library_path()
    assert first.read_text() == "library\n"
    assert (empty_cache / "calls").read_text() == "x\n"
    assert os.listdir(first.parent) == [first.name]


def test_too_old_a_torch(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.torch, "__version__", "2.6.0+cpu")
    monkeypatch.setattr(native, "compiler", lambda: "c++")
    with pytest.raises(native.BuildError, match=r"2\.6\.0"):
        native.build()
    assert not native.available.__wrapped__()


@pytest.mark.parametrize("what", ["source", "flags", "torch", "processor"])
def test_the_name_depends_on_what_the_library_depends_on(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = native.library_path()
    if what == "source":
        for source in Path(native._FOLDER).iterdir():
            if source.suffix in (".h", ".cpp"):
                (tmp_path / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        assert native.library_path() == before
        with (tmp_path / "rows.h").open("a") as file:
            file.write("// changed\n")
    elif what == "flags":
        monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    elif what == "torch":
        monkeypatch.setattr(native.torch, "__version__", "2.99.0")
    else:
        monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native.library_path() != before
