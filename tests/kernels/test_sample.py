import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from aiollm.kernels import sample as kernel
from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.cases import make_sampling
from aiollm.kernels.cpu import sample as cpu
from aiollm.kernels.ref.random import uniform
from aiollm.kernels.ref.sample import sample as reference
from aiollm.kernels.tolerance import assert_close, assert_drawn

Sample = Callable[[torch.Tensor, Sampling], Sampled]
INF = float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(sampling: Sampling) -> Sampling:
    return sampling._replace(**{k: v.to(DEVICE) for k, v in sampling._asdict().items() if isinstance(v, torch.Tensor)})


def triton_sample(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    return Sampled(*(column.cpu() for column in kernel.sample(logits.to(DEVICE), on_device(sampling))))


every = pytest.mark.parametrize("sample", [reference, cpu.sample, triton_sample], ids=["reference", "cpu", "triton"])


def interpreted(sample: Sample) -> bool:
    """Triton's interpreter takes a tenth of a second for a row."""
    return sample is triton_sample and DEVICE.type == "cpu"


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


@every
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_draws_what_plain_loops_draw(sample: Sample, knobs: dict[str, float]) -> None:
    rows = 6 if interpreted(sample) else 40
    logits = random_logits(rows)
    sampling = make_sampling(rows, **knobs)
    numbers = uniform(sampling.seeds[sampling.rows], sampling.lengths).tolist()
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs
    expected = [invert(distribution(row, **settings), u) for row, u in zip(logits.tolist(), numbers, strict=True)]
    assert sample(logits, sampling).tokens.tolist() == expected


@every
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_drawn_tokens_follow_the_distribution(sample: Sample, knobs: dict[str, float]) -> None:
    if interpreted(sample):
        pytest.skip("2,000 draws take the interpreter minutes; the test above compares each draw")
    draws = 2000
    logits = random_logits(1, vocab=23, seed=3)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs
    probabilities = distribution(logits[0].tolist(), **settings)
    counts = Counter(sample(logits.expand(draws, -1), make_sampling(draws, **knobs)).tokens.tolist())
    assert all(probabilities[token] > 0 for token in counts)
    likely = [i for i, p in enumerate(probabilities) if p * draws > 5]
    chi_square = sum((counts[i] - probabilities[i] * draws) ** 2 / (probabilities[i] * draws) for i in likely)
    assert chi_square < len(likely) + 4 * math.sqrt(2 * len(likely))  # mean and deviation of chi-square


@every
def test_temperature_0_takes_the_lowest_id_among_the_largest(sample: Sample) -> None:
    logits = torch.zeros(2, 70)
    logits[0, [66, 9, 31]] = 4.0
    assert sample(logits, make_sampling(2, temperature=0.0, top_k=3, top_p=0.1)).tokens.tolist() == [9, 0]


@every
def test_top_k_keeps_the_lower_ids_among_equals(sample: Sample) -> None:
    rows = 16 if interpreted(sample) else 200
    logits = torch.zeros(rows, 3000)
    logits[:, 2500] = 1.0
    drawn = sample(logits, make_sampling(rows, top_k=4)).tokens
    assert set(drawn.tolist()) == {0, 1, 2, 2500}


@every
def test_bias_moves_and_bans_tokens(sample: Sample) -> None:
    logits = torch.zeros(3, 9)
    bias = [(0, 4, 50.0), (0, 4, 50.0), (0, 2, 99.0), (2, 0, -INF), (2, 1, -INF)]
    assert sample(logits, make_sampling(3, temperature=0.0, bias=bias)).tokens.tolist() == [4, 0, 2]


@every
def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output(sample: Sample) -> None:
    logits = torch.tensor([[3.0, 2.9, 2.0, -1.0]]).expand(3, 4)
    prompts, generated = [[0], [0], [0, 1, 2]], [[], [1, 1], [3]]
    sampling = make_sampling(3, temperature=0.0, repetition=[1.2, 1.2, 40.0], prompts=prompts, generated=generated)
    assert sample(logits, sampling).tokens.tolist() == [1, 0 if 3 / 1.2 > 2.9 / 1.2 else 1, 0]
    bare = torch.tensor([[-1.0, -1.5]])
    sampling = make_sampling(1, temperature=0.0, repetition=2.0, prompts=[[0]])
    assert sample(bare, sampling).tokens.tolist() == [1]


@every
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


def penalized(logits: list[float], counted: list[int], generated: list[int], knobs: tuple[float, float, float]) -> int:
    """The likeliest token after penalties, by plain loops: repetition over `counted`, the others over `generated`."""
    repetition, frequency, presence = knobs
    values = list(logits)
    for token in set(counted):
        values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
    for token in set(generated):
        values[token] -= frequency * generated.count(token) + presence
    return max(range(len(values)), key=values.__getitem__)


@every
@pytest.mark.parametrize("knobs", [(1.5, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, 0.9), (1.2, 0.3, 0.2)])
def test_a_prompt_may_count_for_repetition_for_all_penalties_or_for_none(
    sample: Sample, knobs: tuple[float, float, float]
) -> None:
    rows, vocab = 6, 12
    generator = torch.Generator().manual_seed(int(100 * sum(knobs)))
    logits = random_logits(rows, vocab, seed=int(100 * sum(knobs)), spread=0.2)
    known = torch.randint(vocab, (rows, 9), generator=generator).tolist()
    cuts = [1, 2, 4, 5, 7, 8]
    prompts, generated = (
        [k[:c] for k, c in zip(known, cuts, strict=True)],
        [k[c:] for k, c in zip(known, cuts, strict=True)],
    )
    lengths = {"repetition": cuts, "all": [0] * rows, "none": [-cut for cut in cuts]}
    found = {
        name: sample(
            logits,
            make_sampling(
                rows, temperature=0.0, repetition=knobs[0], frequency=knobs[1], presence=knobs[2], prompts=prompts,
                generated=generated, prompt_lengths=column,
            ),
        ).tokens.tolist()
        for name, column in lengths.items()
    }  # fmt: skip
    rules = [(x, k, g) for x, k, g in zip(logits.tolist(), known, generated, strict=True)]
    assert found["repetition"] == [penalized(x, k, g, knobs) for x, k, g in rules]
    assert found["all"] == [penalized(x, k, k, knobs) for x, k, g in rules]
    assert found["none"] == [penalized(x, g, g, knobs) for x, k, g in rules]
    assert found["all"] != found["none"], "the logits tell the rules apart"


@every
def test_ids_of_no_vocabulary_in_the_history_are_passed_over(sample: Sample) -> None:
    sampling = make_sampling(1, temperature=0.0, presence=9.0, generated=[[-1, 500, 1]])
    assert sample(torch.tensor([[1.0, 2.0, 0.0]]), sampling).tokens.tolist() == [0]


@every
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's arithmetic with infinities
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


@every
def test_a_row_without_a_possible_token_gives_minus_one(sample: Sample) -> None:
    bias = [(0, token, -INF) for token in range(5)]
    assert sample(torch.zeros(1, 5), make_sampling(1, bias=bias)).tokens.tolist() == [-1]


@every
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


@every
def test_the_logits_are_left_as_they_are(sample: Sample) -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, make_sampling(3, presence=1.0, repetition=1.3, generated=[[1], [2], [3]], bias=[(0, 0, -INF)]))
    assert torch.equal(logits, before)


