"""The self-contained HTML page of a run. Called by the command line and after training; reads the run folder only."""

from tether.report.page import write_report

__all__ = ["write_report"]
