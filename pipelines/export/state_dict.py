"""The weights as a ``state_dict`` of torch, for MONAI's own export commands, which read nothing else.

An export holds safetensors alone: nothing is executed when they are read. ``ckpt_export`` and ``onnx_export`` of MONAI
want a file of ``torch.save``; this makes one where somebody needs it. What reads it should ask for ``weights_only``.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from pipelines.files import write_atomically
from pipelines.runner import bundle_parser
from pipelines.training.checkpoints import load_weights


def write_state_dict(bundle: str | Path, output: str | Path) -> Path:
    """Write the weights of an unpacked export as ``torch.save`` does, every name that the network has; return the path.

    Args:
        bundle: its folder.
        output: the file to write, for instance ``models/model.pt``; ``verify`` refuses a folder that holds one.

    Raises:
        BundleError: the weights are not those of the network.
        ResourceError: the file cannot be written.
    """
    output = Path(output).expanduser().resolve()
    with bundle_parser(str(bundle), "inference", {"device_name": "cpu"}) as parser:
        (weights,) = parser.get_parsed_content("weights")
        network = load_weights(parser.get_parsed_content("network_def"), weights)
    stored = io.BytesIO()
    torch.save(network.state_dict(), stored)
    write_atomically(output, stored.getvalue())
    return output
