"""Counts the bytes of live tensors."""

import weakref


class LiveBytes:
    """Counts the bytes of all live storages that operations allocate, and their peak.

    Args:
        model: its weights and buffers are not counted.

    Attributes:
        mode: a dispatch mode; operations that run in it are counted.
        now, peak: bytes, without the gradients of weights.
        gradients: bytes of the gradients of weights.
        early, late: peaks with the gradients of weights, before and after `is_late` was set.
    """

    def __init__(self, model):
        from torch.utils._python_dispatch import TorchDispatchMode

        self.now = self.peak = self.early = self.late = self.gradients = 0
        self.is_late = False
        self._living: dict[int, int] = {}
        # `_cdata` of torch 2.13 identifies a storage: a view of a weight has the weight's
        self._known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        counter = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                counter._keep(result)
                return result

        self.mode = Mode()

    def _keep(self, result) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._living and key not in self._known:
                self._living[key] = size
                self.now += size
                self._note()
                weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._living.pop(key, 0)

    def _note(self) -> None:
        self.peak = max(self.peak, self.now)
        if self.is_late:
            self.late = max(self.late, self.now + self.gradients)
        else:
            self.early = max(self.early, self.now + self.gradients)

    def is_gradient(self, tensor) -> None:
        """From now on counts a tensor as the gradient of a weight."""
        self.gradients += self._living.get(tensor.untyped_storage()._cdata, 0)
        self._drop(tensor.untyped_storage()._cdata)

    def restart_peaks(self) -> None:
        """Forgets earlier peaks."""
        self.peak = self.now
