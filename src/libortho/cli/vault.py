"""`libortho encrypt`, `libortho rotate-key`, and the one option that says where the key is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libortho.cli.console import reporting_errors, say
from libortho.cli.options import check_readable

Folder = Annotated[Path, typer.Argument(help="A split checkpoint.")]


OrthoKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="Key of encrypted ortho streams, for reading and writing: a file of 64 "
        "hexadecimal digits (openssl rand -hex 32). Stands before the command. Or set "
        "LIBORTHO_ORTHO_KEY_FILE, LIBORTHO_ORTHO_KEY (the digits) or "
        "LIBORTHO_ORTHO_KEY_COMMAND (prints them).",
    ),
]


def use_key_file(context: typer.Context, path: Path) -> None:
    """Have the key of a file in use until the command ends."""
    from libortho.checkpoint.keys import OrthoKey, ortho_access

    def read() -> OrthoKey:  # when it is needed, so that an error of it is reported as any other
        return OrthoKey.from_file(check_readable("--ortho-key-file", path))

    context.with_resource(ortho_access(read))


def encrypt(
    folder: Folder,
    key_file: Annotated[
        Path, typer.Option(help="64 hexadecimal digits (umask 077; openssl rand -hex 32 > FILE).")
    ],
) -> None:
    """Encrypt the ortho stream of a split checkpoint where it stands (AES-256-GCM).

    Without the key the folder runs at alpha 0 and no higher. A lost key is a lost ortho stream.
    """
    with reporting_errors():
        from libortho.checkpoint import OrthoKey, encrypt_split
        from libortho.checkpoint.names import ORTHO, ORTHO_SEALED

        key = OrthoKey.from_file(check_readable("--key-file", key_file))
        encrypt_split(folder, key)
        say(
            f"encrypted {folder / ORTHO_SEALED} with the key {key.id}\n"
            f"{ORTHO} is deleted; what the disk, snapshots and backups keep of it is not"
        )


def rotate_key(
    folder: Folder,
    new: Annotated[Path, typer.Option(help="File of the key that is to open it.")],
    old: Annotated[
        Path | None,
        typer.Option(help="File of the key that opens it now; default: the key in use."),
    ] = None,
) -> None:
    """Give an encrypted ortho stream another key; the old one opens this folder no more.

    Only the header is written anew. If the old key has leaked together with a copy of the file, the
    memory has leaked: nothing here can take that back.
    """
    with reporting_errors():
        from libortho.checkpoint import OrthoKey
        from libortho.checkpoint import rotate_key as rotate

        key = OrthoKey.from_file(check_readable("--new", new))
        opens = None if old is None else OrthoKey.from_file(check_readable("--old", old))
        rotate(folder, key, old=opens)
        say(f"{folder} opens with the key {key.id} now")
