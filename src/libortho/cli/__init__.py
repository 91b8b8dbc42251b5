"""The command line; `libortho --help` lists the commands."""

from libortho.cli.app import app

__all__ = ["app"]
