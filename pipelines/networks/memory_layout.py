"""Channels-last memory: the layout in which some convolution kernels need no reordering of their input."""

from __future__ import annotations

import torch
from torch import nn

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def lay_out_channels_last(network: nn.Module) -> nn.Module:
    """Lay out the kernels of every 2D and 3D convolution with the channels last, in place; return the network.

    Convolutions take the layout of their kernel over from there on, whatever that of the input. Values do not change.
    """
    for parameter in network.parameters():
        if parameter.dim() in _FORMATS:
            parameter.data = parameter.data.contiguous(memory_format=_FORMATS[parameter.dim()])
    return network
