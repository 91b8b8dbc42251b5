"""What goes where: each method decides which part of a weight is ortho.

A method is a function of weights and statistics; it never sees a model. Each one's file ends with
`register(name, ConfigClass)`; a config class names its method, so `separate_` needs no table.
"""

from libortho.methods.registry import METHODS, method_of, register

__all__ = ["METHODS", "method_of", "register"]
