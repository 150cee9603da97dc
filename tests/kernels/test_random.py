import torch
import triton
import triton.language as tl

from aiollm.kernels.random import bits
from aiollm.kernels.ref.random import uniform

MASK = (1 << 64) - 1


@triton.jit
def drawn_kernel(seeds, positions, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    drawn = bits(tl.load(seeds + at, mask=at < count), tl.load(positions + at, mask=at < count))
    tl.store(out + at, (drawn >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16, mask=at < count)


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_integers(seed: int, position: int) -> float:
    golden = 0x9E3779B97F4A7C15
    return (splitmix((splitmix((seed + golden) & MASK) + (position + 1) * golden) & MASK) >> 11) / 2**53


def test_equals_the_definition_in_unbounded_integers() -> None:
    seeds = [0, 1, -1, 42, (1 << 63) - 1, -(1 << 63), 123456789]
    positions = [0, 1, 5, 1000, 131071, 7, 2**31]
    drawn = uniform(torch.tensor(seeds), torch.tensor(positions))
    assert drawn.tolist() == [by_integers(s & MASK, p) for s, p in zip(seeds, positions, strict=True)]


def test_triton_gives_the_same_to_the_last_bit(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (5000,), generator=generator)
    positions = torch.randint(1 << 31, (5000,), generator=generator)
    for count in (1, 5000):
        drawn = torch.empty(count, dtype=torch.float64, device=device)
        grid = (triton.cdiv(count, 1024),)
        drawn_kernel[grid](seeds[:count].to(device), positions[:count].to(device), drawn, count, BLOCK=1024)
        assert torch.equal(drawn.cpu(), uniform(seeds[:count], positions[:count]))


def test_known_values_stay_as_they_are() -> None:
    drawn = uniform(torch.tensor([0, 0, 1, 42]), torch.tensor([0, 1, 0, 17]))
    assert drawn.tolist() == [0.6524484863740322, 0.7012121095215252, 0.36818951565166946, 0.44715182605341497]


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    count = torch.arange(20_000)
    for drawn in (uniform(torch.full_like(count, 7), count), uniform(count, torch.full_like(count, 3))):
        assert drawn.min() >= 0
        assert drawn.max() < 1
        observed = torch.histc(drawn, bins=50, min=0, max=1)
        chi_square = ((observed - 400) ** 2 / 400).sum()
        assert 20 < chi_square < 90  # 49 degrees of freedom: the 0.0001 and 0.9998 quantiles


def test_neighbouring_seeds_and_positions_are_uncorrelated() -> None:
    count = torch.arange(20_000)
    first = uniform(torch.full_like(count, 7), count)
    for other in (uniform(torch.full_like(count, 8), count), uniform(torch.full_like(count, 7), count + 1)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03
