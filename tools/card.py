"""The first GPU's clock and power while something runs, as nvidia-smi tells them twice a second.

A card that heat or its supply slows down serves at half the rate, and nothing else shows why.
"""

import statistics
import subprocess
import tempfile
from contextlib import suppress
from typing import Any

PERIOD_MS = 500
ASKED = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
# What slows a clock down besides the power limit, which a long step of any sound card meets: bits of
# nvmlClocksEventReasons for the hardware's slowdown, heat by software and by hardware, and the power brake.
SLOWED = 0x08 | 0x20 | 0x40 | 0x80


class Card:
    """`with Card() as card:` watches; `summary()` afterwards. Without nvidia-smi nothing is seen."""

    def __enter__(self) -> "Card":
        self._lines = tempfile.TemporaryFile("w+")
        ask = ["nvidia-smi", "-i", "0", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits", "-lms", str(PERIOD_MS)]
        self._watch: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self._watch = subprocess.Popen(ask, stdout=self._lines, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.terminate()
            self._watch.wait()
        self._lines.seek(0)
        self._said = self._lines.read()
        self._lines.close()

    def summary(self) -> dict[str, Any]:
        """Medians of MHz and watts, the highest temperature, and the share of the time that the card was slowed down by
        more than its power limit; empty where nothing was seen."""
        return summed(self._said)


def summed(said: str) -> dict[str, Any]:
    """The summary of nvidia-smi's lines; the last one may be torn."""
    looks = [fields for line in said.splitlines() if len(fields := line.split(", ")) == 4 and fields[3][:2] == "0x"]
    if not looks:
        return {}
    clocks, watts, heat, reasons = zip(*looks, strict=True)
    return {
        "sm_mhz": statistics.median(map(float, clocks)),
        "watts": statistics.median(map(float, watts)),
        "highest_celsius": max(map(float, heat)),
        "slowed_share": round(sum(bool(int(reason, 16) & SLOWED) for reason in reasons) / len(looks), 3),
    }
