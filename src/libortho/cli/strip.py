"""`libortho strip`: a base-only deployment, and what was searched to prove that it is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from libortho.cli.console import reporting_errors, say, write_json
from libortho.cli.options import Json


def strip(
    folder: Annotated[Path, typer.Argument(help="A split checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder for the copy without the ortho stream.")],
    json_file: Json = None,
) -> None:
    """Copy a split checkpoint without its ortho stream, and search the copy for its bytes.

    Only files that the format knows are copied. Every byte of the copy is then compared with every
    32-byte block of every ortho tensor; if one is found, nothing is written and it exits 2.

    This is no proof against a reader of the base's weights, unless it never saw what was forgotten
    (--method graft): who has the public model too, or trains the base on a part of what was
    forgotten, gets memory back. See the threat model.
    """
    with reporting_errors():
        from libortho.checkpoint import strip as strip_split
        from libortho.checkpoint.search import BLOCK

        searched = strip_split(folder, out)
        write_json(json_file, dataclasses.asdict(searched))
        say(f"base    {out}")
        if not searched.tensors and not searched.silent:
            say("there was no ortho stream to look for")
        else:
            say(
                f"searched {searched.nbytes:,} bytes in {len(searched.files)} files for "
                f"{searched.blocks:,} blocks of {BLOCK} bytes, of {searched.tensors} ortho "
                "tensors: none of them was found"
            )
        if searched.silent:
            say(
                "not searched for, as they are empty or hold few different bytes: "
                + ", ".join(searched.silent)
            )
