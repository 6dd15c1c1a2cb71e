"""Records of a long run that survive a kill, and the versions in it."""

import contextlib
import json
import platform
from pathlib import Path
from typing import Any

from support.checks import SetupError
from support.environment import distribution


class Records:
    """Lines of JSON that survive a kill."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                # The last one may be cut short.
                with contextlib.suppress(json.JSONDecodeError):
                    self.lines.append(json.loads(line))
        if self.lines and self.lines[0] != header:
            raise SetupError(
                f'{path} was made by another sweep ({self.lines[0]}). Give '
                'another OUT_DIR, or delete it.'
            )
        if not self.lines:
            path.write_text(json.dumps(header) + '\n')
            self.lines = [header]
        elif not path.read_text().endswith('\n'):
            with path.open('a') as file:
                file.write('\n')

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.lines.append(record)
        with self.path.open('a') as file:
            file.write(json.dumps(record) + '\n')

    def of(self, kind: str, key: str) -> dict[str, dict[str, Any]]:
        """The records of a kind by one of their values."""
        return {
            line[key]: line
            for line in self.lines
            if line.get('kind') == kind and line[key]
        }


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    import ws_mm

    found = {'python': platform.python_version(), 'ws_mm': ws_mm.__version__}
    for name in ('mmdet', 'mmseg', 'mmcv', 'mmengine', 'torch'):
        if installed := distribution(name):
            found[name] = ' '.join(installed)
    return found
