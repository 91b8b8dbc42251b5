"""The command line: `libortho separate | tofu | eval | chat | inspect | export`."""

from libortho.cli.app import app

__all__ = ["app"]
