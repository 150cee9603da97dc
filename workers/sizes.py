"""The sizes for which steps are captured as graphs: a step is padded to the next one."""

from itertools import chain
from typing import NamedTuple

TOP = 20  # alternatives that a graph reports where any are asked for: the most that OpenAI's interface allows
PROMPT = 256  # tokens: short prompts are padded to powers of two
STEP = 256  # tokens between the sizes of long mixed steps, the most that a matrix product takes at once


class Forward(NamedTuple):
    """A forward of one token for each sequence, or a mixed one."""

    mixed: bool
    tokens: int
    sequences: int


class Draw(NamedTuple):
    """The drawing of a token for each of some sequences."""

    top_n: int
    sampled: int


Size = Forward | Draw


def sizes(rows: int, budget: int, top: int = TOP) -> list[Size]:
    """Every size of a server of `rows` rows whose chunks have at most `budget` tokens. The largest comes first: in the
    memory that it leaves behind there is room for the others'. `top` is for vocabularies smaller than TOP."""
    decodes = decode_sizes(rows)
    forwards = [Forward(True, tokens, min(tokens, rows)) for tokens in mixed_sizes(rows + budget)]
    forwards += [Forward(False, tokens, tokens) for tokens in decodes]
    draws = [Draw(top_n, sampled) for top_n in (0, top) for sampled in decodes]
    return sorted(forwards, reverse=True, key=lambda size: size.tokens) + draws[::-1]


def decode_sizes(rows: int) -> list[int]:
    """Ascending, up to all rows; 39 up to 1,024, closest where a row more costs most."""
    dense = chain((1, 2, 4), range(8, 64, 8), range(64, 256, 16), range(256, 512, 32), range(512, rows, 64))
    return sorted({size for size in dense if size < rows} | {rows})


def mixed_sizes(most: int) -> list[int]:
    """Ascending, up to `most` tokens."""
    coarse = chain((16, 32, 64, 128), range(PROMPT, 4 * STEP, STEP // 2), range(4 * STEP, most, STEP))
    return sorted({size for size in coarse if size < most} | {most})


def early(every: list[Size]) -> list[Size]:
    """Those to capture before a server is ready: every step finds one, and a mixed one, where a token of padding costs
    most, the nearest: with 1,119 tokens padded to 1,536 a step took 39.6 ms on an H100, with 1,152 34.6."""

    def common(size: Size) -> bool:
        if isinstance(size, Draw):
            return size.top_n == 0 and (size.sampled <= 8 or size.sampled % 32 == 0)
        return size.mixed or size.tokens <= 8 or size.tokens % 32 == 0

    largest = {_kind(size): size for size in reversed(every)}.values()
    return [size for size in every if common(size) or size in largest]


def _kind(size: Size) -> tuple[type, int]:
    return type(size), size[0]
