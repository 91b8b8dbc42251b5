"""The arithmetic of the two streams, as functions of plain tensors.

`reference` is the definition. `cpu` (with the C++ operators of `native`) and `triton` have the same
signature and are tested against it; `dispatch` chooses. Nothing in this package knows a layer, a
method or a model.
"""
