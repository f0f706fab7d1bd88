"""Autocast of networks that are used and not trained, which need not convert their weights at every call."""

import torch
from torch import nn


def convert_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a network's linear layers and 2-d convolutions to `dtype`, in place.

    Under autocast to `dtype` its outputs are the same, bit for bit: there these layers round their weights themselves,
    at every call where no gradient is wanted. Outside of it the network can no longer be called on float32.

    Biases, norms and embeddings stay as they are, and so does what is not of exactly these classes, since nobody knows
    what else is done with its weight. One that two modules share becomes two.
    """
    for layer in network.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            layer.weight = nn.Parameter(layer.get_parameter("weight").detach().to(dtype), requires_grad=False)
