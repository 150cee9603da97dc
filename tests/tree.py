"""The modules that are installed, where their files lie, and to which room each belongs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"aiollm": ROOT / "aiollm", "aiollm.workers": ROOT / "workers", "aiollm.kernels": ROOT / "kernels"}
ROOMS = {"wire", "engine", "text", "hub", "fleet", "api", "bench", "grammar", "offline", "workers", "kernels"}

# What the server process must never load.
HEAVY = {"torch", "triton", "transformers"}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *inner]).removesuffix(".__init__")] = path
    return found


MODULES = _modules()
"""Name and file: aiollm.workers.loop -> workers/loop.py."""


def room(name: str) -> str:
    """aiollm.engine.radix -> engine; a module of aiollm itself, as aiollm.config -> aiollm."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "aiollm"
