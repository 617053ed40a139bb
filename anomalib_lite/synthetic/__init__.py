"""Made-up defects on normal images, with exact masks."""

from anomalib_lite.synthetic._anomalies import (
    KINDS,
    SyntheticAnomalies,
    SyntheticAnomaly,
    SyntheticSet,
)

__all__ = [
    "KINDS",
    "SyntheticAnomalies",
    "SyntheticAnomaly",
    "SyntheticSet",
]
