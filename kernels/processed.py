"""What a request does to the logits before they are drawn from: bias, the grammar's mask, penalties.

Nothing of the size of the vocabulary is written. A tile of logits is in registers; the bias entries and known tokens
that fall into it are counted in scratch memory of the tile's shape. Counts are integers, so the order in which the
atomics come makes no difference; nor does that of the bias, as a token has at most two entries: its bias, and the mask
of min_tokens.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # tokens that are skipped or read together; one warp reads them with 16 bytes a lane
BLOCK = tl.constexpr(512)  # entries, or known tokens, that are looked at together


@triton.jit
def row_rules(
    i, row, vocab, LENGTHS, PRESENCE, FREQUENCY, REPETITION, PROMPT_LENGTHS, TOKENS, token_stride, BIAS_STARTS,
    BIAS_IDS, BIAS_VALUES, MASKS, MASK_LINES,
):  # fmt: skip
    """What `processed` wants to know of sequence i, which has row `row` of the tables."""
    line = tl.load(MASK_LINES + i)
    presence, frequency, repetition = tl.load(PRESENCE + row), tl.load(FREQUENCY + row), tl.load(REPETITION + row)
    penalties = (presence, frequency, repetition, tl.div_rn(1.0, repetition))
    return (
        (BIAS_IDS, BIAS_VALUES, tl.load(BIAS_STARTS + i), tl.load(BIAS_STARTS + i + 1)),
        (MASKS + line.to(tl.int64) * ((vocab + 31) // 32), line >= 0),
        (TOKENS + row * token_stride, tl.load(LENGTHS + i).to(tl.int32), tl.load(PROMPT_LENGTHS + row).to(tl.int32)),
        penalties,
        (presence != 0) | (frequency != 0) | (repetition != 1),
    )


@triton.jit
def changes(rules):
    """Whether `processed` changes anything."""
    bias, mask, _, _, penalized = rules
    return (bias[2] < bias[3]) | mask[1] | penalized


@triton.jit
def clear(COUNTS, BIASES, TILE: tl.constexpr):
    """Prepare the scratch memory of `processed`: as it leaves it, all is 0."""
    at = tl.arange(0, TILE)
    tl.store(COUNTS + at, 0)
    tl.store(BIASES + at, 0.0)


@triton.jit
def _place(token, first, RANKS, vocab, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Where tokens lie in the tile whose first group is `first` (of the listed ones), and which of them do."""
    known = (token >= 0) & (token < vocab)
    rank = token // GROUP
    if LISTED:
        rank = tl.load(RANKS + rank, mask=known, other=-1)
    return (rank - first) * GROUP + token % GROUP, known & (rank >= first) & (rank < first + TILE // GROUP)


@triton.jit(noinline=True)
def _count(first, rules, vocab, RANKS, scratch, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Put the bias and the counts of the tile into scratch memory. Called: copies cost a third of the compile time."""
    bias, _, history, _, penalized = rules
    COUNTS, BIASES = scratch
    at = tl.arange(0, BLOCK)
    tl.debug_barrier()  # the scratch memory is clear
    for begin in range(bias[2], bias[3], BLOCK):
        entry = begin + at
        token = tl.load(bias[0] + entry, mask=entry < bias[3], other=-1).to(tl.int32)
        value = tl.load(bias[1] + entry, mask=entry < bias[3], other=0.0)
        place, inside = _place(token, first, RANKS, vocab, LISTED, TILE)
        tl.atomic_add(BIASES + place, value, mask=inside, sem="relaxed")
    tokens, length, prompt_length = history
    for begin in range(0, tl.where(penalized, length, 0), BLOCK):
        position = begin + at
        token = tl.load(tokens + position, mask=(position < length) & (position >= -prompt_length), other=-1)
        place, inside = _place(token, first, RANKS, vocab, LISTED, TILE)
        # Bit 0: seen in the prompt; above it: how often it was generated.
        tl.atomic_or(COUNTS + place, 1, mask=inside & (position < prompt_length), sem="relaxed")
        tl.atomic_add(COUNTS + place, 2, mask=inside & (position >= prompt_length), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def processed(x, ids, first, rules, vocab, RANKS, scratch, LISTED: tl.constexpr, TILE: tl.constexpr):
    """x, ids [TILE / GROUP, GROUP]: raw logits of the groups from `first` on, and their tokens -> processed logits.

    Groups are those of the vocabulary, or if LISTED, those of a list in which RANKS says where each stands. `scratch`
    is (counts [TILE] int32, biases [TILE] float32), all 0 before and after.
    """
    bias, mask, _, penalties, penalized = rules
    COUNTS, BIASES = scratch
    lane = tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    biased = bias[2] < bias[3]
    if biased | penalized:
        _count(first, rules, vocab, RANKS, scratch, LISTED, TILE)
    if biased:
        value = tl.load(BIASES + lane, cache_modifier=".cg")
        tl.debug_barrier()  # small tiles: several threads read one place
        tl.store(BIASES + lane, 0.0, mask=value != 0)
        x += value
    if mask[1]:
        word = tl.load(mask[0] + ids // 32, mask=ids < vocab, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, x - float("inf"))
    if penalized:
        presence, frequency, repetition, inverse = penalties
        count = tl.load(COUNTS + lane, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(COUNTS + lane, 0, mask=count != 0)
        generated = (count >> 1).to(tl.float32)
        x = tl.where(count != 0, tl.where(x > 0, x * inverse, x * repetition), x)
        x = x - frequency * generated - tl.where(generated > 0, presence, 0.0)
    return x
