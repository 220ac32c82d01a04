"""runs/NAME/report.html: one self-contained page that shows a person what a run did."""

from sadm_fast.report.page import write_report

__all__ = ["write_report"]
