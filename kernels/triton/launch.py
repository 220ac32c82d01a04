"""The host's side of the GPU kernels: which tiles, which grid, in which order. Nothing here waits for the device.

The work of one call: norms of all columns, then one of
    pair_sums       no gradient wanted: half of the pairs (all of them when a group's rows meet its columns)
    row_gradient    up to 512 rows, and float16: one launch for each gradient; the first one brings the loss along
    weigh_strip     from STRIPS_FROM rows on, but for float16: for some rows at a time, Gram matrices by GEMMs, the
                    pair weights from them in one kernel, and a GEMM a gradient
Sums are float32 within a program and float64 across programs, in an order that no scheduling changes.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_kernels.samples import Pairs
from sadm_kernels.triton.rows import Prepared, prepared


class Tile(NamedTuple):
    """Rows, columns, features a step of the products, features of the gradient a program owns; warps; stages."""

    m: int
    n: int
    k: int
    d: int
    warps: int
    stages: int


# By kernel and bytes a feature, for three generations: 80 (Ampere; also Ada and consumer Blackwell, whose matrix
# instructions are the same), 90 (Hopper), 100 (data-centre Blackwell). Chosen by what compiles to tensor-core
# instructions without spilling registers (aot.py, budget.json), large tiles first; not by measured times. No
# autotuning: the choice must be the same on all ranks and in all runs.
# "few" is for batches that do not give each multiprocessor a program: shorter blocks. "rows" is for float16 alone;
# other dtypes go by strips, whose matrix products are GEMMs.
TILES: dict[int, dict[tuple[str, int], Tile]] = {
    80: {
        ("sums", 2): Tile(64, 64, 64, 0, 4, 3),
        ("sums", 4): Tile(64, 64, 16, 0, 8, 3),
        ("rows", 2): Tile(64, 64, 64, 128, 8, 3),
        ("few", 2): Tile(32, 64, 64, 128, 4, 3),
        ("few", 4): Tile(32, 64, 32, 64, 8, 3),
    },
    90: {
        ("sums", 2): Tile(64, 64, 64, 0, 4, 3),
        ("sums", 4): Tile(64, 64, 32, 0, 8, 3),
        ("rows", 2): Tile(64, 64, 64, 256, 8, 3),
        ("few", 2): Tile(32, 64, 64, 128, 4, 3),
        ("few", 4): Tile(32, 64, 32, 64, 8, 3),
    },
    100: {
        ("sums", 2): Tile(64, 64, 64, 0, 8, 3),
        ("sums", 4): Tile(64, 64, 32, 0, 8, 3),
        ("rows", 2): Tile(64, 64, 64, 256, 8, 3),
        ("few", 2): Tile(32, 64, 64, 128, 4, 3),
        ("few", 4): Tile(32, 64, 32, 64, 8, 3),
    },
}
FEW_ROWS = 512
STRIPS_FROM = 513
# Rows of a strip times columns: two Gram matrices of 128 MB each and 64 MB of pair weights a gradient (float32: 192).
STRIP_ELEMENTS = 2**25
NORM_BLOCK = 128
WEIGHT_TILE = Tile(32, 64, 0, 0, 4, 1)
WEIGH_TILE, WEIGH_STEPS = Tile(2, 512, 0, 0, 4, 1), 4
FINISH_TILE = Tile(16, 0, 0, 128, 4, 1)


class Machine(NamedTuple):
    """Where kernels go: the module that has them and the GPU's compute capability times ten."""

    kernels: Any
    capability: int


def machine_of(device: torch.device) -> Machine:
    """The machine behind `device`. RuntimeError where there are no kernels for it."""
    if device.type != "cuda":
        raise RuntimeError(
            f"impl='triton': the features are on {device}, must be on a CUDA device; use impl='reference'"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"impl='triton': {torch.cuda.get_device_name(device)} has compute capability {major}.{minor},"
            " must be 8.0 or newer; use impl='reference'"
        )
    from sadm_kernels.triton import device_code

    return Machine(device_code, 10 * major + minor)


def tile_of(kernel: str, element_size: int, d: int, capability: int) -> Tile:
    """The table's tile, cut down to d features."""
    generation = 90 if capability == 90 else 100 if 100 <= capability < 110 else 80
    tile = TILES[generation][kernel, element_size]
    enough = max(16, 1 << (d - 1).bit_length())
    return tile._replace(k=min(tile.k, enough), d=min(tile.d, enough))


