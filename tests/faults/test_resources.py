"""Memory that runs out, folders that cannot be written, and two writers of one folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import libortho
from libortho.checkpoint import save_split, verify_split

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resource limits as on Linux")


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.fixture
def split(tiny_llama, large_ortho, tmp_path: Path) -> Path:
    """A split in tmp_path/work/split."""
    model = libortho.replace_linear_layers(tiny_llama())
    large_ortho(model)
    save_split(model, tmp_path / "work" / "split")
    return tmp_path / "work" / "split"


NO_MEMORY = """
import resource, sys
from libortho.checkpoint import load_split, save_split
folder = sys.argv[1]
model = load_split(folder)
# 64 MiB, twice: more than the allocator keeps for later when it is freed.
model.resize_token_embeddings(2**19)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**20,) * 2)
try:
    save_split(model, folder)
    print("saved")
except (MemoryError, OSError, RuntimeError) as error:
    print(type(error).__name__)
"""


# Root writes everywhere, so that a test that runs as root gives it up, once all is imported.
READ_ONLY = """
import os, shutil, sys, tempfile
from pathlib import Path
from libortho.checkpoint import load_split, save_split
model = load_split(sys.argv[1])
place = Path(tempfile.mkdtemp())
save_split(model, place / "split")
def files():
    # Not the ortho's, which root alone may read.
    paths = (p for p in place.rglob("*") if p.is_file() and "ortho" not in p.name)
    return {p: p.read_bytes() for p in paths}
if os.geteuid() == 0:
    os.chmod(place, 0o755)
    os.seteuid(65534)
else:
    os.chmod(place, 0o500)
before = files()
try:
    save_split(model, place / "split")
    print("saved")
except PermissionError:
    print("PermissionError", files() == before and os.listdir(place) == ["split"])
os.seteuid(os.getuid())
os.chmod(place, 0o700)
shutil.rmtree(place)
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (NO_MEMORY, ("MemoryError", "OSError", "RuntimeError")),
        (READ_ONLY, ("PermissionError True",)),
    ],
    ids=["no memory", "read-only"],
)
def test_a_save_that_cannot_be(split: Path, program: str, said: tuple[str, ...]) -> None:
    before = files_in(split.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, str(split)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in said
    assert files_in(split.parent) == before


SAVE = """
import sys
from libortho.checkpoint import load_split, save_split
model = load_split(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    save_split(model, sys.argv[2])
"""


def test_two_writers_of_one_folder(
    tiny_llama, large_ortho, times: Callable[[str, int], int], split: Path, tmp_path: Path
) -> None:
    # The second is another split: any mixture of the two would fail its digests.
    other = libortho.replace_linear_layers(tiny_llama(), target_modules="up_proj")
    large_ortho(other)
    save_split(other, tmp_path / "other")
    target = tmp_path / "work" / "target"
    save_split(other, target)
    known = {verify_split(f).manifest.base_sha256 for f in (split, tmp_path / "other")}
    rounds = str(times("WRITES", 15))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(source), str(target), rounds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for source in (split, tmp_path / "other")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=600)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    assert verify_split(target).manifest.base_sha256 in known
    assert sorted(p.name for p in target.parent.iterdir()) == ["split", "target"]
