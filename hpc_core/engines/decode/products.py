"""Products of activations with the model's weights by our own kernels: which tensors, which launch, which block sizes.

Block sizes are chosen by trying them where they will run: on the weights of all layers, inside a CUDA graph. All layers together are larger than
a GPU's second-level cache, so each candidate reads from memory, as a token does.

This module imports triton. Import it only where triton is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.decode.model import int8_rows, kind_of
from hpc_core.engines.kernels.batch import plain_rows
from hpc_core.engines.kernels.four_bit import four_bit_vector
from hpc_core.engines.kernels.four_bit_batch import four_bit_rows
from hpc_core.engines.kernels.four_bit_format import BlockConstants, byte_tables, constants_of, copied_tables
from hpc_core.engines.kernels.layout import (
    ANYWHERE,
    FOR_CPU,
    Around,
    Blocks,
    Form,
    FourBitMatrix,
    Rows,
    pointer_offsets,
    tried,
)
from hpc_core.engines.kernels.vector import plain_vector

Early = Literal["all", "small", "none"]
"""Launches that may begin while those before them still run (programmatic dependent launch): all, all but products, or none."""


def launched(early: Early) -> dict[str, Any]:
    """Return the arguments that every launch but a product's takes."""
    return {"early": early != "none", **_early_options(early)}


def _early_options(early: Early, *, product: bool = False) -> dict[str, Any]:
    """Return the launch's options. One that may not begin early itself still lets the next one begin, where that may."""
    return {"launch_pdl": True} if early == "all" or (early == "small" and not product) else {}


def _padded(batch: int, least: int) -> int:
    """Return the power of two, at least `least`, that so many rows are padded to."""
    return max(least, 1 << (batch - 1).bit_length())


