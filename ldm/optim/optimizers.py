"""Optimizers that select which parameters to decay and which are matrices; and what a resumed run restores of them.

Weight decay regularizes matrices by pulling them toward zero; for the scale of a norm, a bias or a scalar it only does
harm. A parameter with fewer than two dimensions is never decayed here.

A checkpoint restores the optimizer's moments and the schedule's position. Learning rate, betas, decay and everything
else that can be configured come from the configuration: `keep_settings` and `Scheduled` see to that, whereas torch
would restore the old values.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import CheckpointError
from ldm.optim.lr_schedules import Constant
from ldm.optim.orthogonal import Orthogonal, loss_of
from ldm.ranges import FractionBelowOne, NotNegative, Positive


def unscales(optimizer: Optimizer) -> bool:
    """Whether its kernel divides gradients by a loss scale and skips those that are not finite, as torch's fused do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def keep_settings(optimizer: Optimizer) -> None:
    """Make `optimizer.load_state_dict` restore its state, but keep the settings that it was constructed with.

    Settings are the parameters of its constructor. Whatever else an optimizer stores in its groups (Prodigy its
    distance estimate, schedule-free ones their step count) is state, and is restored.

    Raises:
        CheckpointError: on loading, if the parameter groups differ.
    """
    optimizer.register_load_state_dict_pre_hook(_with_own_settings)


def _with_own_settings(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    own, saved = optimizer.param_groups, state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"optimizer: {type(optimizer).__name__} has groups of {sizes} parameters, the checkpoint's optimizer has "
            f"{saved_sizes}: the moments of another optimizer, or of another model, cannot be carried over. Undo that "
            f"change, or start a new run."
        )
    makers = [inspect.signature(vars(kind)["__init__"]) for kind in type(optimizer).__mro__ if "__init__" in vars(kind)]
    names = {name for maker in makers for name in maker.parameters} | {"initial_lr"}
    settings = [{name: group[name] for name in group if name in names and name != "params"} for group in own]
    groups = [{**group, **setting} for group, setting in zip(saved, settings, strict=True)]
    return {**state_dict, "param_groups": groups}


class Scheduled(LambdaLR):
    """The learning rates of an optimizer over its steps; only the position is restored from a checkpoint.

    Args:
        optimizer: the optimizer whose rates are multiplied.
        schedule: optimizer step (from 0) -> multiplier; None: 1.
    """

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float] | None) -> None:
        factor = schedule or Constant()
        # A plain function, so that no copy of the schedule is saved.
        super().__init__(optimizer, lambda step: factor(step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        rates = [base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def place_schedules(checkpoint: dict[str, Any], steps: Sequence[int]) -> None:
    """Give each optimizer of a checkpoint its position in a schedule, even if it was saved without one.

    Args:
        checkpoint: as Lightning loads it; changed in place.
        steps: number of steps that each optimizer has made.
    """
    saved = iter(checkpoint.get("lr_schedulers", []))
    checkpoint["lr_schedulers"] = [
        # torch stores the initial rate in the groups of an optimizer that has a schedule.
        next(saved) if "initial_lr" in state["param_groups"][0] else {"last_epoch": done}
        for state, done in zip(checkpoint.get("optimizer_states", []), steps, strict=False)
    ]


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one with decay, one without; an empty one is left out."""
    listed = list(parameters)
    groups = [
        {"params": [parameter for parameter in listed if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in listed if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter 2019), fused, with decay only for matrices and convolutions.

    Args:
        params: all parameters.
        lr: learning rate.
        betas: of the moving averages; (0.9, 0.95) forgets a spike sooner than torch's (0.9, 0.999).
        eps: added to the square root of the second moment.
        weight_decay: of parameters with two dimensions or more.
        fused: one kernel for all parameters; False with fp16 loss scaling.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: Positive,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95),
        eps: NotNegative = 1e-8,
        weight_decay: NotNegative = 0.01,
        fused: bool = True,
    ) -> None:
        super().__init__(decay_groups(params, weight_decay), lr=lr, betas=betas, eps=eps, fused=fused)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all other parameters, as one optimizer.

    Muon orthogonalizes each matrix's update. (Embedding tables are matrices, too, and cannot be distinguished from
    others here.) Its updates are scaled to the size of AdamW's (Liu et al. 2025, "Moonlight"), so that one learning
    rate and one decay work for both.

    Args:
        params: all parameters.
        lr: learning rate of both.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: of parameters with two dimensions or more.
        convolutions: all parameters of two dimensions or more are matrices, kernels (out, in * height * width): for
            autoencoders and UNets (ldm/optim/orthogonal.py). False: torch's Muon, for transformers, whose few
            convolutions go to AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: Positive,
        momentum: FractionBelowOne = 0.95,
        betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.95),
        weight_decay: NotNegative = 0.01,
        convolutions: bool = False,
    ) -> None:
        listed = list(params)
        dims = {parameter.ndim for parameter in listed if parameter.ndim >= 2} if convolutions else {2}
        matrices = [parameter for parameter in listed if parameter.ndim in dims]
        others = [parameter for parameter in listed if parameter.ndim not in dims]
        self._parts: list[Optimizer] = []
        if matrices and convolutions:
            self._parts.append(Orthogonal(matrices, lr, momentum, weight_decay))
        elif matrices:
            settings: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
            self._parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw", **settings))
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=convolutions))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._shared = True
        self._share()

    def _share(self) -> None:
        """Make both use this optimizer's groups and state, which are what is scheduled, saved and loaded."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups = self.param_groups[first:last]
            part.state = self.state
            for group in part.param_groups:  # the checkpoint may be of the other `convolutions`
                group |= {name: value for name, value in part.defaults.items() if name not in group}
            first = last

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only during construction: groups added later would belong to neither optimizer."""
        if "_shared" in vars(self):
            raise ValueError("Muon: parameters cannot be added later; create a new optimizer")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = loss_of(closure)
        for part in self._parts:
            part.step()
        return loss
