"""Pictures, tables and pages that show what a run did."""

from pipelines.reports.handler import WriteReport, report_or_warn
from pipelines.reports.overlay import most_labelled_slice, overlay_panels, save_overlay_figure
from pipelines.reports.report import write_report

__all__ = [
    "WriteReport",
    "most_labelled_slice",
    "overlay_panels",
    "report_or_warn",
    "save_overlay_figure",
    "write_report",
]
