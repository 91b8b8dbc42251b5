"""`libortho serve`, `libortho ui` and `libortho keys`: thin callers of `libortho.serve`."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from libortho.cli.console import reporting_errors, say
from libortho.cli.options import SplitTemplate, check_readable, split_template

if TYPE_CHECKING:
    from libortho.serve.engine import Engine
    from libortho.serve.limits import Limits

keys = typer.Typer(help="API keys of a server's policy file.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A split checkpoint.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
Name = Annotated[
    str | None, typer.Option(help="What requests call the model; default: the folder's name.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of what is not split: float32, bfloat16 or float16; default: as saved."),
]
Dense = Annotated[
    bool,
    typer.Option(
        "--dense",
        help="Unpack the base once: faster without a fast kernel, at the original's memory.",
    ),
]
Rows = Annotated[int, typer.Option(min=1, help="Answers made at the same time.")]


def serve(
    folder: Folder,
    policy: Annotated[
        Path | None,
        typer.Option(help="TOML: who may have which alpha. Without one, alpha 0 for everyone."),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    audit: Annotated[
        Path | None, typer.Option(help="Append JSON lines to this file: who was given which alpha.")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Serve the page of `libortho ui` too.")] = False,
    template: SplitTemplate = None,
    dtype: Dtype = None,
    dense: Dense = False,
    rows: Rows = 32,
    queue: Annotated[int, typer.Option(min=1, help="Answers waiting; more is a 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most of one answer.")] = 2048,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds for one request.")] = 300,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="Address of a proxy in front whose X-Forwarded-For is believed; may be repeated."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers (in this process) or vllm (in front of its server).")
    ] = "transformers",
    upstream: Annotated[
        str | None, typer.Option(help="vllm: URL of its server, such as http://127.0.0.1:8001.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="vllm: the name under which its server has the base.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="vllm: ALPHA=NAME of an ortho adapter there; may be repeated."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="vllm: an export's folder; its server is then started and stopped here."),
    ] = None,
    vllm_options: Annotated[
        str,
        typer.Option(
            help="vllm: further options for the server that --export starts, in one string."
        ),
    ] = "",
) -> None:
    """Serve a split model: OpenAI's API, with `alpha` in each request and a policy that decides.

    The engine in this process computes on the CPU; for a GPU there is --engine vllm.

    SIGHUP reads the policy anew; SIGTERM finishes what is being answered, then leaves.
    """
    with reporting_errors(), _extra():
        from libortho.serve.limits import Limits
        from libortho.serve.policy import Policy, read_policy

        limits = Limits(queue=queue, rows=rows, max_tokens=max_tokens, request_seconds=timeout)
        followed = Policy() if policy is None else read_policy(check_readable("--policy", policy))
        if engine not in ("transformers", "vllm"):
            raise ValueError(f"--engine {engine!r}: expected transformers or vllm")
        if engine == "transformers" and (upstream or base or adapter or export or vllm_options):
            raise ValueError(
                "--upstream, --base, --adapter, --export and --vllm-options are for --engine vllm"
            )
        if engine == "vllm" and (template not in (None, "chat") or dtype or dense):
            raise ValueError(
                "--template, --dtype and --dense are for --engine transformers: vLLM has the "
                "model's own chat template, and a dtype by its own options"
            )
        _log()
        with ExitStack() as held:
            if engine == "vllm":
                if split_template(template, folder, "chat") == "plain":
                    _warn_of_chat_form(folder)
                more = shlex.split(vllm_options)
                made = _vllm(folder, upstream, base, adapter or [], export, more, limits, held)
            else:
                made = _transformers(folder, dtype, dense, limits, template)
            page = folder if ui else None
            proxies = trusted_proxy or []
            _run(
                made, limits, folder, followed, policy, host, port, name, audit, page, None, proxies
            )


def ui(
    folder: Folder,
    port: Port = 8000,
    template: SplitTemplate = None,
    dtype: Dtype = None,
    dense: Dense = False,
) -> None:
    """Look at a split model in the browser: ask it at two alphas side by side.

    For its owner, on this machine: any alpha for who has the address that it prints, which holds a
    key, and reachable from nowhere else. To show it to others, use `libortho serve --ui` with a
    policy. It computes on the CPU.
    """
    with reporting_errors(), _extra():
        from libortho.serve.keys import mint
        from libortho.serve.limits import Limits
        from libortho.serve.policy import owner_policy

        _log()
        limits = Limits()
        engine = _transformers(folder, dtype, dense, limits, template)
        hosts = ["127.0.0.1", "localhost"]
        key = mint()
        host, policy, token = hosts[0], owner_policy(key.sha256), key.secret
        _run(engine, limits, folder, policy, None, host, port, None, None, folder, hosts, [], token)


@keys.command()
def new(
    key_id: Annotated[str, typer.Option("--id", help="Its name in the audit log.")],
    max_alpha: Annotated[float, typer.Option(help="The highest alpha it may ask for.")] = 1.0,
    rate: Annotated[int, typer.Option(min=1, help="Requests per minute.")] = 60,
    expires: Annotated[
        str | None, typer.Option(help="Such as 2030-01-01T00:00:00Z; default: never.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Append it to this policy file, made if missing.")
    ] = None,
) -> None:
    """Make an API key: printed once; the policy file keeps its digest only."""
    with reporting_errors(), _extra():
        from libortho.serve.keys import mint, toml_entry
        from libortho.serve.policy import append_entry, parse_policy

        key = mint()
        entry = toml_entry(key_id, key, max_alpha, rate, expires)
        if policy is None:
            parse_policy("version = 1\n" + entry)
            say(entry)
        else:
            append_entry(policy, entry)
        say(f"key   {key.secret}")
        say("It is not shown again; a running server learns of it on SIGHUP.")


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


def _warn_of_chat_form(folder: Path) -> None:
    import logging

    logging.getLogger(__name__).warning(
        "%s was measured with its questions asked as plain text: vLLM puts messages in the model's "
        "chat form, in which what it forgot was not measured",
        folder,
    )


def _run(
    engine: Engine,
    limits: Limits,
    folder: Path,
    policy: Any,
    policy_path: Path | None,
    host: str,
    port: int,
    name: str | None,
    audit: Path | None,
    page: Path | None,
    hosts: list[str] | None,
    proxies: list[str],
    token: str | None = None,
) -> None:
    from libortho.serve.app import create_app
    from libortho.serve.audit import AuditLog
    from libortho.serve.gate import Gate
    from libortho.serve.run import make_server

    called = name or folder.resolve().name
    gate = Gate(engine, called, policy, limits, AuditLog(audit), policy_path)
    address = f"[{host}]" if _is_ipv6(host) else host
    # In the fragment, which a browser sends to nobody: the page takes it from there.
    place = "/v1" if page is None else "/ui/" if token is None else f"/ui/#token={token}"
    server = make_server(
        create_app(gate, page, hosts),
        gate,
        host,
        port,
        trusted_proxies=proxies,
        started=lambda at: say(f"serving http://{address}:{at}{place}"),
    )
    say(f"model   {called}   ortho {engine.status().ortho}")
    server.run()


def _transformers(
    folder: Path, dtype: str | None, dense: bool, limits: Limits, template: str | None
) -> Engine:
    import torch

    from libortho.serve.engine_transformers import TransformersEngine
    from libortho.serve.loading import load_for_serving

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r}: expected float32, bfloat16 or float16")
    checked = split_template(template, folder, "chat")
    loaded = load_for_serving(folder, None if dtype is None else getattr(torch, dtype), dense)
    return TransformersEngine(loaded, limits, checked)


def _vllm(
    folder: Path,
    upstream: str | None,
    base: str | None,
    adapters: list[str],
    export: Path | None,
    more: list[str],
    limits: Limits,
    held: ExitStack,
) -> Engine:
    from libortho.export.run import check_made_from
    from libortho.serve.engine_vllm import API_KEY_VARIABLE, VllmEngine, parse_adapters
    from libortho.serve.vllm_process import BASE, find_adapters, vllm_server

    key = os.environ.get(API_KEY_VARIABLE)
    if export is not None:
        if upstream or base or adapters:
            raise ValueError("--export starts a server: --upstream, --base, --adapter name another")
        found = find_adapters(export)
        check_made_from(export, folder)
        key = key or secrets.token_urlsafe(32)
        url = held.enter_context(vllm_server(export, found, key, more))
        named = {alpha: place.name for alpha, place in found.items()}
        return VllmEngine(folder, url, BASE, named, limits, key)
    if more:
        raise ValueError("--vllm-options are for the server that --export starts")
    if upstream is None or base is None:
        raise ValueError("--engine vllm needs --export DIR, or --upstream URL and --base NAME")
    return VllmEngine(folder, upstream, base, parse_adapters(adapters), limits, key)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


@contextmanager
def _extra() -> Iterator[None]:
    """A missing package becomes an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette", "httpx2"):
            raise
        raise ValueError(
            f"the package {error.name} is not installed: `pip install '.[serve]'` in a checkout of "
            "LibOrtho"
        ) from None
