"""Pictures and tables that show what a run did."""

from pipelines.reports.overlay import most_labelled_slice, overlay_panels, save_overlay_figure

__all__ = ["most_labelled_slice", "overlay_panels", "save_overlay_figure"]
