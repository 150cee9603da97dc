import cmath
from typing import Any

import pytest
import torch

from aiollm.kernels.cases import normal
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.ref.norm import norm
from aiollm.kernels.ref.rotary_store import rotary_store as reference
from aiollm.kernels.rotary_store import rotary_store
from aiollm.kernels.tolerance import TOLERANCE, assert_close
from aiollm.kernels.variants import Norm, Rotary

HQ, HKV, WIDTH, ROT = 4, 2, 12, 8


def angles() -> torch.Tensor:
    """[position, ROT / 2]."""
    return torch.arange(50)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])


def turned(x: torch.Tensor, positions: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate by products of complex numbers: each pair of dimensions is one number."""
    y = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for i, angle in enumerate(angles()[position].tolist()):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + ROT // 2)
            for head in range(x.shape[1]):
                number = complex(y[token, head, a], y[token, head, b]) * cmath.exp(1j * angle)
                y[token, head, a], y[token, head, b] = number.real, number.imag
    return y.to(x.dtype)


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_rotates_and_stores(ops: Ops, n: int, normed: bool, interleaved: bool, dtype: torch.dtype) -> None:
    q, k, v = normal(n, HQ + 2 * HKV, WIDTH, dtype=dtype).split([HQ, HKV, HKV], dim=1)  # views
    q_norm, k_norm = (Norm(normal(WIDTH, dtype=dtype, seed=seed), 1e-6) if normed else None for seed in (1, 2))
    rotary = Rotary(torch.cat([angles().cos(), angles().sin()], dim=1), interleaved)
    positions = torch.arange(n) * 5 % 50
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:n]
    k_pool, v_pool = torch.full((2, 31, HKV, WIDTH), 7.0).to(dtype)
    rotated = ops.rotary_store(q, k, v, q_norm, k_norm, rotary, positions, k_pool, v_pool, slots)
    if q_norm and k_norm:
        q, k = norm(q, q_norm), norm(k, k_norm)
    assert_close(rotated, turned(q, positions, interleaved))
    assert_close(k_pool[slots], turned(k, positions, interleaved))
    assert torch.equal(v_pool[slots], v)
    others = torch.ones(31, dtype=torch.bool).index_fill(0, slots, False)
    assert bool((k_pool[others] == 7).all()) and bool((v_pool[others] == 7).all())


def arguments(
    n: int, heads: tuple[int, int, int], rot: int, dtype: torch.dtype, norms: str = "qk", interleaved: bool = False
) -> dict[str, Any]:
    """Views of one tensor, pools of 7s, scattered slots. `norms` names what is normed; "layer" norms center and add."""
    hq, hkv, d = heads
    q, k, v = normal(n, hq + 2 * hkv, d, dtype=dtype).split([hq, hkv, hkv], dim=1)
    q_by, k_by = (Norm(normal(d, dtype=dtype, seed=seed), 1e-6) for seed in (1, 2))
    if norms == "layer":
        q_by, k_by = (by._replace(centered=True, bias=normal(d, dtype=dtype, seed=3)) for by in (q_by, k_by))
    turns = torch.arange(300)[:, None] * normal(rot // 2, seed=4)
    pools = torch.full((2, n + 9, hkv, d), 7.0).to(dtype)
    generator = torch.Generator().manual_seed(5)
    return {
        "q": q, "k": k, "v": v, "q_norm": q_by if norms in ("qk", "q", "layer") else None,
        "k_norm": k_by if norms in ("qk", "layer") else None,
        "rotary": Rotary(torch.cat([turns.cos(), turns.sin()], 1), interleaved),
        "positions": torch.randint(300, (n,), generator=generator), "k_pool": pools[0], "v_pool": pools[1],
        "slots": torch.randperm(n + 8, generator=generator)[:n],
    }  # fmt: skip


def moved(value: Any, device: torch.device) -> Any:
    """A copy of a tensor, or of a tuple of them, on the device; views of one tensor stay views of one."""
    if isinstance(value, torch.Tensor):
        return (
            value.to(device, copy=True)
            if value._base is None
            else value._base.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())
        )
    return type(value)(*(moved(part, device) for part in value)) if isinstance(value, tuple) else value


def check(given: dict[str, Any], device: torch.device) -> None:
    ours = {name: moved(value, device) for name, value in given.items()}
    rotated, expected = rotary_store(**ours), reference(**given)
    assert_close(rotated.cpu(), expected)
    assert_close(ours["k_pool"].cpu(), given["k_pool"])
    assert_close(ours["v_pool"].cpu(), given["v_pool"])


HEADS = [((4, 2, 64), 64), ((3, 1, 80), 80), ((6, 2, 96), 96), ((4, 4, 128), 32), ((2, 1, 256), 64), ((1, 1, 12), 8)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "rot", "dtype"),
    [(*heads, torch.float32) for heads in HEADS] + [((4, 2, 64), 24, dtype) for dtype in TOLERANCE],
    ids=str,
)
def test_triton_rotates_as_the_reference(
    heads: tuple[int, int, int], rot: int, interleaved: bool, dtype: torch.dtype, device: torch.device
) -> None:
    for n in (0, 1, 7):
        check(arguments(n, heads, rot, dtype, interleaved=interleaved), device)


@pytest.mark.parametrize("norms", ["none", "q", "layer"])
@pytest.mark.parametrize("rot", [24, 64])
def test_triton_norms_what_is_normed(rot: int, norms: str, device: torch.device) -> None:
    check(arguments(5, (5, 2, 64), rot, torch.float32, norms), device)


@pytest.mark.parametrize(("heads", "rot"), [((9, 3, 64), 64), ((1, 1, 256), 64)], ids=str)
def test_triton_rotates_many_tokens(heads: tuple[int, int, int], rot: int, device: torch.device) -> None:
    check(arguments(70, heads, rot, torch.float32), device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "rot"), [((32, 8, 128), 128), ((9, 3, 64), 64), ((32, 32, 80), 20), ((16, 2, 256), 256)], ids=str
)
@pytest.mark.parametrize("n", [1, 63, 4096])
def test_triton_rotates_real_sizes(n: int, heads: tuple[int, int, int], rot: int, device: torch.device) -> None:
    check(arguments(n, heads, rot, torch.bfloat16), device)
    check(arguments(n, heads, rot, torch.float16, "none", interleaved=True), device)
