"""Studies: a Python file, a YAML file, and a folder of measured rows, tables and figures."""

from anomalib_lite.studies._config import (
    NetworkConfig,
    Study,
    StudyConfig,
    StudyModel,
    open_study,
)
from anomalib_lite.studies._feature_cache import CachedBackbone, FeatureCache
from anomalib_lite.studies._figures import (
    COLORS,
    MARKERS,
    draw_bars,
    draw_categories,
    draw_matrix,
    new_figure,
    save_figure,
)
from anomalib_lite.studies._provenance import surroundings
from anomalib_lite.studies._results import Results
from anomalib_lite.studies._run import Run
from anomalib_lite.studies._runner import Summary, run_studies
from anomalib_lite.studies._sources import (
    PAPERS,
    Images,
    category_names,
    draw_images,
    open_category,
    short_name,
)
from anomalib_lite.studies._tables import summarize

__all__ = [
    "COLORS",
    "MARKERS",
    "PAPERS",
    "CachedBackbone",
    "FeatureCache",
    "Images",
    "NetworkConfig",
    "Results",
    "Run",
    "Study",
    "StudyConfig",
    "StudyModel",
    "Summary",
    "category_names",
    "draw_bars",
    "draw_categories",
    "draw_images",
    "draw_matrix",
    "new_figure",
    "open_category",
    "open_study",
    "run_studies",
    "save_figure",
    "short_name",
    "summarize",
    "surroundings",
]
