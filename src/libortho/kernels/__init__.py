"""The arithmetic of the two streams, and of the statistics they are found in, on plain tensors.

`reference` is the definition. `cpu` (with the C++ operators of `native`) and `triton` have the same
signatures and are tested against it; `dispatch` chooses. Nothing in this package knows a layer, a
method or a model.
"""
