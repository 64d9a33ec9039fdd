"""Values that a prediction needs without computing them: LLM.int8's outliers, and whether a widened mask is full."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.builders.causal_lm import STD
from hpc_core.predict.fake_bitsandbytes import Outliers, expected_columns, share_beyond


def test_the_share_beyond_a_threshold_equals_that_of_drawn_numbers() -> None:
    """silu(gate) * up of drawn normal numbers exceeds 6 as often as the formula predicts, within five standard errors."""
    deviation, draws = STD * 3072**0.5, 4_000_000
    generator = np.random.default_rng(0)
    gate, up = generator.normal(0, deviation, (2, draws))
    share = float(np.mean(np.abs(gate / (1 + np.exp(-gate)) * up) >= 6))
    expected = share_beyond(6, deviation)
    assert abs(share - expected) < 5 * (expected / draws) ** 0.5


@given(st.integers(1, 4096), st.integers(1, 20_000), st.floats(1e-9, 0.5))
def test_expected_columns_grow_with_rows_and_stay_within_the_matrix(rows: int, columns: int, share: float) -> None:
    """The expected number of columns with outliers grows with the rows and never exceeds the columns."""
    expected = expected_columns(rows, columns, share)
    assert 0 <= expected <= expected_columns(rows + 1, columns, share) <= columns


def test_only_down_proj_has_outliers_where_weights_are_drawn() -> None:
    """With drawn weights only down_proj has outliers, and only while it runs."""
    columns: dict[str, int] = {}
    outliers = Outliers()

    class Layer(torch.nn.Linear):
        name: str

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            columns[self.name] = outliers.columns(100, 8192, 6.0)
            return super().forward(x)

    model = torch.nn.ModuleDict({"up_proj": Layer(2, 2), "down_proj": Layer(2, 2)})
    for name in model:
        model[name].name = name  # type: ignore[assignment]
    outliers.watch(model, 3072)
    for module in model.values():
        module(torch.zeros(1, 2))
    assert (
        columns["up_proj"]
        == 0
        < columns["down_proj"]
        == expected_columns(100, 8192, share_beyond(6.0, STD * 3072**0.5))
    )
    assert outliers.columns(100, 8192, 6.0) == 0
