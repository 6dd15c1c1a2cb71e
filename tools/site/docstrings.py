"""Docstrings of ws_mm as Markdown.

griffe knows Args and Raises. It would take our other sections (Formula,
Convention, Shape, ...) for boxes whose title is the first line.
"""

import re
from typing import Any

from griffe import Extension, Object

GOOGLE = ('Args:', 'Attributes:', 'Example:', 'Raises:', 'Returns:', 'Yields:')
OURS = re.compile(
    r'^(Base|Baked|Compiled|Convention|Cost|Distributed|Formula|Frozen|Shape'
    r'|Source|State|dtype)(:?)(?=[ ,\n]|$)',
    re.MULTILINE,
)
ROLE = re.compile(r':\w+:`~?([^`]+)`')
# A line that is not indented, and the indented ones below it.
SECTION = re.compile(r'^(\S.*)\n((?:(?: {4}.*)?\n)* {4}.*)', re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """Return a docstring whose sections are paragraphs and blocks."""

    def section(match: re.Match[str]) -> str:
        first, body = match.groups()
        if first in GOOGLE:
            return match[0]
        if re.match(r'\w+: \S', first):
            return f'{first} {" ".join(body.split())}'
        body = re.sub('^ {4}', '', body, flags=re.MULTILINE)
        return f'{first}\n\n```text\n{body}\n```\n'

    text = SECTION.sub(section, ROLE.sub(r'``\1``', docstring))
    text = text.replace('\nExample:\n', '\nExamples:\n')
    return OURS.sub(r'\n**\1\2**', text)


class Docstrings(Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **unused: Any) -> None:
        """Rewrite one."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
