"""gated_linear of more than a few rows on Hopper, its activation inside.

It is written in Gluon, where one says what each warp group does, and computes y^T = W x^T: a loading warp has the copy
engine put blocks of W and x into a ring of stages, and three groups multiply, each 64 rows of W with all rows of a
tile. The tile is as large as the registers allow, because what L2 has to deliver is the limit soon. A program stays on
its multiprocessor and takes one tile after another.

A group has 32 outputs: of W it takes eight rows of the gate, eight of what is gated, and so on. In the sums of a wgmma
the two numbers that are multiplied at the end are then one thread's. One H100, Qwen3-8B's layer at 128, 256, 512, 1024
and 4096 rows: 74, 82, 136, 263 and 1103 us; cuBLAS and the activation apart take 82, 92, 149, 285 and 1231. At 8192
rows the two differ by 1 to 4 %.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiollm.kernels import device as devices
from aiollm.kernels.gated import activate
from aiollm.kernels.pdl import pdl
from aiollm.kernels.tuned import lookup

GROUPS = gl.constexpr(3)  # that multiply
OUT = gl.constexpr(32)  # outputs of a group; it takes 64 rows of W, as many as a wgmma
IN = gl.constexpr(64)  # inputs of a block: 128 bytes, the widest row that the copy engine swizzles
COLUMNS = gl.constexpr(128)  # of a wgmma: for 256 a thread must have more than the 128 registers that it starts with
REGISTERS = gl.constexpr((160, 32))  # of a computing and of the loading thread: 3 * 160 + 32 = 4 * 128 is all there is
CANDIDATES = [
    {"ROWS": rows, "STAGES": stages, "TURNED": turned} for rows, stages in ((128, 5), (256, 4)) for turned in (0, 1)
]

# Behind "or" stand the names in Triton 3.6 and 3.7.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `mid_rows` computes this: 16-bit numbers on Hopper, in rows that the copy engine takes."""
    return (
        x.device.type != "cpu"
        and devices.capability(x.device) == (9, 0)
        and x.dtype in (torch.bfloat16, torch.float16)
        and len(weight) % 16 == 0
        and all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) == 1 for t in (x, weight))
    )


