"""AdamW inside the backward: each weight is updated as soon as its gradient is complete, and the gradient is freed.

So the gradients never all exist at once; in full fine-tuning they are as large as the weights. The arithmetic is that of torch's fused AdamW, one
kernel for each weight. After torchtune's `optimizer_in_bwd` and Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hpc_core.engines.tuned.pointwise import Pointwise


class AdamWInBackward(torch.optim.AdamW):
    """AdamW whose work is done by hooks; `step` only counts. Its state has the names, dtypes and sizes of the fused one's.

    A backward trains even without a `step` after it. There is one backward for each step: gradients are not accumulated.
    """

    frees_gradients = True
    """No gradient is left when `step` is called."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, lr: float, run: Pointwise):
        super().__init__(parameters, lr=lr, fused=True)
        self._run_kernel = run
        self._stepped: list[torch.Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._updater(group))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure: the gradients are gone
        """Count the step of every weight that was updated since the last one."""
        if closure is not None:
            raise ValueError("AdamWInBackward steps in the backward: it cannot evaluate a closure again.")
        if self._stepped:
            torch._foreach_add_(self._stepped, 1)
            self._stepped.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Updates of a step that failed, or of a capture that was abandoned, are not counted by a later step."""
        super().zero_grad(set_to_none)
        self._stepped.clear()

    def _updater(self, group: dict[str, Any]) -> Callable[[torch.Tensor], None]:
        def update(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            flat = [each.view(-1) for each in (parameter.data, state["exp_avg"], state["exp_avg_sq"])]
            scalars = (group["lr"], group["weight_decay"], *group["betas"], group["eps"])
            self._run_kernel("adamw", flat[0], gradient.reshape(-1), flat[1], flat[2], state["step"], *scalars)
            self._stepped.append(state["step"])
            parameter.grad = None

        return update
