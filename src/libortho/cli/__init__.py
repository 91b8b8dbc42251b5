"""The command line: `libortho separate | tofu | attack | eval | chat | inspect`."""

from libortho.cli.app import app

__all__ = ["app"]
