"""Whether workers could serve a model, told before its weights are fetched: the architecture, its values, the device.

python -m aiollm.workers.check FOLDER [--device cuda] [--ranks 2]; a folder with config.json is enough
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from aiollm.workers import gpu
from aiollm.workers.families.registry import describe


def main() -> int:
    """0, or 1 with one line on stderr that says what is in the way."""
    parser = argparse.ArgumentParser(prog="python -m aiollm.workers.check", description="could this model be served?")
    parser.add_argument("folder", type=Path, help="with config.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that the model is split over")
    args = parser.parse_args()
    try:
        values = json.loads((args.folder / "config.json").read_bytes())
        if not isinstance(values, dict):
            raise ValueError("config.json holds no object")
        describe(values)
        for rank in range(args.ranks if args.device == "cuda" else 0):
            gpu.check(torch.device("cuda", rank))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
