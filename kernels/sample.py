"""Draw the next token of each row on a GPU; the contract is ref/sample.py.

Two launches, whatever mix of requests the rows are. `_statistics` reads the logits once, many programs to a row, and
leaves the largest logit and the sum of weights of each group of tokens, of the raw logits and of the processed ones.
`_finish` has two programs for a row: one draws the token, one looks for the alternatives. Greedy rows and those without
top_k, top_p and min_p read one group again; the others those groups that hold tokens above their cut (see select.py).

A row's result does not depend on the rows beside it: its statistics are always added up in the same order, and weights
are integers, whose sums are the same in any.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.cases import make_sampling
from aiollm.kernels.draw import draw, scale_of, scratch_ints
from aiollm.kernels.logprobs import alternatives, check_top, log_total, splits
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.processed import GROUP, changes, clear, processed, row_rules
from aiollm.kernels.random import bits
from aiollm.kernels.ref.sample import sample as reference
from aiollm.kernels.select import BINS, LOG2_E, group_statistics
from aiollm.kernels.tolerance import assert_drawn
from aiollm.kernels.tuned import lookup
from aiollm.kernels.workload import Case, Shape

CANDIDATES = [
    {"TILE": tile, "TILE_WARPS": few, "TILE_REGISTERS": most, "CHUNK": chunk, "num_warps": warps, "maxnreg": registers}
    for tile, few, most in ((2048, 4, 96), (1024, 4, 64), (4096, 8, 96))
    for chunk, warps, registers in ((2048, 8, 128), (1024, 4, 168), (1024, 8, 128))
]


@triton.jit
def _load(logits, stride, ids, vocab):
    return tl.load(logits + ids.to(tl.int64) * stride, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _statistics(
    LOGITS, row_stride, stride, vocab, groups, ROWS, LENGTHS, PRESENCE, FREQUENCY, REPETITION, PROMPT_LENGTHS, TOKENS,
    token_stride, BIAS_STARTS, BIAS_IDS, BIAS_VALUES, MASKS, MASK_LINES, TEMPERATURE, STATISTICS, COUNTS, BIASES,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """STATISTICS [r, 4, groups]: raw peaks and sums, processed peaks and sums (at the row's temperature)."""
    trigger(PDL)
    wait(PDL)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(ROWS + i)
    TILES: tl.constexpr = TILE // GROUP
    at = i * tl.num_programs(1) + tl.program_id(1)
    scratch = (COUNTS + at * TILE, BIASES + at * TILE)
    rules = row_rules(
        i, row, vocab, LENGTHS, PRESENCE, FREQUENCY, REPETITION, PROMPT_LENGTHS, TOKENS, token_stride, BIAS_STARTS,
        BIAS_IDS, BIAS_VALUES, MASKS, MASK_LINES,
    )  # fmt: skip
    changed = changes(rules)
    if changed:
        clear(scratch[0], scratch[1], TILE)
    temperature = tl.load(TEMPERATURE + row)
    scale = scale_of(temperature)
    again = changed | ((temperature != 0) & (temperature != 1))
    logits = LOGITS + i * row_stride
    out = STATISTICS + i * 4 * groups
    lane = tl.arange(0, TILES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    coming = _load(logits, stride, tl.program_id(1) * TILE + lane, vocab)
    for tile in range(tl.program_id(1), tl.cdiv(vocab, TILE), tl.num_programs(1)):
        x = coming.to(tl.float32)
        coming = _load(logits, stride, (tile + tl.num_programs(1)) * TILE + lane, vocab)  # while this one is computed
        group = tile * TILES + tl.arange(0, TILES)
        peak, total = group_statistics(x, LOG2_E)
        tl.store(out + group, peak, mask=group < groups)
        tl.store(out + groups + group, total, mask=group < groups)
        if again:
            if changed:
                x = processed(x, tile * TILE + lane, tile * TILES, rules, vocab, out, scratch, False, TILE)
            peak, total = group_statistics(x, scale)
        tl.store(out + 2 * groups + group, peak, mask=group < groups)
        tl.store(out + 3 * groups + group, total, mask=group < groups)


@triton.jit(do_not_specialize=["top_n"])
def _finish(
    LOGITS, row_stride, stride, vocab, groups, ROWS, LENGTHS, PRESENCE, FREQUENCY, REPETITION, PROMPT_LENGTHS, TOKENS,
    token_stride, BIAS_STARTS, BIAS_IDS, BIAS_VALUES, MASKS, MASK_LINES, TEMPERATURE, STATISTICS, COUNTS, BIASES,
    TOP_P, TOP_K, MIN_P, SEEDS, INTS, ints_stride, MASSES, masses_stride, DRAWN, LOGPROBS, TOP_IDS, TOP_LOGPROBS, top_n,
    N: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) draws sequence i's token, program (i, 1) writes its alternatives."""
    trigger(PDL)
    wait(PDL)
    i = tl.program_id(0).to(tl.int64)
    what = tl.program_id(1)
    logits = LOGITS + i * row_stride
    statistics = STATISTICS + i * 4 * groups
    raw_peaks, total = log_total(statistics, statistics + groups, groups, N)
    if what == 0:
        row = tl.load(ROWS + i)
        rules = row_rules(
            i, row, vocab, LENGTHS, PRESENCE, FREQUENCY, REPETITION, PROMPT_LENGTHS, TOKENS, token_stride, BIAS_STARTS,
            BIAS_IDS, BIAS_VALUES, MASKS, MASK_LINES,
        )  # fmt: skip
        scratch = (COUNTS + i * CHUNK, BIASES + i * CHUNK)
        if changes(rules):
            clear(scratch[0], scratch[1], CHUNK)
        at = tl.arange(0, N)
        peak = tl.max(tl.load(statistics + 2 * groups + at, mask=at < groups, other=float("-inf")), 0)
        token = tl.full((), -1, tl.int32)
        if (total == total) & (peak > float("-inf")) & (peak < float("inf")):
            token = draw(
                logits, stride, vocab, groups, statistics, peak, tl.load(TEMPERATURE + row), tl.load(TOP_K + row),
                tl.load(TOP_P + row), tl.load(MIN_P + row), bits(tl.load(SEEDS + row), tl.load(LENGTHS + i)),
                INTS + i * ints_stride,                MASSES + i * masses_stride, rules, scratch, N, CHUNK,
            )  # fmt: skip
        tl.store(DRAWN + i, token.to(tl.int64))
        raw = tl.load(logits + tl.maximum(token, 0).to(tl.int64) * stride).to(tl.float32)
        tl.store(LOGPROBS + i, raw - total)
    else:
        alternatives(logits, stride, vocab, raw_peaks, total, TOP_IDS + i * top_n, TOP_LOGPROBS + i * top_n, top_n, N)


def sample(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    """logits [r, vocab] of any floating type -> Sampled; alternatives that are equal stand in the order of their ids.

    Errors: ValueError if top_n is above the vocabulary.
    """
    s, (rows, vocab) = sampling, logits.shape
    check_top(s.top_n, vocab)
    device, groups = logits.device, triton.cdiv(vocab, GROUP.value)
    result = Sampled(
        tokens=torch.empty(rows, dtype=torch.int64, device=device),
        logprobs=torch.empty(rows, device=device),
        top_ids=torch.empty(rows, s.top_n, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(rows, s.top_n, device=device),
    )
    if not rows:
        return result
    # The number of rows is no part of the key: the order in which a row's sums are added up must not depend on it.
    config = lookup("sample", {"vocab": vocab, "dtype": str(logits.dtype)}, CANDIDATES[0])
    tile, chunk = config["TILE"], config["CHUNK"]
    shared, programs = splits(rows, triton.cdiv(vocab, tile)), 2 if s.top_n else 1
    places = rows * max(shared * tile, chunk)
    ints = torch.empty(rows, scratch_ints(groups), dtype=torch.int32, device=device)
    masses = torch.empty(rows, max(BINS.value, groups), dtype=torch.int64, device=device)
    # Without fused multiply-adds a processed logit is the same number in both kernels, and in the reference.
    options = {"enable_fp_fusion": False, **pdl(device)}
    shape = (logits, logits.stride(0), logits.stride(1), vocab, groups, s.rows, s.lengths)
    rules = (
        s.presence, s.frequency, s.repetition, s.prompt_lengths, s.tokens, s.tokens.stride(0), s.bias_starts,
        s.bias_ids, s.bias_values, s.masks, s.mask_lines,
    )  # fmt: skip
    scratch = (
        torch.empty(rows, 4, groups, device=device),
        torch.empty(places, dtype=torch.int32, device=device),
        torch.empty(places, device=device),
    )
    _statistics[(rows, shared)](
        *shape, *rules, s.temperature, *scratch, TILE=tile, num_warps=config["TILE_WARPS"],
        maxnreg=config["TILE_REGISTERS"], **options,
    )  # fmt: skip
    _finish[(rows, programs)](
        *shape, *rules, s.temperature, *scratch, s.top_p, s.top_k, s.min_p, s.seeds, ints, ints.stride(0), masses,
        masses.stride(0), *result, s.top_n, N=triton.next_power_of_2(groups), CHUNK=chunk,
        num_warps=config["num_warps"], maxnreg=config["maxnreg"], **options,
    )  # fmt: skip
    return result


def cases(shape: Shape) -> Iterator[Case]:
    """Greedy rows, plain sampling, and everything that can be asked for, with a history of 1,024 tokens."""
    everything = {
        "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "presence": 0.3, "frequency": 0.2,
        "repetition": 1.1,
    }  # fmt: skip
    mixes: dict[str, tuple[dict[str, float], int, int]] = {
        "greedy": ({"temperature": 0.0}, 0, 0),
        "plain": ({}, 0, 0),
        "top_p": ({"top_p": 0.9}, 0, 0),
        "all": (everything, 1024, 5),
    }
    for rows in (1, 256, 1024):
        for label, (knobs, history, top_n) in mixes.items():

            def make(
                device: torch.device,
                rows: int = rows,
                knobs: dict[str, Any] = knobs,
                history: int = history,
                top_n: int = top_n,
            ) -> tuple[torch.Tensor, Sampling]:
                logits = (torch.randn(rows, shape.vocab, device=device) * 3).to(shape.dtype)
                known = torch.randint(shape.vocab, (rows, history)).tolist()
                prompts, generated = [ids[::2] for ids in known], [ids[1::2] for ids in known]
                sampling = make_sampling(rows, **knobs, prompts=prompts, generated=generated, top_n=top_n)
                moved: dict[str, Any] = {
                    name: value.to(device) for name, value in sampling._asdict().items() if name != "top_n"
                }
                return logits, sampling._replace(**moved)

            size = rows * shape.vocab * shape.dtype.itemsize
            yield Case("sample", f"{rows} rows {label}", make, bytes=size, expected=_stable, agree=_agree)


def _stable(logits: torch.Tensor, sampling: Sampling) -> Sampled:
    """The reference, with equal alternatives in the order that the kernel gives them."""
    drawn = reference(logits, sampling._replace(top_n=0))
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    total = logits.float().logsumexp(-1, keepdim=True)
    return drawn._replace(top_ids=ids[:, : sampling.top_n], top_logprobs=values[:, : sampling.top_n] - total)


def _agree(given: tuple[torch.Tensor, Sampling], drawn: Sampled, expected: Sampled) -> None:
    assert_drawn(*given, drawn, expected)
    torch.testing.assert_close(drawn.top_ids, expected.top_ids)
