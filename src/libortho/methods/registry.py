"""Names of the methods. One line of registration each, at the end of the method's file."""

from __future__ import annotations

METHODS: dict[str, type] = {}
"""Method name -> its config class."""


def register(name: str, config: type) -> None:
    """Make `config` the configuration of method `name`; a name is taken once."""
    if METHODS.setdefault(name, config) is not config:
        raise ValueError(f"method {name!r} is registered already, as {METHODS[name].__name__}")


def method_of(config: object) -> str:
    """The name of the method that `config` configures.

    Raises:
        TypeError: no method is registered for this class.
    """
    for name, kind in METHODS.items():
        if type(config) is kind:
            return name
    known = ", ".join(kind.__name__ for kind in METHODS.values())
    raise TypeError(f"{type(config).__name__} configures no method: expected one of {known}")
