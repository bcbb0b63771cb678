"""The paper's recipe: its update rule, the rate divided by ten on a plateau, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastalex.train.errors import TrainingError
from fastalex.train.options import Options


class PaperSGD(torch.optim.Optimizer):
    r"""The update of section 5.

    .. math:: v \leftarrow \mu v - \lambda \epsilon w - \epsilon g, \qquad w \leftarrow w + v

    The learning rate :math:`\epsilon` sits inside the velocity: when it is lowered, steps taken before keep their
    size. :class:`torch.optim.SGD` multiplies the whole velocity by the new rate instead.

    Args:
        params: tensors, or groups of them with ``lr``, ``momentum`` and ``weight_decay`` of their own.
        lr: the learning rate :math:`\epsilon`.
        momentum: :math:`\mu`.
        weight_decay: :math:`\lambda`.

    Raises:
        ValueError: for a negative argument.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                _update(weights, [self._velocity(weight) for weight in weights], group)
        return loss

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: Tensor = state["velocity"]
        return velocity


def _update(weights: list[Tensor], velocities: list[Tensor], group: Mapping[str, Any]) -> None:
    """torch's one-pass SGD kernel computes v <- mu v + (1 - damping)(g' + decay w), w <- w - rate v.

    With g' = -g, decay = -lambda, damping = 1 - lr and rate = -1 that is the paper's rule, and each weight,
    gradient and velocity is read once: written out in torch's operations it would be four passes.
    """
    lr, momentum, decay = (float(group[name]) for name in ("lr", "momentum", "weight_decay"))
    gradients: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
    inside = (
        momentum != 0
    )  # without momentum the kernel takes no velocity, and the two rules are one
    torch._fused_sgd_(
        weights,
        gradients,
        velocities if inside else [],
        weight_decay=-decay if inside else decay,
        momentum=momentum,
        lr=-1.0 if inside else lr,
        dampening=1 - lr if inside else 0.0,
        nesterov=False,
        maximize=inside,
        is_first_step=False,
    )


def parameter_groups(
    model: nn.Module, lr: float, rates: Mapping[str, float], freeze: Iterable[str]
) -> list[dict[str, Any]]:
    """Groups of parameters by learning rate; frozen layers need no gradient and are left out.

    A layer is named by the end of its path, such as ``fc8``, or by a leading part of it, such as ``features``.

    Raises:
        TrainingError: for a name that fits no layer, or where everything is frozen.
    """
    freeze = tuple(freeze)
    unused = {*rates, *freeze}
    groups: dict[float, list[Tensor]] = {}
    for path, parameter in model.named_parameters():
        names = set(path.split("."))
        unused -= names
        parameter.requires_grad_(names.isdisjoint(freeze))
        if parameter.requires_grad:
            factor = math.prod(rates[name] for name in names & set(rates))
            groups.setdefault(factor, []).append(parameter)
    if unused:
        layers = ", ".join(dict.fromkeys(p.split(".")[-2] for p, _ in model.named_parameters()))
        raise TrainingError(f"no layer is called {', '.join(sorted(unused))}; there are {layers}")
    if not groups:
        raise TrainingError("every layer is frozen; leave one to train")
    return [{"params": params, "lr": lr * factor} for factor, params in groups.items()]


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer that ``options`` ask for."""
    assert options.lr is not None
    groups = parameter_groups(model, options.lr, options.rates(), options.freeze)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups, options.lr, options.momentum, weight_decay=options.weight_decay, fused=True
        )
    return PaperSGD(groups, options.lr, options.momentum, options.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, options: Options) -> ReduceLROnPlateau:
    """Divides the rate by ten when the validation loss has not fallen for ``patience`` epochs, ``drops`` times.

    The paper watches the validation error rate; the loss says the same with finer steps on small sets.
    """
    assert options.patience is not None
    lowest = [group["lr"] * 0.1**options.drops for group in optimizer.param_groups]
    return ReduceLROnPlateau(
        optimizer, factor=0.1, patience=options.patience, threshold=0.0, min_lr=lowest, eps=0.0
    )
