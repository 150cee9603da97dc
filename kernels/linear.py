"""Dense layers: own kernels for few rows, where reading the weight is all, and the library's product for many.

On Hopper gated layers of many rows, too, have a kernel of their own. The contracts are ref/linear.py and
ref/gated_linear.py.
"""

from collections.abc import Iterator

import torch

from aiollm.kernels import device
from aiollm.kernels.few_rows import NORMED, few_rows
from aiollm.kernels.gated import gated
from aiollm.kernels.gemv import gemv
from aiollm.kernels.mid_rows import fits, mid_rows
from aiollm.kernels.norm import norm
from aiollm.kernels.tolerance import assert_near
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weight
from aiollm.kernels.workload import Case, Shape

# From here on the library's product is slower with an addition inside: one H100, 8192 rows from 12288 to 4096, 1222 us,
# and 1089 + 67 us apart. From 4096 to 4096 it is 392 and 387 + 67 us.
MANY = 4096
FEW = 64  # up to this many rows the own kernels are at least as fast as cuBLAS


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    before: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [n, in], weight [out, in], all of one dtype but the norm -> [n, out]; a residual is overwritten."""
    return _dense(x, weight, bias, before, residual, None)


def gated_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str, before: Norm | None = None
) -> torch.Tensor:
    """x [n, in], weight [2i, in], all of one dtype but the norm -> [n, i]."""
    return _dense(x, weight, bias, before, None, activation)


def _dense(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    before: Norm | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight on this device is a dense tensor, not {type(weight).__name__}")
    n = len(x)
    if before is not None and (n > _normed(x.device) or before.centered or before.bias is not None):
        x, before = norm(x, before), None
    if 0 < n <= FEW:
        return (gemv if n == 1 else few_rows)(x, weight, bias, before, residual, activation)
    if activation is not None and n > FEW and fits(x, weight):  # 8 % faster at 512 and 1024 rows, 1 to 4 % at 8192
        return mid_rows(x, weight, bias, activation)
    if x.is_meta:  # torch answers as well, once it has imported sympy and its compiler: seconds of a start
        y = x.new_empty(n, len(weight)) if residual is None else residual
        return y if activation is None else gated(y, activation)
    if residual is not None and not (n >= MANY and x.shape[1] > len(weight)):
        return residual.addmm_(x, weight.T) if bias is None else residual.add_(bias).addmm_(x, weight.T)
    y = torch.nn.functional.linear(x, weight, bias)
    if residual is not None:
        return residual.add_(y)
    return y if activation is None else gated(y, activation)


def _normed(here: torch.device) -> int:
    """Up to how many rows the kernels take the norm in. On sm_100 Triton 3.6 fails to compile that for several."""
    return NORMED if device.capability(here) < (10, 0) else 1


def cases(shape: Shape) -> Iterator[Case]:
    """Every layer of a block at decode sizes, and the output layer."""
    size = shape.dtype.itemsize
    heads = shape.head_dim * shape.heads
    layers = {
        "qkv": (heads + 2 * shape.head_dim * shape.kv_heads, shape.hidden),
        "o": (shape.hidden, heads),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head": (shape.vocab, shape.hidden),
    }
    for name, (n_out, n_in) in layers.items():
        for n in (1, 8, 64, 256):

            def make(
                here: torch.device, name: str = name, n: int = n, n_out: int = n_out, n_in: int = n_in
            ) -> tuple[object, ...]:
                def random(*sizes: int) -> torch.Tensor:
                    return torch.randn(sizes, device=here, dtype=shape.dtype)

                x, weight, before = random(n, n_in), random(n_out, n_in) * n_in**-0.5, Norm(random(n_in), 1e-6)
                if name == "gate_up":
                    return x, weight, None, "silu", before
                if name in ("o", "down"):
                    return x, weight, None, None, random(n, n_out)
                return x, weight, None, before

            yield Case(
                "gated_linear" if name == "gate_up" else "linear",
                f"{name} {n} rows",
                make,
                bytes=(n_out * n_in + n * (n_in + n_out)) * size,
                flops=2 * n * n_out * n_in,
                close=assert_near,
            )
