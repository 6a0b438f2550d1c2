"""The benchmark's report, from the JSON results of its cells alone."""

from __future__ import annotations

from pathlib import Path

from mtdiffusion_benchmarks.report import html, markdown
from mtdiffusion_benchmarks.report.tables import read_results

__all__ = ["build_report"]


def build_report(folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` (one page, nothing external) and ``report.md`` from ``profile.json`` and ``cells/*.json``.

    The same files give the same reports, byte for byte.

    Returns:
        Their paths.

    Raises:
        UserError: if a file is missing, damaged or of another schema; nothing is written then.
    """
    results = read_results(folder)
    written = {folder / "report.html": html.render(results), folder / "report.md": markdown.render(results)}
    for path, content in written.items():
        path.write_text(content, encoding="utf-8", newline="\n")
    page, document = written
    return page, document
