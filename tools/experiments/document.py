"""Write the tables and figures of documents anew.

    python tools/experiments/document.py docs/results.md docs/results/*.md

Every command of a document that reads

    python tools/experiments/report.py ARGUMENTS

in a block of its own is called as if from the repository; the tables after
the block become what it prints, and figures are drawn where it says.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

from experiments import report  # noqa: E402

COMMAND = 'python tools/experiments/report.py '
# A block of one command, lines continued by a backslash, and its tables.
BLOCK = re.compile(
    rf'(```bash\n{re.escape(COMMAND)}((?:.*\\\n)*.*)\n```\n)'
    r'(?:\n(?:\|.*\n)+)*'
)


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('documents', type=Path, nargs='+')
    options = parser.parse_args(argv)
    texts = {}
    for path in options.documents:
        try:
            texts[path.resolve()] = text = path.read_text()
        except OSError as error:
            parser.error(f'{path} cannot be read: {error}')
        if not BLOCK.search(text):
            parser.error(f'{path} has no block with a "{COMMAND}..."')
    os.chdir(ROOT)
    for path, text in texts.items():
        path.write_text(rendered(text))


def arguments_of(block: re.Match[str]) -> list[str]:
    """Of the command in a match of :data:`BLOCK`."""
    return shlex.split(block[2].replace('\\\n', ' '))


def rendered(text: str, figures: bool = True) -> str:
    """The document with its tables as they should be.

    Args:
        text: Text of the document.
        figures: draw them, too.
    """

    def filled(block: re.Match[str]) -> str:
        arguments = arguments_of(block)
        if not figures and '--figure' in arguments:
            place = arguments.index('--figure')
            del arguments[place : place + 2]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            report.main(arguments)
        return f'{block[1]}\n{shown.getvalue().rstrip()}\n'

    return BLOCK.sub(filled, text)


if __name__ == '__main__':
    main()
