"""Numbers that the device still computes, on their way to the host."""

import torch
from torch import Tensor


class OnHost:
    """A small tensor's values for the host. Nobody waits before `wait`, and then not for what was launched later."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """The values, in the host's memory."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
