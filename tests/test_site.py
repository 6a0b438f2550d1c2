"""The documents as a site: built strictly, with a menu that names every page, and nothing fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mtdiffusion
import mtdiffusion_registry

ROOT = Path(__file__).parents[1]
GENERATED = ("CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Links and anchors that lead nowhere, and pages that are in no menu, are errors."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: warnings that are not printed are not counted, and --strict would let all of them pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def named_in_nav() -> list[str]:
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    return re.findall(r": ([\w-]+\.md)$", nav, re.M)


def test_the_navigation_names_every_page_once() -> None:
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(named_in_nav()) == sorted([*pages, *GENERATED])


def test_every_page_is_built(site: Path) -> None:
    for name in named_in_nav():
        assert (site / name).with_suffix(".html").is_file(), name


class Addresses(HTMLParser):
    """What a page loads by itself, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(str(found["src"]))
        if tag == "link" and found.get("rel") != "canonical" and found.get("href"):
            self.loaded.append(str(found["href"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))


def addresses(site: Path) -> Iterator[tuple[Path, Addresses]]:
    for path in site.rglob("*.html"):
        parser = Addresses()
        parser.feed(path.read_text())
        yield path, parser


def test_code_in_a_table_may_be_broken_where_its_words_end(site: Path) -> None:
    page = (site / "run-folder.html").read_text()
    assert "<td><code>checkpoints/<wbr>step-00001000/<wbr>ema.<wbr>safetensors</code></td>" in page
    assert "<wbr>" not in re.sub(r"<td.*?</td>", "", page, flags=re.S)


def test_pages_load_nothing_from_elsewhere_and_link_to_what_is_there(site: Path) -> None:
    pages = 0
    for path, found in addresses(site):
        pages += 1
        for address in [*found.loaded, *found.links]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                assert address in found.links, f"{path.name} loads {address}"
            elif parts.path and path.name != "404.html":  # whose links are from the root of a server
                assert (path.parent / unquote(parts.path)).exists(), f"{path.name}: {address}"
    assert pages > len(named_in_nav())


@pytest.mark.parametrize("package", [mtdiffusion, mtdiffusion_registry], ids=lambda package: package.__name__)
def test_the_api_has_every_name_that_a_package_exports(package: object, site: Path) -> None:
    page = {"mtdiffusion": "api-core", "mtdiffusion_registry": "api-registry"}[package.__name__]  # type: ignore[attr-defined]
    headings = set(re.findall(r'<h3 id="[\w.]*?(\w+)"', (site / f"{page}.html").read_text()))
    assert set(package.__all__) - headings == set()  # type: ignore[attr-defined]
