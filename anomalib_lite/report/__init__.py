"""Results of a test as one HTML page, with pictures and tables beside it."""

from anomalib_lite.report._galleries import Gallery, Tile, make_galleries
from anomalib_lite.report._page import page
from anomalib_lite.report._write import FILES, write_report

__all__ = ["FILES", "Gallery", "Tile", "make_galleries", "page", "write_report"]