def mid_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """x [n, in], weight [2i, in] -> gated_linear's [n, i], where `fits` says so; n is at least 1."""
    (n, n_in), n_out = x.shape, len(weight) // 2
    y = torch.empty((n, n_out), dtype=x.dtype, device=x.device)
    key = {"rows": triton.cdiv(n, 128) * 128, "out": n_out, "in": n_in, "dtype": str(x.dtype)}
    config = lookup("mid_rows", key, _default(n))
    row_tiles = triton.cdiv(n, config["ROWS"])
    items = triton.cdiv(n_out, GROUPS.value * OUT.value) * row_tiles
    # The copy engine sees W as [i / 8, gate or gated, 8, in].
    stride = weight.stride(0)
    halves = TensorDescriptor(
        weight,
        [n_out // 8, 2, 8, n_in],
        [8 * stride, n_out * stride, stride, 1],
        [OUT.value // 8, 2, 8, IN.value],
        gl.NVMMASharedLayout(128, 16, 4),
    )
    _mid_rows[(min(items, devices.multiprocessors(x.device)),)](
        _boxes(x, config["ROWS"], IN.value), halves, _boxes(y, config["ROWS"], OUT.value), bias, n_out, items,
        row_tiles, triton.cdiv(n_in, IN.value), ACTIVATION=activation, STAGES=config["STAGES"],
        TURNED=config["TURNED"], num_warps=4, **pdl(x.device),
    )  # fmt: skip
    return y


def _default(n: int) -> dict[str, int]:
    tiles = triton.cdiv(n, 128)
    if tiles % 2 and tiles < 8:  # with 256 rows the last tile is half empty, which costs more than smaller tiles
        return {"ROWS": 128, "STAGES": 5, "TURNED": int(tiles == 1)}
    return {"ROWS": 256, "STAGES": 4, "TURNED": int(tiles <= 2)}


def _boxes(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix of 16-bit numbers that the copy engine moves in boxes of `rows` by `columns`."""
    layout = gl.NVMMASharedLayout(2 * columns, 16, 2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@gluon.jit
def _place(turn, STAGES: gl.constexpr):
    """Which stage a turn uses, and the parity of that stage's barriers."""
    return turn % STAGES, turn // STAGES & 1


@gluon.jit
def _block(step, out_tile, blocks, TURNED: gl.constexpr):
    """The block of inputs that comes at a step.

    Turned, each tile begins elsewhere, and the programs read many places of the weight's rows at once: 2 % faster, but
    slower where several tiles of rows read the same of it.
    """
    if TURNED:
        return (step + out_tile) % blocks
    return step


@gluon.jit
def _load_weight(weight, out_tile, block, barrier, w_smem, stage):
    for group in gl.static_range(GROUPS):
        place = (out_tile * GROUPS + group) * (OUT // 8)
        smem = w_smem.index(stage * GROUPS + group)
        async_load(weight, [place, 0, 0, block * IN], barrier, smem)


@gluon.jit
def _produce(
    x, weight, items, row_tiles, blocks, w_smem, x_smem, full, empty, TURNED: gl.constexpr, PDL: gl.constexpr
):  # fmt: skip
    """The loading warp. The weight of the first stages it asks for while the kernel before may still run."""
    STAGES: gl.constexpr = x_smem.shape[0]
    ROWS: gl.constexpr = x_smem.shape[1]
    BYTES: gl.constexpr = (2 * OUT * GROUPS + ROWS) * IN * 2
    out_tile = gl.program_id(0) // row_tiles
    ahead = gl.minimum(blocks, STAGES)
    for step in range(ahead):
        mbarrier.expect(full.index(step), BYTES)
        _load_weight(weight, out_tile, _block(step, out_tile, blocks, TURNED), full.index(step), w_smem, step)
    if PDL:
        gdc_wait()
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        out_tile = item // row_tiles
        row = item % row_tiles * ROWS
        for step in range(blocks):
            block = _block(step, out_tile, blocks, TURNED)
            stage, phase = _place(turn, STAGES)
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            if turn >= ahead:
                mbarrier.expect(barrier, BYTES)
                _load_weight(weight, out_tile, block, barrier, w_smem, stage)
            async_load(x, [row, block * IN], barrier, x_smem.index(stage))
            turn += 1
        for _ in gl.static_range(GROUPS):  # each gets a stage's x for its results
            stage, phase = _place(turn, STAGES)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.arrive(full.index(stage), count=1)
            turn += 1


@gluon.jit
def _biased(sums, bias, first, n_out):
    """Sums [outputs, rows] and the bias from `first` on."""
    outs = first + gl.arange(0, OUT, layout=gl.SliceLayout(1, sums.type.layout))
    return sums + gl.load(bias + outs, mask=outs < n_out, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _consume(
    GROUP: gl.constexpr, y, bias, n_out, items, row_tiles, blocks, w_smem, x_smem, full, empty,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A computing group: 32 outputs of each tile."""
    STAGES: gl.constexpr = x_smem.shape[0]
    ROWS: gl.constexpr = x_smem.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        sums = gl.zeros([2 * OUT, ROWS], gl.float32, layout=SUMS)
        for step in range(blocks):
            stage, phase = _place(turn, STAGES)
            mbarrier.wait(full.index(stage), phase)
            rows_of_w = w_smem.index(stage * GROUPS + GROUP).reshape([2 * OUT, IN])
            sums = warpgroup_mma(rows_of_w, x_smem.index(stage).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > 0)
            turn += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)

        first = (item // row_tiles * GROUPS + GROUP) * OUT
        gate, above = gl.split(gl.permute(gl.reshape(sums, [OUT // 8, 2, 8, ROWS]), (0, 2, 3, 1)))
        gate = gl.reshape(gate, [OUT, ROWS])
        above = gl.reshape(above, [OUT, ROWS])
        if bias is not None:
            gate = _biased(gate, bias, first, n_out)
            above = _biased(above, bias + n_out, first, n_out)
        result = (activate(gate, ACTIVATION) * above).to(y.dtype)
        stage, phase = _place(turn + GROUP, STAGES)
        mbarrier.wait(full.index(stage), phase)
        smem = reinterpret(x_smem.index(stage), y.dtype, [ROWS, OUT], y.layout)
        smem.permute((1, 0)).store(result)
        fence_async_shared()
        async_store(y, [item % row_tiles * ROWS, first], smem)
        tma.store_wait(0)
        mbarrier.arrive(empty.index(stage), count=GROUPS)
        turn += GROUPS


@gluon.jit(do_not_specialize=["n_out", "items", "row_tiles", "blocks"])
def _mid_rows(
    x, weight, y, bias, n_out, items, row_tiles, blocks,
    ACTIVATION: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    w_smem = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS, OUT // 8, 2, 8, IN], weight.layout)
    x_smem = gl.allocate_shared_memory(x.dtype, [STAGES, x.block_type.shape[0], IN], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    gl.warp_specialize(
        [
            (_consume, (0, y, bias, n_out, items, row_tiles, blocks, w_smem, x_smem, full, empty, ACTIVATION)),
            (_consume, (1, y, bias, n_out, items, row_tiles, blocks, w_smem, x_smem, full, empty, ACTIVATION)),
            (_consume, (2, y, bias, n_out, items, row_tiles, blocks, w_smem, x_smem, full, empty, ACTIVATION)),
            (_produce, (x, weight, items, row_tiles, blocks, w_smem, x_smem, full, empty, TURNED, PDL)),
        ],
        [4, 4, 1],
        [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
    )
