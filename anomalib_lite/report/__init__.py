"""One HTML page of results."""

from anomalib_lite.report._page import page

__all__ = [
    "page",
]
