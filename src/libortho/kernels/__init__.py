"""The arithmetic of the two streams, as functions of plain tensors.

`reference` is the definition. Faster implementations have the same signatures and are tested
against it; nothing in this package knows a layer, a method or a model.
"""
