"""The rows as the loop sees them on the host: who is alive, how far each has been launched, how far it may go."""

import math

import numpy as np

from aiollm.wire.columns import ints
from aiollm.wire.messages import Update
from aiollm.wire.sampling import Constraint, Decay, FirstIds, Healing, SamplingParams
from aiollm.workers.step import Bias, Embed, Integers, PromptSlice

DEAD = SamplingParams()
EVER = 2**31
MOST_SCALE = 1e9  # of a logit; by then it stands alone
FEW = 8  # stop ids that are compared for all rows at once: 1,024 rows, one by one, take a millisecond


class Rows:
    """Columns by row id. A row is what (id, generation) names; the id alone is reused at once (rule B)."""

    def __init__(self, count: int) -> None:
        self.generation = np.zeros(count, np.int64)
        self.active = np.zeros(count, bool)
        self.decoding = np.zeros(count, bool)
        self.idle = np.zeros(count, bool)
        """Finished as far as this worker can tell; the server is the judge."""
        self.position = np.zeros(count, np.int64)
        """Next position to feed: advances at launch (rule D)."""
        self.known = np.zeros(count, np.int64)
        """Tokens known at admission; the row decodes once they are computed."""
        self.granted = np.zeros(count, np.int64)
        self.limit = np.zeros(count, np.int64)
        self.prompt = np.zeros(count, np.int64)
        self.sampling: list[SamplingParams] = [DEAD] * count
        self.stops: list[frozenset[int]] = [frozenset()] * count
        self._few_stops = np.full((count, FEW), -1, np.int64)
        """The stop ids of rows that have at most FEW, padded with what no vocabulary holds."""
        self._many_stops = np.zeros(count, bool)
        self.top_n = np.zeros(count, np.int64)
        self.biased = np.zeros(count, bool)
        """Whether `bias` has to look at a row."""
        self.constrained = np.zeros(count, bool)
        """Whether something is masked of what it may draw."""
        self._reach = np.zeros(count, np.int64)
        """For so many of its first tokens."""
        self.waiting = np.zeros(count, bool)
        """Draws nothing yet: its grammar is being built."""
        self.embeds = np.zeros(count, bool)

    @property
    def hold(self) -> int:
        """The row behind the last one, which pads."""
        return len(self.active)

    def apply(self, update: Update) -> None:
        """Take the host's part of an update, in the order of its fields."""
        self.active[ints(update.retire)] = self.waiting[ints(update.retire)] = False
        for admit in update.admit:
            row = admit.row
            if self.active[row]:
                raise ValueError(f"row {row} was admitted while it was running")
            self.generation[row] = admit.generation
            self.active[row], self.decoding[row], self.idle[row] = True, False, False
            self.position[row] = self.granted[row] = 0
            self.known[row], self.limit[row], self.prompt[row] = admit.tokens, admit.limit, admit.prompt_length
            self.sampling[row] = admit.sampling
            self.stops[row] = stops = frozenset(admit.sampling.stop_ids)
            self._few_stops[row] = [*stops, *[-1] * FEW][:FEW]
            self._many_stops[row] = len(stops) > FEW
            self.top_n[row] = admit.sampling.top_logprobs
            sampling = admit.sampling
            self.embeds[row] = sampling.embed
            self.biased[row] = bool(sampling.logit_bias) or sampling.min_tokens > 0 or sampling.decay is not None
            self.constrained[row] = bool(sampling.constraints)
            self._reach[row] = max(map(_reach, sampling.constraints), default=0)
        rows, starts, counts = ints(update.slots.rows), ints(update.slots.starts), ints(update.slots.counts)
        for row, start, count in zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True):
            if not self.active[row] or self.granted[row] != start:
                raise ValueError(f"slots of row {row} arrived for position {start}, not {self.granted[row]}")
            self.granted[row] = start + count

    def runnable(self) -> tuple[Integers, Integers]:
        """Rows that can decode one token now, and rows that only lack credit."""
        wants = self.active & self.decoding & ~self.idle & ~self.waiting & (self.position < self.limit - 1)
        credit = self.position < self.granted
        return np.flatnonzero(wants & credit), np.flatnonzero(wants & ~credit)

    def launched(self, rows: Integers, ends: Integers) -> None:
        """Positions advance at launch; a row whose known tokens are all launched decodes from here on. One that waits
        will compute the last of them once more, to draw from it."""
        self.position[rows] = ends
        self.decoding[rows] = ends >= self.known[rows]
        again = rows[self.waiting[rows] & self.decoding[rows]]
        self.position[again] = self.known[again] - 1

    def alive(self, rows: Integers, generations: Integers) -> np.ndarray:
        """Which (row, generation) pairs still run and are not idle."""
        mask: np.ndarray = self.active[rows] & (self.generation[rows] == generations) & ~self.idle[rows]
        return mask

    def stopped(self, rows: Integers, tokens: Integers) -> np.ndarray:
        """Which rows drew a token that ends them, or -1: none could be drawn."""
        found: np.ndarray = (self._few_stops[rows] == tokens[:, None]).any(axis=1) | (tokens < 0)
        for at in np.flatnonzero(self._many_stops[rows]).tolist():
            found[at] |= int(tokens[at]) in self.stops[rows[at]]
        return found

    def masked(self, rows: Integers) -> np.ndarray:
        """Which rows draw under a mask, of those whose position is that of the token to draw."""
        mask: np.ndarray = self.position[rows] - self.prompt[rows] < self._reach[rows]
        return mask

    def bias(self, rows: Integers) -> Bias:
        """Logit bias of the sampled rows, the masks of those that are too young to stop, and what those get that should
        come to an end."""
        bias, scales = Bias([], [], []), []
        for at in np.flatnonzero(self.biased[rows]).tolist():
            row = int(rows[at])
            sampling, generated = self.sampling[row], int(self.position[row] - self.prompt[row])
            young = self._reach[row] <= generated < sampling.min_tokens
            masked = sampling.stop_ids if young else ()  # within its reach the mask takes care
            entries = [(id, value, 0.0) for id, value in sampling.logit_bias.items()]
            entries += [(id, float("-inf"), 0.0) for id in masked]
            if (decay := sampling.decay) is not None and (scale := _scale(decay, generated)) > 0:
                entries += [(id, 0.0, scale) for id in decay.ids if id not in masked]
            for id, value, scale in entries:
                bias.at.append(at)
                bias.ids.append(id)
                bias.values.append(value)
                scales.append(scale)
        return bias._replace(scales=scales)

    def embedded(self, rows: Integers, last: Integers) -> list[Embed]:
        """Which of the sampled rows want their hidden state, each with the place of its last token."""
        at = np.flatnonzero(self.embeds[rows])
        return [Embed(*pair) for pair in zip(at.tolist(), last[at].tolist(), strict=True)]

    def prompt_slices(self, rows: Integers, starts: Integers, counts: Integers, decodes: int) -> list[PromptSlice]:
        """The prompt tokens whose logprobs are wanted, in chunks that stand behind `decodes` rows."""
        slices, begin = [], decodes
        for at in range(decodes, len(rows)):
            row, start, count = int(rows[at]), int(starts[at]), int(counts[at])
            wanted = min(count, int(self.prompt[row]) - 1 - start)  # the token after the prompt is drawn
            if self.sampling[row].prompt_logprobs >= 0 and wanted > 0:
                top = self.sampling[row].prompt_logprobs
                slices.append(PromptSlice(row, int(self.generation[row]), begin, wanted, start + 1, top))
            begin += count
        return slices


def _reach(constraint: Constraint) -> int:
    """How many of the first tokens a constraint bears on."""
    match constraint:
        case FirstIds():
            return 1
        case Healing(text):
            return len(text)  # a token has a byte at least
    return EVER


def _scale(decay: Decay, generated: int) -> float:
    """factor ** (generated - start) - 1, within what leaves logits finite."""
    return min(math.expm1(min(max(0, generated - decay.start) * math.log(decay.factor), 99.0)), MOST_SCALE)
