"""Findings of tools/analysis_tools/doctor.py, each with its fix."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from support.checks import SetupError
from support.models import first_line

LEVELS = ('ok', 'warning', 'error')


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: one of LEVELS; an error stops a training or spoils it.
        text: the facts.
        fix: command or config key; '' where the text has it.
    """

    level: str
    text: str
    fix: str = ''

    def __str__(self) -> str:
        fix = f'\n         fix: {self.fix}' if self.fix else ''
        return f'{self.level:8} {self.text}{fix}'


Checks = Iterable[Callable[[], Iterable[Finding]]]


def findings_of(checks: Checks) -> Iterator[Finding]:
    """Call every check; one that raises is a finding, too."""
    for check in checks:
        try:
            yield from check()
        except SetupError as error:
            yield Finding('error', str(error))
        # Whatever the code of a model or a data set may raise.
        except Exception as error:
            name = getattr(check, 'func', check).__name__.replace('_', ' ')
            yield Finding(
                'error',
                f'{name}: {first_line(error)}',
                'train.py would meet the same error: its Traceback says where',
            )
