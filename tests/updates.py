"""Updates as a server sends them, written by hand: one row a time, slots in a row."""

from collections.abc import Sequence

from aiollm.wire.columns import Runs, pack
from aiollm.wire.messages import Admit, Update
from aiollm.wire.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def run_of(row: int, start: int, values: Sequence[int]) -> Runs:
    """Values of one row from position `start`."""
    return Runs(pack([row]), pack([start]), pack([len(values)]), pack(values)) if values else Runs()


def begin(
    number: int,
    row: int,
    tokens: Sequence[int],
    *,
    first_slot: int = 0,
    credit: int = 0,
    outputs: int = 4,
    generation: int = 1,
    retire: Sequence[int] = (),
    sampling: SamplingParams = GREEDY,
) -> Update:
    """Admit a row and compute its prompt in one chunk; `credit` slots let it decode, `outputs` tokens in all."""
    count = len(tokens)
    return Update(
        number=number,
        retire=pack(retire),
        admit=[Admit(row, generation, count, count, count + outputs, sampling)],
        slots=run_of(row, 0, range(first_slot, first_slot + count + credit)),
        tokens=run_of(row, 0, tokens),
        chunk_rows=pack([row]),
        chunk_starts=pack([0]),
        chunk_counts=pack([count]),
    )
