#!/usr/bin/env python3
"""How long a checkpoint takes from the page cache to the device, beside plain parallel reads of the same files.

    python tools/bench_load.py --shape qwen3-8b                a checkpoint made on disk, 16 GB, removed afterwards
    python tools/bench_load.py --shape qwen3-8b --layers 6     a smaller one
    python tools/bench_load.py --folder MODEL                  one that is there

Plain reads are threads of the same number that read each file from end to end, 16 MB at a time, into a buffer of their
own; on a CPU also into fresh memory of the model's size, which the model itself cannot do without. Dummy weights are
made on the device for comparison.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from aiollm.workers import reading, weights
from aiollm.workers.families.registry import describe
from aiollm.workers.model.parameters import parameters
from aiollm.workers.model.sources import located
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.shapes import SHAPES
from aiollm.workers.tp import TensorParallel

READ_BYTES = 16 << 20  # of plain reads at a time
SHARD_BYTES = 5 << 30  # of the files, as Hugging Face cuts them
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def write_checkpoint(folder: Path, values: dict[str, Any], type_name: str) -> None:
    """config.json and the files of a model of that shape. The numbers repeat: nobody looks at them."""
    spec, names, _ = describe(values)
    (folder / "config.json").write_text(json.dumps(values))
    dtype = TYPES[type_name]
    noise = torch.randn(1 << 22).to(dtype).view(torch.uint8).numpy().tobytes()
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for source, shape in _tensors(spec, names).items():
        length = torch.Size(shape).numel() * dtype.itemsize
        if size + length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][source] = {"dtype": type_name.upper(), "shape": shape, "data_offsets": [size, size + length]}
        size += length
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, name)
        header = json.dumps(shard).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            left = max(entry["data_offsets"][1] for entry in shard.values())
            while left:
                left -= file.write(noise[:left])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _tensors(spec: DecoderSpec, names: Any) -> dict[str, list[int]]:
    """Every tensor of the checkpoint and its shape."""
    pieces = (piece for parameter in parameters(spec, 0, 1) for piece in parameter.pieces)
    return {at.source: list(at.shape) for piece in pieces for at in located(piece, spec, names)}


def plain_reads(files: list[Path], readers: int, fresh: bool) -> float:
    """Seconds until all bytes were read once by `readers` threads, into one buffer each or into fresh memory."""
    jobs: list[tuple[int, int, int]] = []
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        jobs += [(descriptor, at, min(READ_BYTES, size - at)) for at in range(0, size, READ_BYTES)]
    waiting = iter(list(enumerate(jobs)))
    # One allocation: small ones would be pages of the run before, which have been touched.
    memory = torch.empty(len(jobs) * READ_BYTES if fresh else 1, dtype=torch.uint8)

    def reader() -> None:
        buffer = torch.empty(0 if fresh else READ_BYTES, dtype=torch.uint8)
        for number, (descriptor, at, length) in waiting:
            into = memory[number * READ_BYTES :] if fresh else buffer
            os.preadv(descriptor, [into.numpy().data[:length]], at)

    def work() -> None:
        with ThreadPoolExecutor(readers) as pool:
            for future in [pool.submit(reader) for _ in range(readers)]:
                future.result()

    seconds = timed(work)
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def _status(name: str) -> int:
    """Bytes under a name in /proc/self/status."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) << 10


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, to the last byte on the device."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(folder: Path, device: torch.device, dtype: torch.dtype, repeat: int) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit), as they are found."""
    spec, names, _ = describe(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    on_gpu = device.type == "cuda"
    readers = reading.READERS if on_gpu else min(reading.READERS, torch.get_num_threads())
    yield "checkpoint", size / 1e9, "GB"
    yield "readers", readers, "threads"
    options: dict[str, Any] = {"dtype": dtype, "device": device, "tp": TensorParallel()}
    plain_reads(files, readers, fresh=False)  # fills the cache
    plain, floor, found, beside = [], [], [], []
    for _ in range(repeat):  # in turn: on a shared machine the minutes differ
        plain.append(plain_reads(files, readers, fresh=False))
        floor.append(plain[-1] if on_gpu else plain_reads(files, readers, fresh=True))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, began = _status("VmRSS"), time.perf_counter()
        made = weights.load(folder, spec, names, **options)
        found.append(time.perf_counter() - began)
        beside.append(_status("VmHWM") - before - (0 if on_gpu else weights.stored_bytes(made)))
        del made  # the next one gets its memory
    yield "plain reads", min(plain), "s"
    if not on_gpu:
        yield "plain reads into fresh memory", min(floor), "s"
    yield "load", min(found), "s"
    yield "load", size / min(found) / 1e9, "GB/s"
    yield "load / plain reads", min(found) / min(floor), "x"
    yield "host memory beside the model", max(beside) / 1e6, "MB"
    yield "dummy weights", timed(lambda: weights.dummy(spec, **options)), "s"


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="whose checkpoint is made (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers instead of the shape's own")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there, instead of one that is made")
    parser.add_argument("--disk", type=Path, help="where the checkpoint is made (the system's temporary folder)")
    parser.add_argument("--stored", choices=TYPES, default="bf16", help="numbers of the one that is made (%(default)s)")
    parser.add_argument("--data_type", choices=TYPES, default="bf16", help="numbers in memory (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5, help="the best of so many loads counts (%(default)s)")
    parser.add_argument("--save", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(dir=options.disk, prefix="bench_load_"))
    device = torch.device(options.device)
    try:
        if not options.folder:
            values = dict(SHAPES[options.shape])
            values["num_hidden_layers"] = options.layers or values["num_hidden_layers"]
            print(f"writing a checkpoint into {folder}", file=sys.stderr)
            write_checkpoint(folder, values, options.stored)
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        figures = []
        for name, value, unit in measure(folder, device, TYPES[options.data_type], options.repeat):
            print(f"{name:32} {value:9.2f} {unit}", flush=True)
            figures.append({"figure": name, "value": round(value, 3), "unit": unit})
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    if options.save:
        about = {
            "date": time.strftime("%Y-%m-%d"), "device": on, "cores": os.cpu_count(), "torch": torch.__version__,
            "model": str(options.folder or options.shape), "layers": options.layers, "stored": options.stored,
            "data_type": options.data_type,
        }  # fmt: skip
        options.save.write_text(json.dumps({**about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
