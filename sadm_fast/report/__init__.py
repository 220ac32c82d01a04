"""runs/NAME/report.html: one self-contained page that shows a person what a run did."""

from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html (see page.py). Imported late: matplotlib takes long, and only rank 0 draws."""
    from sadm_fast.report.page import write_report as write

    return write(run_dir)
