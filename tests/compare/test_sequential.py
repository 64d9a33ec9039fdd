"""The sequential rule of an A/B: the result of each check. tests/studies simulates its error rates."""

from __future__ import annotations

import pytest

from hpc_core.compare.sequential import Sequential
from hpc_core.gate.verdict import Verdict


def test_checks_end_at_the_cap_and_say_what_would_decide() -> None:
    """Checks decide nothing while pairs are left, then INCONCLUSIVE; alpha is spent check by check."""
    rule = Sequential(0.05, 0.005, most_pairs=5)
    base, head = [1.0, 1.01, 0.99, 1.0, 1.01], [1.0, 1.03, 1.01, 0.99, 1.02]
    checks = [rule.check(base[:count], head[:count]) for count in range(2, 6)]
    assert [check.verdict for check in checks] == [None, None, None, Verdict.INCONCLUSIVE]
    assert [check.alpha_spent for check in checks] == pytest.approx([0, 0.05 / 3, 0.1 / 3, 0.05])
    assert checks[0].interval is None
    assert "pairs like these" in checks[-1].required


def test_a_wrong_rule_or_unequal_sides_raise() -> None:
    """A rule of one pair, and sides of different length, raise ValueError."""
    with pytest.raises(ValueError, match="Not a rule"):
        Sequential(0.05, 0.005, least_pairs=1)
    with pytest.raises(ValueError, match="got 3 and 4"):
        Sequential(0.05, 0.005).check([1.0] * 3, [1.0] * 4)
