"""What MkDocs is told beside mkdocs.yml: links that leave docs/ lead somewhere on the site, too.

The pages are written for a clone and for a forge, where ``../core/mtdiffusion/loss.py`` is a file beside them. On the
site each such file is a page of its own: Markdown as it is, other files as code, very long ones as plain text, and a
folder as the list of what is in it. A notebook is a page of its text and its code, from which it can be fetched. So a
link is right in both places, and the build is strict about all of them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
IN_NAV = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages from outside docs/ that the navigation names: they are at the top of the site."""
WIDE = 48
"""Letters of code from which it is broken in any column of a table."""
LONG = 60_000
"""Bytes from which a file is shown as plain text: as a page it would take seconds to make, and to open."""

_LINK = re.compile(r"(\]\()([^)\s#:`]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
_JOINT = re.compile(r"(?<=[_/.=,|])(?=\w)|(?<=[a-z])(?=[A-Z])")
_CODE = re.compile(r"<code>([^<]*)</code>")
_README = "about.md"
_LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".sh": "sh", ".j2": "html", ".css": "css"}
_SKIPPED = {"__pycache__", "py.typed"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook; and the files outside docs/ that pages lead to, and those that these lead to."""
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_notebook(path)))
    waiting = {*IN_NAV}
    for file in files.documentation_pages():
        waiting |= set(_left(f"docs/{file.src_uri}", file.content_string))
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        content = _content(path)
        inclusion = InclusionLevel.INCLUDED if path in IN_NAV else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, _place(path), content=content, inclusion=inclusion))
        if _is_markdown(path) or (ROOT / path).is_dir():
            waiting |= set(_left(path, content)) - done
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between places in the repository into links between places on the site."""
    here = _source(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        target = _target(here, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri))}{match[3] or ''})"

    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):  # code stays as it is
        parts += [_LINK.sub(changed, _plain(markdown[at : fence.start()])), fence[0]]
        at = fence.end()
    return "".join([*parts, _LINK.sub(changed, _plain(markdown[at:]))])


def on_page_content(html: str, **_: Any) -> str:
    """What HTML needs beside the text.

    Docstrings name code as Sphinx does: ``:class:`Run``` is the name alone here, and ``::`` a colon. Code in a table
    may be broken where its words end, so that no column is as wide as a path, nor one as narrow as a letter.
    """
    html = re.sub(r"<td.*?</td>", lambda cell: _CODE.sub(_breakable, cell[0]), html, flags=re.S)
    html = re.sub(r":(?:class|meth|func|data|attr|mod):<code>[~!]?(.+?)</code>", r"<code>\1</code>", html)
    return html.replace("<p>::</p>", "").replace("::</p>", ":</p>")


def _plain(markdown: str) -> str:
    """What forges and MkDocs read differently: a comment before a table, and a bar in the code of a table's cell."""
    markdown = re.sub(r"<!--.*?-->", "\n", markdown, flags=re.S)
    cell = re.compile(r"`[^`\n]*`")
    return re.sub(
        r"^\|.*$", lambda row: cell.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), markdown, flags=re.M
    )


def _breakable(code: re.Match[str]) -> str:
    """Code that may be broken after what joins its words."""
    kind = ' class="long"' if len(code[1]) > WIDE else ""
    return f"<code{kind}>{_JOINT.sub('<wbr>', code[1])}</code>"


def _source(uri: str) -> str:
    """A page's path in the repository."""
    if uri in IN_NAV:
        return uri
    if not uri.startswith("repository/"):
        return f"docs/{uri}"
    path = uri.removeprefix("repository/").replace(_README, "README.md")
    for suffix in ("/index.md", ".md", ".txt"):
        if not (ROOT / path).exists() and path.endswith(suffix):
            path = path.removesuffix(suffix)
    return path


def _target(here: str, link: str) -> str | None:
    """The path in the repository that a link leads to; None if it is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here) if not (ROOT / here).is_dir() else here, link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def _left(here: str, text: str) -> Iterator[str]:
    """What a text leads to that is no page of its own: files outside docs/, and any folder."""
    for match in _LINK.finditer(_FENCE.sub("", text)):
        target = _target(here, match[2])
        if target is not None and (not target.startswith("docs/") or (ROOT / target).is_dir()):
            yield target


def _place(path: str) -> str:
    """Where something of the repository is on the site."""
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    if path in IN_NAV:
        return path
    if (ROOT / path).stat().st_size > LONG:
        return f"repository/{path}.txt"
    if _is_markdown(path):  # a README.md would be its folder's page, which is the folder's list
        return f"repository/{path}".replace("README.md", _README)
    return f"repository/{path}.md"


def _is_markdown(path: str) -> bool:
    return path.endswith(".md") and (ROOT / path).is_file() and (ROOT / path).stat().st_size <= LONG


def _notebook(path: Path) -> str:
    """A notebook as a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    title, _, rest = parts[0].partition("\n")
    fetch = f'<a href="{path.name}" download>This page is a notebook: fetch it and run it.</a>'
    return "\n\n".join([title, fetch, rest.strip(), *parts[1:]]) + "\n"


def _content(path: str) -> str:
    """A place of the repository as the site shows it."""
    at = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if at.is_dir():
        readme = at / "README.md"
        begin = readme.read_text() if readme.is_file() else f"# {path}\n"
        return f"{hidden}{begin}\n\n## In this folder\n\n{_listing(at)}\n"
    text = at.read_text()
    if _is_markdown(path):
        return text
    if at.stat().st_size > LONG:
        return text
    return f"{hidden}# {path}\n\n````{_LANGUAGES.get(at.suffix, 'text')}\n{text.rstrip()}\n````\n"


def _listing(folder: Path) -> str:
    """Its files as links, its folders by name."""
    inside = sorted(entry for entry in folder.iterdir() if entry.name not in _SKIPPED and entry.name[0] != ".")
    return "\n".join(f"- `{entry.name}/`" if entry.is_dir() else f"- [{entry.name}]({entry.name})" for entry in inside)
