"""What a trained mixture is, does and costs, as one page: gathered as plain data, then drawn."""

from molora.reports.data import Report
from molora.reports.job import gather
from molora.reports.page import html_page
from molora.reports.rows import Options
from molora.reports.summary import markdown

__all__ = ["Options", "Report", "gather", "html_page", "markdown"]
