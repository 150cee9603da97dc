import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.cases import make_sampling
from aiollm.kernels.cpu import sample as cpu
from aiollm.kernels.ref.random import uniform
from aiollm.kernels.ref.sample import sample as reference
from aiollm.kernels.tolerance import assert_close

Sample = Callable[[torch.Tensor, Sampling], Sampled]
both = pytest.mark.parametrize("sample", [reference, cpu.sample], ids=["reference", "cpu"])
INF = float("inf")


def random_logits(rows: int, vocab: int = 97, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The probabilities that a token is drawn with, by plain loops."""
    peak = max(logits)
    weights = [math.exp((x - peak) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if kept and mass >= top_p * total:
            break
        kept.add(i)
        mass += weights[i]
    kept = {i for i in kept if weights[i] >= min_p}
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def invert(probabilities: list[float], number: float) -> int:
    mass = 0.0
    for token, probability in enumerate(probabilities):
        mass += probability
        if mass > number:
            return token
    raise AssertionError("the probabilities do not add up to one")


KNOBS = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.05},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_past_vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


@both
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_draws_what_plain_loops_draw(sample: Sample, knobs: dict[str, float]) -> None:
    logits = random_logits(40)
    sampling = make_sampling(40, **knobs)
    numbers = uniform(sampling.seeds, sampling.lengths).tolist()
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs
    expected = [invert(distribution(row, **settings), u) for row, u in zip(logits.tolist(), numbers, strict=True)]
    assert sample(logits, sampling).tokens.tolist() == expected


@both
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_drawn_tokens_follow_the_distribution(sample: Sample, knobs: dict[str, float]) -> None:
    draws = 2000
    logits = random_logits(1, vocab=23, seed=3)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs
    probabilities = distribution(logits[0].tolist(), **settings)
    counts = Counter(sample(logits.expand(draws, -1), make_sampling(draws, **knobs)).tokens.tolist())
    assert all(probabilities[token] > 0 for token in counts)
    likely = [i for i, p in enumerate(probabilities) if p * draws > 5]
    chi_square = sum((counts[i] - probabilities[i] * draws) ** 2 / (probabilities[i] * draws) for i in likely)
    assert chi_square < len(likely) + 4 * math.sqrt(2 * len(likely))  # mean and deviation of chi-square


@both
def test_temperature_0_takes_the_lowest_id_among_the_largest(sample: Sample) -> None:
    logits = torch.zeros(2, 70)
    logits[0, [66, 9, 31]] = 4.0
    assert sample(logits, make_sampling(2, temperature=0.0, top_k=3, top_p=0.1)).tokens.tolist() == [9, 0]


@both
def test_top_k_keeps_the_lower_ids_among_equals(sample: Sample) -> None:
    logits = torch.zeros(200, 3000)
    logits[:, 2500] = 1.0
    drawn = sample(logits, make_sampling(200, top_k=4)).tokens
    assert set(drawn.tolist()) == {0, 1, 2, 2500}


@both
def test_bias_moves_and_bans_tokens(sample: Sample) -> None:
    logits = torch.zeros(3, 9)
    bias = [(0, 4, 50.0), (0, 4, 50.0), (0, 2, 99.0), (2, 0, -INF), (2, 1, -INF)]
    assert sample(logits, make_sampling(3, temperature=0.0, bias=bias)).tokens.tolist() == [4, 0, 2]


@both
def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output(sample: Sample) -> None:
    logits = torch.tensor([[3.0, 2.9, 2.0, -1.0]]).expand(3, 4)
    prompts, generated = [[0], [0], [0, 1, 2]], [[], [1, 1], [3]]
    sampling = make_sampling(3, temperature=0.0, repetition=[1.2, 1.2, 40.0], prompts=prompts, generated=generated)
    assert sample(logits, sampling).tokens.tolist() == [1, 0 if 3 / 1.2 > 2.9 / 1.2 else 1, 0]
    bare = torch.tensor([[-1.0, -1.5]])
    sampling = make_sampling(1, temperature=0.0, repetition=2.0, prompts=[[0]])
    assert sample(bare, sampling).tokens.tolist() == [1]


@both
def test_presence_and_frequency_count_generated_tokens_only(sample: Sample) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]]).expand(4, 3)
    sampling = make_sampling(
        4,
        temperature=0.0,
        presence=[1.5, 1.5, 0.0, 0.0],
        frequency=[0.0, 0.0, 0.6, 0.6],
        prompts=[[0, 0], [1], [0], [0, 0]],
        generated=[[], [0, 0], [0], [0, 0]],
    )
    # 3.0 stays; 3.0 - 1.5 < 2.0; 3.0 - 0.6 > 2.0; 3.0 - 1.2 < 2.0
    assert sample(logits, sampling).tokens.tolist() == [0, 1, 0, 1]


@both
def test_ids_of_no_vocabulary_in_the_history_are_passed_over(sample: Sample) -> None:
    sampling = make_sampling(1, temperature=0.0, presence=9.0, generated=[[-1, 500, 1]])
    assert sample(torch.tensor([[1.0, 2.0, 0.0]]), sampling).tokens.tolist() == [0]


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_give_minus_one_and_leave_the_others_alone(sample: Sample, temperature: float) -> None:
    logits = random_logits(6)
    clean = sample(logits, make_sampling(6, temperature=temperature, top_p=0.9)).tokens
    logits[1, 5] = float("nan")
    logits[2, 6] = INF
    logits[3] = -INF
    logits[4, 1:] = -INF  # one token is left
    drawn = sample(logits, make_sampling(6, temperature=temperature, top_p=0.9)).tokens
    assert drawn.tolist() == [clean[0], -1, -1, -1, 0, clean[5]]


@both
def test_a_row_without_a_possible_token_gives_minus_one(sample: Sample) -> None:
    bias = [(0, token, -INF) for token in range(5)]
    assert sample(torch.zeros(1, 5), make_sampling(1, bias=bias)).tokens.tolist() == [-1]


@both
def test_logprobs_are_those_of_the_raw_logits(sample: Sample) -> None:
    logits = random_logits(7)
    sampling = make_sampling(
        7, temperature=0.7, top_k=3, presence=1.0, generated=[[i] for i in range(7)], bias=[(0, 3, 9.0)], top_n=4
    )
    drawn = sample(logits, sampling)
    expected = logits.double().log_softmax(-1).float()
    assert_close(drawn.logprobs, expected.gather(1, drawn.tokens[:, None]).squeeze(1))
    assert drawn.top_ids.tolist() == expected.topk(4).indices.tolist()
    assert_close(drawn.top_logprobs, expected.topk(4).values)


@both
def test_the_logits_are_left_as_they_are(sample: Sample) -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, make_sampling(3, presence=1.0, repetition=1.3, generated=[[1], [2], [3]], bias=[(0, 0, -INF)]))
    assert torch.equal(logits, before)


def mixed_sampling(rows: int, vocab: int) -> Sampling:
    """Every knob at many values, each row with its own."""
    generator = torch.Generator().manual_seed(5)

    def pick(values: list[float]) -> list[float]:
        return [values[i] for i in torch.randint(len(values), (rows,), generator=generator).tolist()]

    history = torch.randint(vocab, (rows, 12), generator=generator).tolist()
    return make_sampling(
        rows,
        temperature=pick([0.0, 0.3, 1.0, 2.0]),
        top_k=[int(k) for k in pick([0, 0, 1, 40, 1500, 10**6])],
        top_p=pick([1.0, 1.0, 0.999, 0.9, 0.1]),
        min_p=pick([0.0, 0.0, 0.1]),
        presence=pick([0.0, 0.0, 1.0]),
        frequency=pick([0.0, 0.0, 0.5]),
        repetition=pick([1.0, 1.0, 1.3]),
        seeds=[i * 7919 - 3 for i in range(rows)],
        prompts=[h[:5] for h in history],
        generated=[h[5 : 5 + i % 8] for i, h in enumerate(history)],
        bias=[(i, i % vocab, 3.0) for i in range(0, rows, 3)],
        top_n=3,
    )


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("vocab", [5, 97, 5000])
@pytest.mark.parametrize("rows", [0, 1, 63])
def test_cpu_draws_what_the_reference_draws(rows: int, vocab: int, spread: float) -> None:
    # Rounded logits are full of ties, as those of a bfloat16 model are.
    logits = random_logits(rows, vocab, spread=spread).bfloat16().float()
    sampling = mixed_sampling(rows, vocab)
    ours, theirs = cpu.sample(logits, sampling), reference(logits, sampling)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert_close(ours.logprobs, theirs.logprobs)
    assert_close(ours.top_logprobs, theirs.top_logprobs)


@both
def test_a_row_is_drawn_alike_alone_and_among_others(sample: Sample) -> None:
    logits = random_logits(16, 2000)
    sampling = mixed_sampling(16, 2000)
    together = sample(logits, sampling).tokens
    per_row = {name for name, value in sampling._asdict().items() if isinstance(value, torch.Tensor)} - {
        "tokens", "bias_index", "bias_ids", "bias_values",
    }  # fmt: skip
    for i in range(16):
        mine = sampling.bias_index == i
        alone = sampling._replace(
            **{name: getattr(sampling, name)[i : i + 1] for name in per_row},
            bias_index=torch.zeros(int(mine.sum()), dtype=torch.int64),
            bias_ids=sampling.bias_ids[mine],
            bias_values=sampling.bias_values[mine],
        )
        assert sample(logits[i : i + 1], alone).tokens.item() == together[i]
