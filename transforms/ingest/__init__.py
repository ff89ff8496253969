"""Images of any format through one gate: sound and proven, or refused in three lines.

``read_image(path)`` returns voxels, affine and spacing of a NIfTI, NRRD, PNG, TIFF, NPZ or Zarr image. Each format has
a module with one function ``read``; what they share is in ``transforms.ingest_budget``, ``ingest_stream`` and
``ingest_checks``, beside the modules that use it (the content cache knows a transform by the sources beside it). What
is checked, in which order, and how to raise a limit is told in docs/ingest.md.
"""

from transforms.ingest.gate import ENDINGS, read_image, read_label_image
from transforms.ingest.image import ImageFile, Kind
from transforms.ingest_budget import Budget

__all__ = ["ENDINGS", "Budget", "ImageFile", "Kind", "read_image", "read_label_image"]