def strip_height(b: int, n: int) -> int:
    """Rows a strip: all, or a multiple of 128 with about STRIP_ELEMENTS pairs."""
    return min(b, max(128, STRIP_ELEMENTS // n // 128 * 128))


class _Run(NamedTuple):
    """Pairs as the kernels take them; `tile` is that of the main kernel."""

    machine: Machine
    pairs: Pairs
    tile: Tile
    features: tuple[Tensor, Tensor]
    stats: Tensor
    weight: Tensor
    labels: Tensor
    moments: Tensor
    options: dict[str, Any]
    shape: dict[str, Any]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        return (*self.features, self.stats, self.weight, self.labels, self.moments)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """first, b, n, d (padded)."""
        n, d = self.features[0].shape
        return self.pairs.own.start, len(self.pairs.own), n, d

    @property
    def floats(self) -> tuple[float, float]:
        options = self.pairs.options
        return 0.5 / options.tau**2, options.delta

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.stats.device)


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any) -> None:
    # Products are not contracted with sums: a R_G contracted into R_G - R_F would be rounded less than the R_F beside
    # it, and equal batches would differ. The pair arithmetic is small beside the matrix products, which do not care.
    kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False)


def _padded(d: int) -> int:
    return math.ceil(d / 16) * 16


def _check(p: Pairs) -> None:
    n, d = p.samples.real.shape
    d = _padded(d)
    dtype = p.samples.real.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise RuntimeError(
            f"impl='triton': features are {dtype}, must be float16, bfloat16 or float32; use impl='reference'"
        )
    if n * d >= 2**31:
        raise RuntimeError(
            f"impl='triton': {n} x {d} features, must be fewer than 2^31 (32-bit offsets); use impl='reference'"
        )


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, wherever the tensors are."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def _start(rows: Prepared, moments: Tensor | None, kernel: str, machine: Machine, *, norms: bool = True) -> _Run:
    """Choose the tile, and launch the norms if they are wanted."""
    p = rows.pairs
    real, fake, weight, labels = p.samples
    n, d = real.shape
    # Rows have to start on 16 bytes, or they are loaded a feature at a time, through more registers than there are.
    padding = (0, _padded(d) - d)
    features = (F.pad(real, padding), F.pad(fake, padding)) if any(padding) else (real, fake)
    d = _padded(d)
    tile = tile_of(kernel, real.element_size(), d, machine.capability)
    stats = torch.empty((2, n), dtype=torch.float32, device=real.device)
    shape = {
        "BLOCK_K": tile.k,
        "EVEN_K": d % tile.k == 0,
        # float32 features: three products of tf32 parts, which keep float32's precision. One would lose it, and exact
        # products ("ieee") are left without tensor cores. Narrower features are exact in any case.
        "PRECISION": "tf32x3" if real.dtype == torch.float32 else "ieee",
    }
    if norms:
        _launch(
            machine.kernels.row_norms,
            (math.ceil(n / tile.m), 2),
            tile,
            *features,
            stats,
            n,
            d,
            UNIT=p.options.unit,
            BLOCK=tile.m,
            **shape,
        )
    return _Run(
        machine,
        p,
        tile,
        features,
        stats,
        # What a kernel does not read is stood in for by what is at hand.
        weight=stats if weight is None else weight,
        labels=stats if labels is None else labels,
        moments=stats if moments is None else moments.to(torch.float32),
        options={
            "RELATION": p.options.relation,
            "PENALTY": p.options.penalty,
            "UNIT": p.options.unit,
            "SCALED": rows.units is not None,
            "MEAN": moments is not None and p.options.relation != "cosine",
            "WEIGHTED": weight is not None,
            "LABELLED": labels is not None,
        },
        shape={"BLOCK_M": tile.m, "BLOCK_N": tile.n, **shape},
    )


def _denominator(run: _Run) -> Tensor:
    """sum omega, 0-d float64."""
    first, b, n, _ = run.sizes
    flags = {name: run.options[name] for name in ("WEIGHTED", "LABELLED")}
    if not any(flags.values()):
        return torch.full((), float(b * (n - 1)), dtype=torch.float64, device=run.stats.device)
    tile = WEIGHT_TILE
    partials = run.empty(b)
    grid = (math.ceil(b / tile.m),)
    arguments = (run.weight, run.labels, partials, first, b, n)
    _launch(run.machine.kernels.weight_sums, grid, tile, *arguments, **flags, BLOCK_M=tile.m, BLOCK_N=tile.n)
    return partials.sum(dtype=torch.float64)


