import pytest
import torch

from aiollm.kernels import device as devices
from aiollm.kernels import tuned
from aiollm.kernels.cases import in_float32, normal
from aiollm.kernels.mid_rows import CANDIDATES, fits, mid_rows
from aiollm.kernels.ops import reference_ops, triton_ops
from aiollm.kernels.ref.gated import ACTIVATIONS
from aiollm.kernels.tolerance import assert_near

# Twice the outputs, and inputs: 520 end within a block, 32 are less than one; 256 have fewer blocks than stages, and
# the outputs of 26112 make more tiles than there are multiprocessors.
SIZES = [(384, 256), (1008, 520), (208, 4096), (96, 32), (26112, 128)]
COUNTS = [1, 65, 100, 128, 130, 256, 300, 512]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def layer(n: int, size: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight, parts of wider tensors that hold NaN beside them."""
    x, weight = normal(n, size[1], dtype=dtype), (normal(*size, seed=1) / size[1] ** 0.5).to(dtype)
    x, weight = (torch.cat([part, torch.full_like(part[:, :8], torch.nan)], 1).cuda() for part in (x, weight))
    return x[:, : size[1]], weight[:, : size[1]]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_every_candidate_gives_the_references_layer(n: int, config: dict[str, int], dtype: torch.dtype) -> None:
    for size in SIZES:
        x, weight = layer(n, size, dtype)
        for bias in (None, normal(size[0], dtype=dtype, seed=2).cuda()):
            expected = reference_ops().gated_linear(*in_float32(x, weight, bias), "silu")
            with tuned.trial({"mid_rows": config}):
                assert_near(mid_rows(x, weight, bias, "silu"), expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_has_all_activations(activation: str) -> None:
    x, weight = layer(200, (384, 256))
    expected = reference_ops().gated_linear(*in_float32(x, weight, None), activation)
    assert_near(mid_rows(x, weight, None, activation), expected)


@hopper
@pytest.mark.gpu
def test_a_graph_of_layers_that_begin_before_the_last_has_ended() -> None:
    """Each reads what the one before wrote, into memory that may have been another one's; replays give the same."""
    n, width, layers = 256, 2048, 6
    x, weight = layer(n, (2 * width, width))
    weight = weight * 2

    def step() -> torch.Tensor:
        y = x
        for _ in range(layers):
            y = mid_rows(y, weight, None, "silu")
        return y

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    results = []
    for _ in range(3):
        graph.replay()
        results.append(out.clone())
    expected = x
    for _ in range(layers):
        expected = reference_ops().gated_linear(expected, weight, None, "silu")
    assert_near(results[0], expected.float())
    assert all(torch.equal(result, results[0]) for result in results)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("size", [(384, 256), (200, 63)], ids=str)
@pytest.mark.parametrize("n", [65, 512, 1600])
def test_layers_that_fit_and_others_are_the_references(n: int, size: tuple[int, int]) -> None:
    x, weight = normal(n, size[1]).bfloat16().cuda(), (normal(*size, seed=1) / 16).bfloat16().cuda()
    expected = reference_ops().gated_linear(*in_float32(x, weight, None), "silu")
    assert_near(triton_ops().gated_linear(x, weight, None, "silu"), expected)


def test_it_is_for_16_bit_numbers_on_hopper_in_rows_of_whole_16_bytes() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight = empty(100, 64), empty(96, 64)
    assert fits(x, weight)
    assert fits(empty(100, 72)[:, :64], weight)
    assert not fits(x.float(), weight.float())
    assert not fits(torch.empty(100, 64, dtype=torch.bfloat16), torch.empty(96, 64, dtype=torch.bfloat16))
    assert not fits(empty(100, 68)[:, :64], weight)
    assert not fits(x, empty(96, 68)[:, :64])
    assert not fits(x, empty(64, 96).T)
    assert not fits(x, empty(104, 64))  # 52 outputs
    for other in ("sm_80", "sm_100"):
        with devices.standing_in(devices.STAND_INS[other]):
            assert not fits(x, weight)
