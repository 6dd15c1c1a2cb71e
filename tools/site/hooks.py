"""Make a site of pages that GitHub shows, too.

The navigation is that of docs/README.md: its titles are the sections, the
links of its tables the pages. Pages that are not in docs/ join it, and files
and folders that a page links get a page of their own, so that no link needs
the network.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
# Files outside of docs/ and their pages. The index of docs/ is the navigation.
PAGES = {
    ROOT / 'README.md': 'index.md',
    DOCS / 'README.md': 'index.md',
    ROOT / 'CONTRIBUTING.md': 'contributing.md',
    ROOT / 'configs/README.md': 'configs.md',
}
ASSETS = ('iframe-worker.js', 'site.css', 'icon.svg')
LINK = re.compile(r'(?<=\]\()(?!https?:|#)([^)#\s]+)')


def page_of(path: Path) -> str:
    """Return the page of a file or folder, by its path in docs/."""
    if path in PAGES:
        return PAGES[path]
    if path.is_relative_to(DOCS) and path.is_file():
        return path.relative_to(DOCS).as_posix()
    return f'source/{path.relative_to(ROOT).as_posix()}.md'


def targets(text: str, folder: Path) -> list[Path]:
    """Return what a page in a folder links."""
    return [Path(os.path.normpath(folder / x)) for x in LINK.findall(text)]


def show(path: Path) -> str:
    """Return a page that shows a file, or lists a folder."""
    title = path.relative_to(ROOT)
    if path.is_dir():
        files = sorted(each.name for each in path.iterdir() if each.is_file())
        body = '\n'.join(f'- `{name}`' for name in files)
    else:
        body = f'````{path.suffix[1:]}\n{path.read_text()}\n````'
    # Beside what is searched for, whole files would be noise.
    return f'---\nsearch: {{exclude: true}}\n---\n# {title}\n\n{body}\n'


def on_config(config: Any) -> Any:
    """Read the navigation."""
    config.nav = []
    index = (DOCS / 'README.md').read_text()
    for section in index.split('\n## ')[1:]:
        pages: list[Any] = [] if config.nav else [{'Overview': 'index.md'}]
        first = re.findall(r'^\| \[.*?\) \|', section, re.MULTILINE)
        for path in targets('\n'.join(first), DOCS):
            more = sorted(path.with_suffix('').glob('*.md'))
            group = [page_of(each) for each in (path, *more)]
            title = path.stem.replace('_', ' ').capitalize()
            pages.append({title: group} if more else group[0])
        config.nav.append({section.splitlines()[0]: pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for path, uri in PAGES.items():
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, uri, content=path.read_text()))
    for name in ASSETS:
        source = str(Path(__file__).parent / name)
        uri = f'assets/{name}'
        files.append(File.generated(config, uri, abs_src_path=source))
    pages = [path for path in PAGES if not path.is_relative_to(DOCS)]
    for page in (*pages, *DOCS.rglob('*.md')):
        for path in targets(page.read_text(), page.parent):
            uri = page_of(path)
            if uri.startswith('source/') and uri not in files.src_uris:
                file = File.generated(config, uri, content=show(path))
                file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
    return files


def on_page_markdown(text: str, page: Any, **unused: Any) -> str:
    """Lead links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith('source/'):
        return text
    source = next((k for k, v in PAGES.items() if v == uri), DOCS / uri)

    def lead(match: re.Match[str]) -> str:
        (path,) = targets(f']({match[1]})', source.parent)
        return os.path.relpath(page_of(path), Path(uri).parent)

    return LINK.sub(lead, text)