@every
def test_a_mask_leaves_only_what_it_allows(sample: Sample) -> None:
    logits = torch.zeros(4, 70)
    logits[:, 3] = 9.0
    masks = {0: [33, 64], 2: [3], 3: range(70)}
    sampling = make_sampling(4, temperature=[0.0, 0.0, 1.0, 0.0], masks=masks, vocab=70, bias=[(0, 64, 1.0)])
    assert sample(logits, sampling).tokens.tolist() == [64, 3, 3, 3]
    assert sample(logits[:1], make_sampling(1, masks={0: []}, vocab=70)).tokens.tolist() == [-1]


@every
def test_top_k_counts_what_a_mask_left(sample: Sample) -> None:
    logits = random_logits(3, 300)
    sampling = make_sampling(3, top_k=50, masks={i: [7, 250] for i in range(3)}, vocab=300)
    assert set(sample(logits, sampling).tokens.tolist()) <= {7, 250}


def mixed_sampling(rows: int, vocab: int, history: int = 12, seed: int = 5) -> Sampling:
    """Every knob at many values, each row with its own."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[float]) -> list[float]:
        return [values[i] for i in torch.randint(len(values), (rows,), generator=generator).tolist()]

    known = torch.randint(vocab, (rows, history), generator=generator).tolist()
    half = history // 2
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
        prompts=[ids[:half] for ids in known],
        generated=[ids[half : half + i % half] for i, ids in enumerate(known)],
        prompt_lengths=[(half, 0, -half)[i // 2 % 3] for i in range(rows)],
        bias=[(i, i % vocab, 3.0) for i in range(0, rows, 3)],
        masks={i: range(0, vocab, 3) for i in range(rows) if i % 5 == 4 or i == rows - 1},
        vocab=vocab,
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


@pytest.mark.parametrize(
    ("rows", "vocab", "spread"), [(0, 97, 1.0), (1, 63, 1.0), (12, 1000, 8.0), (9, 5000, 0.01), (9, 5000, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_draws_what_the_reference_draws(rows: int, vocab: int, spread: float, dtype: torch.dtype) -> None:
    logits = random_logits(rows, vocab, spread=spread).to(dtype)
    sampling = mixed_sampling(rows, vocab)
    assert_drawn(logits, sampling, triton_sample(logits, sampling), reference(logits, sampling))


def test_triton_finds_the_cut_among_more_tokens_than_it_has_room_for() -> None:
    vocab = 140_000
    logits = random_logits(3, vocab, spread=0.02).bfloat16()
    knobs = {"top_k": [0, 3000, 0], "top_p": [0.9, 0.5, 1.0], "min_p": [0.0, 0.0, 0.97], "presence": [0.0, 1.0, 0.0]}
    sampling = make_sampling(3, **knobs, generated=[[5], [7, 9], []], vocab=vocab)
    assert_drawn(logits, sampling, triton_sample(logits, sampling), reference(logits, sampling))


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [63, 1000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_draws_what_the_reference_draws_at_scale(vocab: int, spread: float, dtype: torch.dtype) -> None:
    logits = random_logits(500, vocab, seed=1, spread=spread).to(dtype)
    sampling = mixed_sampling(500, vocab, history=3000)
    assert_drawn(logits, sampling, triton_sample(logits, sampling), reference(logits, sampling))


@pytest.mark.gpu
def test_a_captured_graph_serves_other_requests_than_it_was_captured_with() -> None:
    rows, vocab = 40, 5000
    inputs = [(random_logits(rows, vocab, seed=seed), mixed_sampling(rows, vocab, seed=seed)) for seed in range(3)]
    logits, sampling = inputs[0][0].to(DEVICE), on_device(inputs[0][1])
    kernel.sample(logits, sampling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = kernel.sample(logits, sampling)
    for others, wishes in inputs[::-1]:
        logits.copy_(others)
        for name, tensor in sampling._asdict().items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(getattr(wishes, name))
        graph.replay()
        assert_drawn(others, wishes, Sampled(*(column.cpu() for column in drawn)), reference(others, wishes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_may_be_strided(dtype: torch.dtype) -> None:
    logits = random_logits(8, 333).to(dtype)
    sampling = mixed_sampling(4, 150)
    for view in (logits[::2, 3:153], logits.T[:150, ::2].T, logits[:1, :150].expand(4, -1)):
        ours, packed = triton_sample(view, sampling), triton_sample(view.contiguous(), sampling)
        assert all(torch.equal(a, b) for a, b in zip(ours, packed, strict=True))


def test_more_alternatives_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="top_n: 6 alternatives; a vocabulary of 5 has from 0 to 5"):
        triton_sample(torch.zeros(1, 5), make_sampling(1, top_n=6))


def alone(sampling: Sampling, i: int) -> Sampling:
    """What concerns sequence i, as a step of one sequence."""
    begin, end = sampling.bias_starts[i : i + 2].tolist()
    return sampling._replace(
        rows=sampling.rows[i : i + 1],
        lengths=sampling.lengths[i : i + 1],
        bias_starts=torch.tensor([0, end - begin], dtype=torch.int32),
        bias_ids=sampling.bias_ids[begin:end],
        bias_values=sampling.bias_values[begin:end],
        mask_lines=sampling.mask_lines[i : i + 1],
    )


@every
def test_a_row_is_drawn_alike_alone_and_among_others(sample: Sample) -> None:
    rows = 7 if interpreted(sample) else 16
    logits, sampling = random_logits(rows, 2000), mixed_sampling(rows, 2000)
    together = sample(logits, sampling)
    for i in range(rows):
        drawn = sample(logits[i : i + 1], alone(sampling, i))
        assert all(torch.equal(one, among[i : i + 1]) for one, among in zip(drawn, together, strict=True))


@pytest.mark.gpu
def test_it_does_not_matter_how_many_programs_share_a_row() -> None:
    logits, sampling = random_logits(1200, 151_936).bfloat16(), mixed_sampling(1200, 151_936, history=300)
    together = triton_sample(logits, sampling)
    for i in range(0, 1200, 60):
        drawn = triton_sample(logits[i : i + 1], alone(sampling, i))
        assert all(torch.equal(one, among[i : i + 1]) for one, among in zip(drawn, together, strict=True))