@dataclass
class Product:
    """One launch: up to three matrices with a common input, and all that is done before and after."""

    kind: str
    """"plain", "int8" or "4-bit"."""
    weight: torch.Tensor
    rows: tuple[int, ...]
    columns: int
    offsets: tuple[int, int]
    """From the first matrix to the second and third, in elements."""
    gated: bool
    gain: torch.Tensor | None
    eps: float
    x_packed: bool
    out_packed: bool
    batch: int
    dummy: torch.Tensor
    early: Early
    bias: torch.Tensor | None = None
    bias_offsets: tuple[int, int] = (0, 0)
    scales: torch.Tensor | None = None
    """int8: a float32 a row."""
    constants: BlockConstants | None = None
    """4-bit: the block constants of every matrix."""
    table: torch.Tensor | None = None
    """4-bit: the sixteen values in float32."""
    tables: torch.Tensor | None = None
    """4-bit: their bytes, (8,) of float16 at batch 1, else (8, TABLE_COPIES) of the activations' type."""
    blocks: Blocks = ANYWHERE
    kept: list[Any] = field(default_factory=list)
    """Tensors that only offsets lead to: they must live as long as this."""

    @property
    def out_rows(self) -> int:
        """Elements of the result for one row of activations."""
        return self.rows[0] if self.gated else sum(self.rows)

    @property
    def likeness(self) -> tuple[Any, ...]:
        """Products that share this get the same block sizes."""
        return (self.kind, self.rows, self.columns, self.gated, self.gain is not None, self.bias is not None)

    def candidates(self) -> list[Blocks]:
        """Return the block sizes that fit its matrices and type."""
        every = tried(self.batch, four_bit=self.kind == "4-bit")
        half = self.dummy.dtype in (torch.bfloat16, torch.float16)
        return [
            blocks
            for blocks in every
            if all(rows % blocks.n == 0 for rows in self.rows) and (half or not blocks.permutes)
        ]

    def start(self) -> None:
        """Take the first block sizes that fit.

        Raises:
            BuildError: none does, or a block of 4-bit weights would lie in two rows.
        """
        if self.kind == "4-bit" and self.columns % 64:
            raise BuildError(
                f"Our kernels read 64 four-bit weights of a row at a time, and a layer here has {self.columns} columns: say kernels='torch'."
            )
        if self.weight.device.type == "cpu":
            self.blocks = FOR_CPU["4-bit" if self.kind == "4-bit" else "plain"]
            fitting = all(rows % self.blocks.n == 0 for rows in self.rows)
        else:
            fits = self.candidates()
            fitting = bool(fits)
            self.blocks = fits[0] if fits else self.blocks
        if not fitting:
            raise BuildError(
                f"Our kernels have no block size for a layer of {' and '.join(map(str, self.rows))} rows under a batch of {self.batch}; "
                "a multiple of 16 always has one. Say kernels='torch'."
            )

    def __call__(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """Compute out (batch, rows) from x (batch, columns). At batch 1 the norm is part of it, else it is done before."""
        none, sizes, form = self.dummy, self.blocks, self._form(out.dtype, residual=residual is not None)
        gain = self.gain
        if self.batch == 1 and form.permutes:  # that kernel reads pairs as words
            x, gain = x.view(torch.int32), None if gain is None else gain.view(torch.int32)
        first, second = (self.rows[0], 0) if self.gated or len(self.rows) == 1 else self.rows[:2]
        around = (self.bias, residual, self.scales)
        shared: dict[str, Any] = {
            "x": x,
            "around": Around(*(none if tensor is None else tensor for tensor in around)),
            "out": out,
            "rows": Rows(first, second, self.out_rows),
            "second": self.offsets[0],
            "third": self.offsets[1],
            "bias_second": self.bias_offsets[0],
            "bias_third": self.bias_offsets[1],
            "form": form,
            "num_warps": sizes.warps,
            **_early_options(self.early, product=True),
        }
        if self.batch == 1:
            shared |= {"gain": none if gain is None else gain, "eps": self.eps}
        else:
            shared["batch"] = self.batch
        grid = (self.out_rows // sizes.n,)
        if self.constants is not None:
            shared |= {"matrix": self._matrix(), **self.constants.offsets_of_pointers()}
            kernel: Any = four_bit_vector if self.batch == 1 else four_bit_rows
            kernel[grid](**shared)
        elif self.batch == 1:
            plain_vector[grid](w=self.weight, **shared)
        else:
            plain_rows[grid](w=self.weight, k_size=self.columns, **shared)

    def _form(self, dtype: torch.dtype, *, residual: bool) -> Form:
        """Return what the kernel is compiled for; `dtype` is that of the activations."""
        sizes, four_bit, batched = self.blocks, self.constants is not None, self.batch > 1
        words = self.columns // 8 if four_bit else self.columns
        return Form(
            gated=self.gated,
            bias=self.bias is not None,
            residual=residual,
            out_packed=self.out_packed,
            block_n=sizes.n,
            block_k=sizes.k,
            early=self.early != "none",
            k_size=self.columns if four_bit or not batched else 0,
            x_packed=self.x_packed,
            norm=self.gain is not None,
            scaled=self.scales is not None,
            whole=not batched and words % sizes.k == 0,
            padded=_padded(self.batch, 8 if four_bit else 16) if batched else 0,
            stages=sizes.stages if batched else 1,
            permutes=four_bit and sizes.permutes,
            nested=self.constants is not None and self.constants.nested,
            bf16=four_bit and not batched and dtype == torch.bfloat16,
        )

    def _matrix(self) -> FourBitMatrix:
        """Of a 4-bit product."""
        constants, none = self.constants, self.dummy
        assert constants is not None
        assert self.table is not None
        assert self.tables is not None
        outer = constants.outer[0] if constants.outer else none
        code = none if constants.code is None else constants.code
        offsets = none if constants.offsets is None else constants.offsets
        return FourBitMatrix(self.weight, constants.each[0], outer, code, offsets, self.table, self.tables)


def product_of(
    modules: Sequence[Any],
    *,
    batch: int,
    dummy: torch.Tensor,
    early: Early,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    packed: tuple[bool, bool] = (False, False),
    int8: bool = False,
) -> Product:
    """Return the product of these modules' matrices; `packed`: whether input and output are stored in the packed layout."""
    kinds = {kind_of(module) for module in modules}
    if len(kinds) > 1:
        raise BuildError(
            f"engine='graph' multiplies layers with a common input (q, k and v; gate and up) together, and these are stored in {len(kinds)} ways: "
            f"{', '.join(sorted(map(str, kinds)))}. Quantize all of them or none (skip_modules), or say engine='stock'."
        )
    kind = kinds.pop()
    weights = [_stored(module, kind) for module in modules]
    scales, table, tables, constants = None, None, None, None
    if kind == "4-bit":
        constants = constants_of([module.weight.quant_state for module in modules])
        code = modules[0].weight.quant_state.code
        table = code.float()
        # A type of four bytes has no byte tables, and asks for none: `candidates`.
        half = dummy.dtype if dummy.dtype.itemsize == 2 else torch.float16
        tables = byte_tables(code) if batch == 1 else copied_tables(code, half)
    elif int8:
        kind = "int8"
        weights[0], scales = int8_rows(weights[0])
    biases = [module.bias for module in modules if module.bias is not None]
    product = Product(
        kind=kind,
        weight=weights[0],
        rows=tuple(int(module.out_features) for module in modules),
        columns=int(modules[0].in_features),
        offsets=pointer_offsets(weights),
        gated=gated,
        gain=gain if batch == 1 else None,
        eps=eps,
        x_packed=packed[0],
        out_packed=packed[1],
        batch=batch,
        dummy=dummy,
        early=early,
        bias=biases[0] if biases else None,
        bias_offsets=pointer_offsets(biases),
        scales=scales,
        constants=constants,
        table=table,
        tables=tables,
        kept=[*weights, *biases],
    )
    product.start()
    return product


def _stored(module: Any, kind: str) -> torch.Tensor:
    weight: torch.Tensor = module.weight.data
    return weight.view(-1).view(torch.uint8).view(torch.int32) if kind == "4-bit" else weight.contiguous()


_REPLAYS = 5


def choose_blocks(products: list[Any], x: torch.Tensor, out: torch.Tensor) -> str:
    """Give all these products, which are alike, the fastest of their block sizes; return which, and how long one product took."""
    best: tuple[float, Any] | None = None
    for blocks in products[0].candidates():
        for product in products:
            product.blocks = blocks
        try:
            seconds = graph_seconds(lambda: [product(x, out) for product in products])
        except Exception as error:  # for example too large for this GPU's shared memory: another one fits
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if best is None or seconds < best[0]:
            best = (seconds, blocks)
    if best is None:
        raise RuntimeError(f"No block sizes fit the product {products[0].likeness} on {torch.cuda.get_device_name()}.")
    for product in products:
        product.blocks = best[1]
    return f"{best[1].text}: {best[0] / len(products) * 1e6:.2f} us"


def graph_seconds(work: Any) -> float:
    """Return the device seconds of `work`: the least of a few replays of its graph."""
    work()  # compiles, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    seconds: list[float] = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)
