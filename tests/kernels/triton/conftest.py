"""Where the kernels can run: in the strict interpreter, and on a GPU where there is one."""

from tests.kernels.triton.strict_interpreter import strict

__all__ = ["strict"]
