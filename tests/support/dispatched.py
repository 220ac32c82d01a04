"""Which operations of PyTorch run."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_MOVES_NOTHING = ("aten.empty", "aten.empty_like", "aten.new_empty", "aten._unsafe_view")


class Dispatched(TorchDispatchMode):
    """Inside, `names` takes down the operations that compute or move something: not views, not fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        if not function.is_view and name not in _MOVES_NOTHING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
