"""The page of benchmarks shows the results that are kept, and nothing else."""

from __future__ import annotations

import re
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables() -> Any:
    spec = spec_from_file_location("benchmark_tables", ROOT / "benchmarks/tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_is_kept(tables: Any) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page
    for study in tables.KEPT.iterdir():
        assert f"<!-- table: {study.name}/table" in page
        rows = pd.read_csv(study / "rows.csv")
        assert rows["commit"].nunique() == 1
        assert rows["seed"].nunique() == 3
        assert not rows["commit"].str.endswith("-dirty").any()
    shown = set(re.findall(r"\]\(benchmarks/([\w/]+\.png)\)", page))
    assert shown == {str(p.relative_to(tables.KEPT)) for p in tables.KEPT.glob("*/*.png")}


def test_another_figure_changes_the_page(
    tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = shutil.copytree(tables.KEPT / "cross_domain", tmp_path / "out/cross_domain_local")
    table = pd.read_csv(results / "table.csv", index_col=0)
    table.loc["in-domain", "image_auroc"] = 0.12345
    table.to_csv(results / "table.csv")
    monkeypatch.setattr(tables, "KEPT", tmp_path / "kept")
    tables.keep(tmp_path / "out")
    text = "<!-- table: cross_domain/table image_auroc,pairs -->\nold\n<!-- end -->\nrest"
    filled = tables.filled(text)
    assert "| in-domain | 0.123 | 16 |" in filled
    assert "768 rows, 3 seeds, commit" in filled
    assert "old" not in filled
    assert filled.endswith("<!-- end -->\nrest")
