"""What the base and the ortho stream share: buffers whose stored numbers no cast may change."""

from __future__ import annotations

from torch import nn


class StoredModule(nn.Module):
    """A module of buffers that were rounded once, on purpose.

    model.half() and .to(bfloat16) are about activations and parameters; casting a scale, or data
    stored as fp16, would change the weights. Moving to another device is fine.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, scales and indices included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
