"""Where float64 values are stored: on their own device, or on the CPU if the device does not support float64."""

import torch
from torch import Tensor

_WITHOUT = ("mps",)  # Apple's GPU


def home(device: torch.device) -> torch.device:
    """The device for float64 values that come from `device`."""
    return torch.device("cpu") if device.type in _WITHOUT else device


def double(values: Tensor) -> Tensor:
    """`values` in float64, at `home` of their device."""
    return values.to(home(values.device)).double()
