"""Products of activations with the model's weights by our own kernels: which tensors, which launch, which block sizes.

Imports triton, so import it only where that is installed.


Choose a kernel's block sizes by trying them, in the place where they will run: on the weights of all layers, inside a CUDA graph.

All layers together are more than a GPU's second-level cache holds, so each candidate reads from memory, as a token does.
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
    Blocks,
    distances,
    tried,
)
from hpc_core.engines.kernels.vector import plain_vector

Early = Literal["all", "small", "none"]
"""Which launches may begin while those before them still run (programmatic dependent launch): all, all but products, none."""


def launched(early: Early, *, product: bool = False) -> dict[str, Any]:
    """Arguments of a launch. One that may not begin early itself still lets the next one begin, where that may."""
    ahead = early == "all" or (early == "small" and not product)
    return {"early": early != "none"} | ({"launch_pdl": True} if ahead else {})


def _padded(batch: int, least: int) -> int:
    """The power of two that so many rows are padded to."""
    return max(least, 1 << (batch - 1).bit_length())


def _words(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


@dataclass
class Product:
    """One launch: up to three matrices with a common input, with all that is done before and after."""

    kind: str
    """"plain", "int8" or "4-bit"."""
    weight: torch.Tensor
    rows: tuple[int, ...]
    columns: int
    far: tuple[int, int]
    """Distances in elements of the second and third matrix from the first."""
    gated: bool
    gain: torch.Tensor | None
    eps: float
    x_permuted: bool
    out_permuted: bool
    batch: int
    dummy: torch.Tensor
    early: Early
    bias: torch.Tensor | None = None
    bias_far: tuple[int, int] = (0, 0)
    scales: torch.Tensor | None = None
    """int8: a float32 a row."""
    constants: BlockConstants | None = None
    """4-bit: those of every matrix."""
    table: torch.Tensor | None = None
    """4-bit: the sixteen values in float32."""
    tables: torch.Tensor | None = None
    """4-bit: their bytes, (8,) in float16 at batch 1, else (8, TABLE_COPIES) in the activations' type."""
    blocks: Blocks = ANYWHERE
    kept: list[Any] = field(default_factory=list)
    """Tensors that only distances point to: they must live as long as this."""

    @property
    def out_rows(self) -> int:
        """Elements of one item's result."""
        return self.rows[0] if self.gated else sum(self.rows)

    @property
    def likeness(self) -> tuple[Any, ...]:
        """Products that share this are alike for choosing block sizes."""
        return (self.kind, self.rows, self.columns, self.gated, self.gain is not None, self.bias is not None)

    def candidates(self) -> list[Blocks]:
        """Block sizes that fit."""
        every = tried(self.batch, four_bit=self.kind == "4-bit")
        half = self.dummy.dtype in (torch.bfloat16, torch.float16)
        return [
            blocks
            for blocks in every
            if all(rows % blocks.n == 0 for rows in self.rows) and (half or not blocks.permutes)
        ]

    def start(self) -> None:
        """Take the first sizes that fit.

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
                f"Our kernels have no cut for a layer of {' and '.join(map(str, self.rows))} rows under a batch of {self.batch}; "
                "a multiple of 16 always has one. Say kernels='torch'."
            )

    def __call__(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """out (batch, rows) from x (batch, columns); the norm is part of it at batch 1 and done before it at others."""
        none, sizes = self.dummy, self.blocks
        n_first, n_second = (self.rows[0], 0) if self.gated or len(self.rows) == 1 else self.rows[:2]
        shared: dict[str, Any] = {
            "bias": none if self.bias is None else self.bias,
            "residual": none if residual is None else residual,
            "out": out,
            "n_first": n_first,
            "n_second": n_second,
            "n_all": self.out_rows,
            "k_size": self.columns,
            "second": self.far[0],
            "third": self.far[1],
            "bias_second": self.bias_far[0],
            "bias_third": self.bias_far[1],
            "gated": self.gated,
            "has_bias": self.bias is not None,
            "has_residual": residual is not None,
            "out_permuted": self.out_permuted,
            "block_n": sizes.n,
            "block_k": sizes.k,
            "num_warps": sizes.warps,
            **launched(self.early, product=True),
        }
        if self.constants is not None:
            shared |= self.constants.arguments(none)
            shared |= {
                "table": self.table,
                "tables": self.tables,
                "permutes": sizes.permutes,
            }
        else:
            shared |= {
                "row_scale": none if self.scales is None else self.scales,
                "scaled": self.scales is not None,
                "x_permuted": self.x_permuted,
            }
        grid = (self.out_rows // sizes.n,)
        if self.batch > 1:
            shared |= {"batch": self.batch, "stages": sizes.stages}
            if self.kind == "4-bit":
                four_bit_rows[grid](x=x, w=self.weight, padded=_padded(self.batch, 8), **shared)
            else:
                plain_rows[grid](x=x, w=self.weight, padded=_padded(self.batch, 16), **shared)
            return
        words = self.columns // 8 if self.kind == "4-bit" else self.columns
        shared |= {
            "gain": none if self.gain is None else self.gain,
            "norm": self.gain is not None,
            "eps": self.eps,
            "whole": words % sizes.k == 0,
        }
        if self.kind == "4-bit":
            if sizes.permutes:
                x, shared["gain"] = _words(x), _words(shared["gain"]) if self.gain is not None else none
            four_bit_vector[grid](x=x, w=self.weight, bf16=out.dtype == torch.bfloat16, **shared)
        else:
            plain_vector[grid](x=x, w=self.weight, **shared)


def product_of(
    modules: Sequence[Any],
    *,
    batch: int,
    dummy: torch.Tensor,
    early: Early,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    permuted: tuple[bool, bool] = (False, False),
    int8: bool = False,
) -> Product:
    """The product of these modules' matrices; `permuted` says whether input and output are stored by eights."""
    kinds = {kind_of(module) for module in modules}
    if len(kinds) > 1:
        raise BuildError(
            f"engine='graph' takes layers with a common input (q, k and v; gate and up) together, and these are stored in {len(kinds)} ways: "
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
        far=distances(weights),
        gated=gated,
        gain=gain if batch == 1 else None,
        eps=eps,
        x_permuted=permuted[0],
        out_permuted=permuted[1],
        batch=batch,
        dummy=dummy,
        early=early,
        bias=biases[0] if biases else None,
        bias_far=distances(biases),
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
    """Give all these products, which are alike, the fastest of their candidates; says which and how long one of them took."""
    best: tuple[float, Any] | None = None
    for blocks in products[0].candidates():
        for product in products:
            product.blocks = blocks
        try:
            seconds = graph_seconds(lambda: [product(x, out) for product in products])
        except Exception as error:  # too large for this GPU's shared memory, say: another one fits
            if isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if best is None or seconds < best[0]:
            best = (seconds, blocks)
    if best is None:
        raise RuntimeError(f"No block sizes fit the product {products[0].likeness} on {torch.cuda.get_device_name()}.")
    for product in products:
        product.blocks = best[1]
    return f"{best[1].said}: {best[0] / len(products) * 1e6:.2f} us"


def graph_seconds(work: Any) -> float:
    """Device seconds of `work`, the least of a few replays of its graph."""
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