def _pair_sums(run: _Run, statistic: str) -> Tensor:
    """[sums of the statistic ..., sum omega], float64."""
    _, b, n, _ = run.sizes
    tile = run.tile
    triangle = b == n
    across = math.ceil(n / tile.n)
    programs = across * (across + 1) // 2 if triangle else math.ceil(b / tile.m) * across
    partials = run.empty(1 if statistic == "loss" else 2, programs)
    _launch(
        run.machine.kernels.pair_sums,
        (programs,),
        tile,
        *run.pointers,
        partials,
        *run.sizes,
        *run.floats,
        STATISTIC=statistic,
        TRIANGLE=triangle,
        **run.options,
        **run.shape,
    )
    return torch.cat([partials.sum(dim=1, dtype=torch.float64), _denominator(run)[None]])


def _row_gradients(run: _Run, needed: tuple[bool, bool]) -> tuple[Tensor, list[Tensor | None]]:
    """Rows' losses [b] and gradients [b, d], of real and fake."""
    _, b, _, d = run.sizes
    tile = run.tile
    loss = run.empty(b)
    gradients: list[Tensor | None] = [None, None]
    for fake in (side for side in (0, 1) if needed[side]):
        gradient = gradients[fake] = run.empty(b, d)
        _launch(
            run.machine.kernels.row_gradient,
            (math.ceil(b / tile.m), math.ceil(d / tile.d)),
            tile,
            *run.pointers,
            gradient,
            loss,
            *run.sizes,
            *run.floats,
            FAKE=fake,
            LOSS=fake == needed.index(True),
            BLOCK_D=tile.d,
            EVEN_D=d % tile.d == 0,
            **run.options,
            **run.shape,
        )
    return loss, gradients


class _Operands(NamedTuple):
    """One input as the factors of bfloat16 products: x_i x_j is left_i right_j."""

    left: Tensor  # [n, k]
    right: Tensor  # [n and up to 15 rows of zeros, k]: so that rows of Gram matrices start on 64 bytes

    @classmethod
    def of(cls, x: Tensor) -> "_Operands":
        """bfloat16 features as they are; of float32 the six largest products of three bfloat16 parts, the least first.

        24 bits are three times eight; the three products that are left out are below 2^-24 of |x_i| |x_j|. Small
        ones first: tensor cores cut sums off, and what they cut off grows with the sum so far.
        """
        n = len(x)
        if n % 16:
            padded = cls.of(F.pad(x, (0, 0, 0, 16 - n % 16)))
            return cls(padded.left[:n], padded.right)
        if x.dtype == torch.bfloat16:
            return cls(x, x)
        high = x.bfloat16()
        rest = x - high
        middle = rest.bfloat16()
        low = (rest - middle).bfloat16()
        return cls(
            torch.cat([low, high, middle, middle, high, high], dim=1),
            torch.cat([high, low, middle, high, middle, high], dim=1),
        )

    def squares(self) -> Tensor:
        """|x|^2 [n], by products whose sums are cut off as those of pairs are (see row_norms): equal rows meet."""
        n, k = self.left.shape
        blocks = math.ceil(n / NORM_BLOCK)
        left, right = (F.pad(x[:n], (0, 0, 0, blocks * NORM_BLOCK - n)) for x in self)
        left, right = (x.view(blocks, NORM_BLOCK, k) for x in (left, right))
        return _gemm(left, right.transpose(1, 2)).diagonal(dim1=1, dim2=2).reshape(-1)[:n]

    def dots(self, start: int, rows: int) -> Tensor:
        """<x_i, x_j> of `rows` rows from `start` on with all columns, [rows, n and up to 15] float32."""
        return _gemm(self.left[start : start + rows], self.right.T)

    def times(self, strip: Tensor) -> Tensor:
        """V X [rows, d] float32 of a strip V [rows, parts, n]: as many parts as the features have."""
        x = self.right[: strip.shape[2]]
        if strip.shape[1] == 1:
            return _gemm(strip[:, 0], x)
        low, middle, high = strip.unbind(1)
        d = x.shape[1] // 6
        of_high = _gemm(high, x[:, : 3 * d]).view(-1, 3, d)  # times high, low, middle
        of_middle = _gemm(middle, x[:, 2 * d : 4 * d]).view(-1, 2, d)  # times middle, high
        of_low = _gemm(low, x[:, :d])[:, None]  # times high
        return torch.cat([of_low, of_high[:, 1:2], of_middle, of_high[:, 2:], of_high[:, :1]], dim=1).sum(1)


