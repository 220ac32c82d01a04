"""adaLN's elementwise work forward and backward: `pytest benchmarks/test_adaln.py --benchmark-only`.

On a GPU ours is the Triton kernels, at the size of DiT-XL/2 at 256 pixels; on a CPU the definition, at a small one.
The peer is the definition through torch.compile. A quick look: calls of one kind run one after the other here.
"""

from typing import Any

import pytest
import torch

from sadm_kernels import adaln

GPU = torch.cuda.is_available()
B, T, D = (64, 256, 1152) if GPU else (4, 64, 384)
WAYS = {"ours": adaln.gate_residual_norm_modulate, "definition": adaln.gate_residual_norm_modulate_definition}


@pytest.mark.parametrize("way", ["ours", "definition", "compiled"])
def test_gate_residual_norm_modulate(benchmark: Any, way: str) -> None:
    device = "cuda" if GPU else "cpu"
    x, h = torch.randn(2, B, T, D, device=device, dtype=torch.bfloat16).unbind()
    gate, shift, scale = torch.randn(B, 3 * D, device=device, dtype=torch.bfloat16).chunk(3, dim=1)
    inputs = [value.clone().requires_grad_(True) for value in (x, h, gate, shift, scale)]
    function = torch.compile(WAYS["definition"]) if way == "compiled" else WAYS[way]

    def call() -> None:
        x_out, y = function(*inputs)
        torch.autograd.grad([x_out, y], inputs, [x, h])
        if GPU:
            torch.cuda.synchronize()

    call()
    benchmark.group = f"gate, residual, norm, modulate [{B}, {T}, {D}] bf16 on {device}"
    benchmark.pedantic(call, rounds=5, iterations=1)
