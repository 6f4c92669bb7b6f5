"""The self-contained HTML page of a run. Called by the command line and after training; reads the run folder only."""

from tether.report.compare import write_comparison
from tether.report.page import write_report
from tether.report.serve import serve

__all__ = ["serve", "write_comparison", "write_report"]
