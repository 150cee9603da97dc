"""The decoder against transformers, on tiny random checkpoints."""

from pathlib import Path

import pytest
import torch
from sessions import MODELS, Session, logits_of_transformers
from tiny_model import write_tiny_model

from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops

ops_tables = pytest.mark.parametrize(
    "ops",
    [
        pytest.param(reference_ops(), id="reference"),
        pytest.param(cpu_ops(), id="cpu"),
        pytest.param(triton_ops(), id="triton", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[torch.Tensor]:
    return logits_of_transformers(checkpoint)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@ops_tables
def test_whole_prefill(checkpoint: Path, expected: list[torch.Tensor], ops: Ops) -> None:
    assert_same(Session(checkpoint, ops).step({0: 61})[0], expected[0])


@ops_tables
def test_chunked_prefill(checkpoint: Path, expected: list[torch.Tensor], ops: Ops) -> None:
    session = Session(checkpoint, ops)
    chunks = [session.step({0: min(7, 61 - begin)})[0] for begin in range(0, 61, 7)]
    assert_same(torch.cat(chunks), expected[0])


@ops_tables
def test_decode_step_by_step(checkpoint: Path, expected: list[torch.Tensor], ops: Ops) -> None:
    session = Session(checkpoint, ops)
    steps = [session.step({2: 1})[2] for _ in range(29)]
    assert_same(torch.cat(steps), expected[2])


@ops_tables
def test_chunks_and_decodes_mixed_in_one_batch(checkpoint: Path, expected: list[torch.Tensor], ops: Ops) -> None:
    session = Session(checkpoint, ops)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for new in ({0: 40}, {2: 5, 0: 1}, {0: 1, 1: 1, 2: 20}, {2: 1, 0: 9}, {0: 10, 2: 3}):
        for row, logits in session.step(new).items():
            seen[row].append(logits)
    for row in seen:
        assert_same(torch.cat(seen[row]), expected[row])


@pytest.mark.parametrize(
    "ops",
    [
        pytest.param(reference_ops(), id="reference"),
        pytest.param(cpu_ops(), id="cpu", marks=pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")),
    ],
)
def test_8_bit_weights_stay_near(checkpoint: Path, expected: list[torch.Tensor], ops: Ops) -> None:
    session = Session(checkpoint, ops, quantized=True)
    logits = torch.cat([session.step({0: 60, 2: 3})[0], session.step({2: 1, 0: 1})[0]])
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected[0]).norm() < 0.06 * expected[0].norm()
