"""What layers with a sliding window are worth: how many requests of one length a card holds, with a KV lifetime for
each kind of layer and with one for all.

    python tools/windows.py [--card 79] [--rows 1024]
    python tools/windows.py --play ["Gemma 3 27B"]

Weights are bf16, row tables as long as the model's context; what steps and graphs take is set at 3 GiB. `--play` runs
the real scheduler on a simulated device, in a pool of either kind, until all conversations are over.
"""

import argparse
import math
from typing import Any

import torch
import workloads
from simulate import follow_up
from simulator import World

from aiollm.engine.ledger import Limits
from aiollm.engine.scheduler import Scheduler, Service
from aiollm.engine.window import Window
from aiollm.workers.families.registry import describe
from aiollm.workers.groups import Groups, lifetimes, one
from aiollm.workers.kv import bytes_per_slot
from aiollm.workers.model.parameters import parameters
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.shapes import SHAPES
from aiollm.workers.tp import Shard
from aiollm.workers.windows import ring

GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262208, "max_position_embeddings": 131072,
    "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rms_norm_eps": 1e-6, "sliding_window": 1024,
    "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "head_dim": 256,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Gemma 3 4B": GEMMA3 | {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "Gemma 3 12B": GEMMA3 | {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "Gemma 3 27B": GEMMA3 | {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    },
    "Gemma 2 9B": SHAPES["gemma-2-9b"],
    "Command-R7B": SHAPES["command-r7b"],
}  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)
LOADS = {  # people, turns of each, tokens of what one in three of them begins with
    "chats of 2k to 4k": (400, 6, 1500),
    "questions on texts of 12k": (150, 4, 12000),
}
SHARE, STEPS = 0.95, 3 << 30  # of the card that may be used; bytes of activations and graphs
BUDGET = 2048  # --batch_max_tokens
BF16 = torch.bfloat16


def slots(spec: DecoderSpec, groups: Groups, card: int, rows: int) -> int:
    """Slots of a pool that takes what is left of a card."""
    weights = sum(math.prod(parameter.shape) for parameter in parameters(spec, 0, 1)) * BF16.itemsize
    tables = 4 * (rows + 1) * (2 * spec.max_position + (groups.each - 1) * ring(groups.window, BUDGET))
    return int(card * SHARE - weights - tables - STEPS) // bytes_per_slot(spec, Shard(spec, 0, 1), BF16, groups)


def requests(spec: DecoderSpec, groups: Groups, card: int, rows: int, length: int) -> float:
    """Of `length` tokens each, at once."""
    window = Window(groups.window, groups.each - 1)
    return slots(spec, groups, card, rows) / (length + window.groups * min(length, window.reach))


def play(spec: DecoderSpec, card: int, rows: int) -> None:
    """Conversations, each in a pool of either kind: iterations, rows at once, and what was computed again."""
    print("| | lifetimes | iterations | rows | found in the cache | pauses |\n|---|---|---|---|---|---|")
    for load, (people, turns, system) in LOADS.items():
        for groups in (one(spec), lifetimes(spec)):
            window = Window(groups.window, groups.each - 1)
            limits = Limits(rows, slots(spec, groups, card, rows), 32768, window=window)
            core = Scheduler(limits, service=Service(order="fcfs"))
            core.credit.step_seconds = 0.02
            world = World(core, [])
            follow_up(world, workloads.chats(people=people, turns=turns, system=system))
            running: list[int] = []
            world.play(stop=lambda core=core, running=running: running.append(len(core.ledger.running)))  # type: ignore[misc]
            found = core.found_total / core.asked_total
            print(
                f"| {load} | {1 + bool(window.groups)} | {world.iterations:,} | {sum(running) / len(running):.0f} |"
                f" {found:.0%} | {core.paused_total} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="requests that a card holds, with one KV lifetime and with two")
    parser.add_argument("--card", type=float, default=79.0, help="memory, GiB (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="--running_max_req_size (default: %(default)s)")
    parser.add_argument("--play", nargs="?", const="Gemma 3 27B", choices=MODELS, help="the scheduler at work")
    args = parser.parse_args()
    if args.play:
        play(describe(MODELS[args.play])[0], int(args.card * 2**30), args.rows)
        return
    print("| | KV of a token | " + " | ".join(f"{length // 1024}k" for length in LENGTHS) + " |")
    print("|---|---" + "|---" * len(LENGTHS) + "|")
    for name, config in MODELS.items():
        spec = describe(config)[0]
        two, card = lifetimes(spec), int(args.card * 2**30)
        seen, old = (each * bytes_per_slot(spec, Shard(spec, 0, 1), BF16, two) >> 10 for each in (two.each, 1))
        whole = bytes_per_slot(spec, Shard(spec, 0, 1), BF16) >> 10
        cells = [
            "" if length > spec.max_position else
            " → ".join(f"{requests(spec, groups, card, args.rows, length):.1f}" for groups in (one(spec), two))
            for length in LENGTHS
        ]  # fmt: skip
        print(f"| {name} | {whole} → {seen}, then {old} KiB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
