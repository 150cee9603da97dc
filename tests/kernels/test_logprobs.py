from collections.abc import Callable

import pytest
import torch

from aiollm.kernels import logprobs as kernel
from aiollm.kernels.ref.logprobs import logprobs as reference
from aiollm.kernels.tolerance import assert_close

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Logprobs = Callable[[torch.Tensor, torch.Tensor, int], Result]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_logprobs(logits: torch.Tensor, targets: torch.Tensor, top_n: int) -> Result:
    own, ranks, ids, top = kernel.logprobs(logits.to(DEVICE), targets.to(DEVICE), top_n)
    return own.cpu(), ranks.cpu(), ids.cpu(), top.cpu()


every = pytest.mark.parametrize("logprobs", [reference, triton_logprobs], ids=["reference", "triton"])


def random_logits(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 5


def check(logits: torch.Tensor, targets: torch.Tensor, result: Result) -> None:
    """Against log-softmax in double precision; the order among equal ones is free, the values are not."""
    chosen, ranks, ids, top = result
    assert ranks.tolist() == [int((row >= row[target]).sum()) for row, target in zip(logits, targets, strict=True)]
    expected = logits.double().log_softmax(-1).float()
    assert_close(chosen, expected.gather(1, targets[:, None]).squeeze(1))
    assert_close(top, expected.topk(top.shape[1]).values)
    assert_close(expected.gather(1, ids), top)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@every
@pytest.mark.parametrize(("rows", "vocab", "top_n"), [(0, 97, 5), (1, 97, 97), (7, 63, 5), (3, 1000, 20), (3, 9000, 1)])
def test_equals_log_softmax(logprobs: Logprobs, rows: int, vocab: int, top_n: int) -> None:
    logits, targets = random_logits(rows, vocab), torch.arange(rows) * 31 % vocab
    check(logits, targets, logprobs(logits, targets, top_n))
    check(logits.bfloat16(), targets, logprobs(logits.bfloat16(), targets, top_n))


@every
def test_no_alternatives_and_banned_tokens(logprobs: Logprobs) -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    chosen, ranks, ids, top = logprobs(logits, torch.tensor([1]), 0)
    assert (chosen.tolist(), ranks.tolist()) == ([float("-inf")], [3])
    assert ids.shape == top.shape == (1, 0)
    _, ranks, ids, top = logprobs(logits, torch.tensor([2]), 3)
    assert ranks.tolist() == [2], "of equal ones the last"
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert top[0, 2] == float("-inf")


@every
@pytest.mark.parametrize("step", [0.0, 1 / 300], ids=["equal", "sorted"])
def test_more_candidates_than_there_is_room_for(logprobs: Logprobs, step: float) -> None:
    logits = torch.arange(6000.0).expand(2, -1) * step
    targets = torch.tensor([0, 5999])
    check(logits, targets, logprobs(logits, targets, 7))


def test_triton_puts_the_lower_ids_first_among_equals() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [2999, 128, 77]] = 1.0
    _, _, ids, _ = triton_logprobs(logits, torch.tensor([0]), 6)
    assert ids[0].tolist() == [77, 128, 2999, 0, 1, 2]


def test_strided_logits() -> None:
    logits, targets = random_logits(8, 333), torch.arange(4)
    for view in (logits[::2, 3:153], logits.T[:150, ::2].T):
        check(view.contiguous(), targets, triton_logprobs(view, targets, 5))


def test_more_alternatives_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="top_n: 6 alternatives; a vocabulary of 5 has from 0 to 5"):
        triton_logprobs(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64), 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_at_scale(dtype: torch.dtype) -> None:
    logits, targets = random_logits(300, 151_936).to(dtype), torch.arange(300) * 499
    check(logits, targets, triton_logprobs(logits, targets, 20))
