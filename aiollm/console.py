"""What a person reads while the server starts: phases with their seconds, the memory budget, where it listens."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from aiollm.wire.messages import Ready


class Console:
    """Lines on stderr. On a terminal the progress of a phase is redrawn in place; elsewhere only whole lines appear.

    A log on a full disk, or whose reader has gone, loses lines and stops nothing.
    """

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._redraws = out.isatty()
        self._drawn = ""
        self._phase = ""
        self._began = self.started = time.monotonic()

    def say(self, line: str) -> None:
        """One line, below whatever was drawn."""
        self._clear()
        self._write(line + "\n")

    def progress(self, phase: str, fraction: float | None) -> None:
        """A phase and how much of it is done; a new phase closes the one before with its seconds."""
        if phase != self._phase:
            self.close()
            self._phase, self._began = phase, time.monotonic()
        if self._redraws:
            self._clear()
            self._drawn = phase if not fraction else f"{phase} {fraction:.0%}"
            self._write(self._drawn)

    def close(self) -> None:
        """End the phase that runs: one line with its seconds."""
        if self._phase:
            self.say(f"{self._phase}: {time.monotonic() - self._began:.1f} s")
        self._phase = ""

    def _clear(self) -> None:
        if self._drawn:
            self._write("\r" + " " * len(self._drawn) + "\r")
        self._drawn = ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._out.write(text)
            self._out.flush()


def budget(ready: Ready, longest: int) -> list[str]:
    """The memory that a worker measured, a line each, and what the KV cache holds; `longest` is the longest request."""
    width = max(len(what) for what, _ in ready.budget)
    lines = [f"  {what:<{width}} {_size(amount):>10}" for what, amount in ready.budget]
    contexts = ready.slots * (1 + ready.windowed) / (longest + ready.windowed * min(longest, ready.window))
    ends = f"; layers with a window keep the last {ready.window:,} of each" if ready.windowed else ""
    return [
        f"memory of each worker ({ready.data_type}):",
        *lines,
        f"  the KV cache holds {ready.slots:,} tokens, {contexts:.1f} requests of the longest length"
        f" ({longest:,}){ends}; --max_total_token_num and --max_req_total_len set these",
    ]


def length(asked: int, longest: int) -> list[str]:
    """That --max_req_total_len asked for more than there is."""
    said = f"--max_req_total_len {asked} is lowered to {longest}, which the model's context and the KV cache hold"
    return [said] if asked > longest else []


def precision(asked: str, found: str) -> list[str]:
    """What was chosen where --data_type left it open on a CPU, and the other choice."""
    if asked != "auto":
        return []
    said = {
        "int8": "8-bit weights: they cost 0.4 % of this model's perplexity; --data_type fp32 serves full precision",
        "fp32": "full precision; --data_type int8 is faster on CPUs with AVX-512 VNNI, and tools/perplexity.py "
        "measures what it costs a model",
    }
    return [said[found]] if found in said else []


def sampling(defaults: Mapping[str, float | None]) -> list[str]:
    """What the model's makers advise for requests that leave it open."""
    said = ", ".join(f"{name} {value:g}" for name, value in defaults.items() if value is not None)
    return [f"sampling unless a request says otherwise: {said}; --generation_config none leaves it out"] if said else []


def _size(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.1f} MiB"