def _gemm(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 matrices, or of as many, in float32: rounded to bfloat16, small differences would be lost."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32) if a.dim() == 2 else torch.bmm(a, b, out_dtype=torch.float32)


def _strip_gradients(run: _Run, needed: tuple[bool, bool]) -> tuple[Tensor, list[Tensor | None]]:
    """What `_row_gradients` returns, strip by strip: products by GEMMs, all between them in one kernel."""
    first, b, n, d = run.sizes
    tile = WEIGH_TILE
    operands = [_Operands.of(x) for x in run.features]
    squares = torch.stack([side.squares() for side in operands])
    if run.options["UNIT"]:
        squares = torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt().reciprocal())
    run = run._replace(stats=squares)
    height = strip_height(b, n)
    parts = 1 if run.features[0].dtype == torch.bfloat16 else 3
    stride = math.ceil(n / 16) * 16  # rows of a GEMM's operand start on 16 bytes
    blocks = math.ceil(n / (tile.n * WEIGH_STEPS))
    strips = [run.empty(height if wanted else 0, parts, stride, dtype=torch.bfloat16) for wanted in needed]
    loss = run.empty(b)
    gradients = [run.empty(b, d) if wanted else None for wanted in needed]
    for start in range(0, b, height):
        rows = min(height, b - start)
        partials = run.empty(3, blocks, rows)
        dots = [side.dots(first + start, rows) for side in operands]
        _launch(
            run.machine.kernels.weigh_strip,
            (blocks, math.ceil(rows / tile.m)),
            tile,
            *dots,
            run.stats,
            run.weight,
            run.labels,
            run.moments,
            *strips,
            partials,
            start,
            rows,
            stride,
            first,
            n,
            *run.floats,
            REAL=needed[0],
            FAKE=needed[1],
            PARTS=parts,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            STEPS=WEIGH_STEPS,
            **run.options,
        )
        for fake in (side for side in (0, 1) if needed[side]):
            _launch(
                run.machine.kernels.finish_strip,
                (math.ceil(rows / FINISH_TILE.m), math.ceil(d / FINISH_TILE.d)),
                FINISH_TILE,
                run.features[fake],
                run.stats,
                operands[fake].times(strips[fake][:rows, :, :n]),
                partials,
                gradients[fake],
                loss,
                start,
                rows,
                blocks,
                first,
                n,
                d,
                UNIT=run.options["UNIT"],
                FAKE=fake,
                LOSS=fake == needed.index(True),
                BLOCK_M=FINISH_TILE.m,
                BLOCK_D=FINISH_TILE.d,
            )
    return loss, gradients


def distance_sums(p: Pairs, *, machine: Machine | None = None) -> Tensor:
    """[sum omega D(real), sum omega D(fake), sum omega] over own rows and all columns, float64 [3].

    RuntimeError, from all functions here: float64 features, 2^31 or more of them, or no GPU that runs the kernels.
    """
    _check(p)
    machine = machine or machine_of(p.samples.real.device)
    with on_device(p.samples.real.device):
        return _pair_sums(_start(prepared(p), None, "sums", machine), "distances")


def slope_sums(p: Pairs, moments: Tensor, *, machine: Machine | None = None) -> Tensor:
    """[sum Q u of real, of fake, sum omega], float64 [3]; of `moments` [4] only 1/m is read."""
    _check(p)
    machine = machine or machine_of(p.samples.real.device)
    with on_device(p.samples.real.device):
        return _pair_sums(_start(prepared(p), moments, "sums", machine), "slopes")


def loss_and_gradients(
    p: Pairs, moments: Tensor | None, need_real: bool, need_fake: bool, *, machine: Machine | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[numerator, denominator] of S over own rows, float64 [2], and the needed gradients [b, d] float32.

    Gradients are those of the numerator of the whole batch, for own rows; the caller divides by its denominator.
    `moments` [4] = (1/m_F, 1/m_G, kappa_F, kappa_G) stays on the device; None unless normalize="mean".
    """
    _check(p)
    machine = machine or machine_of(p.samples.real.device)
    needed = (need_real, need_fake)
    b, n = len(p.own), len(p.samples.real)
    with on_device(p.samples.real.device):
        rows = prepared(p)
        p = rows.pairs
        if not any(needed):
            return _pair_sums(_start(rows, moments, "sums", machine), "loss"), None, None
        # Strips take W times X out of the kernel, so W must have the features' dtype and enough range: float16 would
        # need its powers of two (row_gradient).
        if p.samples.real.dtype != torch.float16 and min(b, n) >= STRIPS_FROM:
            run = _start(rows, moments, "few", machine, norms=False)  # for what does not depend on its tile
            loss, gradients = _strip_gradients(run, needed)
        else:
            run = _start(rows, moments, "few" if b <= FEW_ROWS else "rows", machine)
            loss, gradients = _row_gradients(run, needed)
        sums = torch.stack([loss.sum(dtype=torch.float64), _denominator(run)])
        d = p.samples.real.shape[1]
        unpadded = (x if x is None else x[:, :d].contiguous() for x in gradients)
        grad_real, grad_fake = (rows.gradient(side, x) for side, x in enumerate(unpadded))
    return sums, grad_real, grad_fake
