"""MkDocs hook: README.md is the front page, and links to files outside docs/ work on the site as in the repository.

A linked file outside docs/ (a results page, a recipe, an example) becomes part of the site under its repository path.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FRONT_PAGE = "README.md"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and every linked file outside docs/, including those that the added pages link to."""
    paths = [FRONT_PAGE, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(paths)
    while paths:
        path = paths.pop()
        if path == FRONT_PAGE or not path.startswith("docs/"):
            files.append(File.generated(config, _site_path(path), abs_src_path=str(ROOT / path)))
        if not path.endswith(".md"):
            continue
        for _, link, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            target = _resolve(path, link)
            if target and target not in seen and not target.startswith("docs/"):
                seen.add(target)
                paths.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs passes both
    """Rewrite each link to a repository file into a link to its page on the site."""
    uri = page.file.src_uri
    path = FRONT_PAGE if uri == "index.md" else uri if (ROOT / uri).is_file() else f"docs/{uri}"

    def rewrite(match: re.Match[str]) -> str:
        target = _resolve(path, match[2])
        if not target:
            return match[0]
        return match[1] + posixpath.relpath(_site_path(target), posixpath.dirname(uri) or ".") + match[3]

    return LINK.sub(rewrite, markdown)


def _resolve(path: str, link: str) -> str:
    """Return the repository path of a relative link, or "" if it does not name a file of the repository."""
    if ":" in link:
        return ""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if (ROOT / target).is_file() else ""


def _site_path(path: str) -> str:
    return "index.md" if path == FRONT_PAGE else path.removeprefix("docs/")
