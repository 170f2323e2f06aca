"""AdamW on torch's fused update, with one step count for each parameter group, and with Muon for those that it trains.

megatron-core's optimizers expect the habits of apex's and TransformerEngine's FusedAdam: the step count lives in the
parameter group and no state but the two moments in `state`. torch.optim.AdamW keeps a count for each parameter, which
megatron-core 0.16 cannot save and resume exactly with its distributed optimizer.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_step.engine.compat.operations import fused_adamw_
from megatron_step.optim.muon import Muon
from megatron_step.plan.states import FIRST_MOMENT, MOMENTS, SECOND_MOMENT


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019):

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
    w = w (1 - lr decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("AdamW decouples weight decay from the gradient; adam_w_mode must be true")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.muon: Muon | None = None
        """What trains the groups whose rule is muon, if there are any."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch allows a closure, megatron-core has none
        """Update every parameter that has a gradient."""
        self.count_step()
        for group in self.adamw_groups():
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._moments(p) for p in params]
            first, second = ([state[name] for state in states] for name in (FIRST_MOMENT, SECOND_MOMENT))
            update_(group, params, [p.grad for p in params], first, second)
        if self.muon is not None:
            self.muon.step(self, {p: p.grad for p in self.muon.weights if p.grad is not None})

    def count_step(self) -> None:
        """Count a step in every group."""
        for group in self.param_groups:
            group["step"] += 1  # also of a group that is empty on this rank: the count is the same on all

    def adamw_groups(self) -> Iterator[dict[str, Any]]:
        """Yield the groups that AdamW trains."""
        return (group for group in self.param_groups if group.get("rule") != "muon")

    def _moments(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state.update({name: torch.zeros_like(param) for name in MOMENTS})
        return state


def update_(
    group: dict[str, Any],
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
) -> None:
    """Update fp32 weights and moments in place by torch's fused AdamW, at the group's step and with its settings."""
    # A tensor on the weights' device, as the fused kernel wants it; one serves all weights.
    count = torch.tensor(float(group["step"]), device=weights[0].device)
    fused_adamw_(
        weights,
        gradients,
        first,
        second,
        [],
        [count] * len(weights),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
