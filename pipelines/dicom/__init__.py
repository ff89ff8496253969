"""DICOM in behind a geometry gate; segmentations, parametric maps and structured reports out (extra ``dicom``)."""
