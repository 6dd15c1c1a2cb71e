"""Check an environment, and a config before a long training.

    python tools/analysis_tools/doctor.py [CONFIG] [--memory] [--strict]

Prints findings, each with its fix. The exit status is 0 without an
error, else 1; with --strict a warning counts as an error.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from support import environment_checks, launch
    from support.config_checks import Training
    from support.findings import LEVELS, Finding, findings_of
except ImportError as error:  # its message has the command, if it is ours
    print(f'error    {error}')
    sys.exit(1)

import torch


def parse_args() -> argparse.Namespace:
    """Command line of the doctor."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument(
        '--processes',
        type=launch.positive,
        default=max(1, torch.cuda.device_count()),
        help='of the training, for the learning rate (default: GPUs here)',
    )
    parser.add_argument(
        '--memory',
        action='store_true',
        help='estimate the memory by one training step on the CPU (slow)',
    )
    parser.add_argument(
        '--size',
        type=launch.positive,
        default=128,
        help='pixels of the random image for the layers (default: 128)',
    )
    parser.add_argument(
        '--strict', action='store_true', help='exit with 1 at a warning, too'
    )
    launch.add_common_options(parser)
    return parser.parse_args()


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Yield every finding."""
    folder, cfg = args.work_dir or 'work_dirs', None
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')

    def config_loads() -> Iterator[Finding]:
        nonlocal cfg
        cfg = launch.load_config(args, needed)
        yield Finding('ok', f'{args.config} loads')

    first = list(findings_of([config_loads])) if args.config else []
    folder = cfg.work_dir if cfg else folder
    checks = environment_checks.checks(folder, '--work-dir')
    yield from findings_of(checks)
    yield from first
    if cfg:
        training = Training(cfg, args.processes, Path(folder, 'doctor'))
        yield from findings_of(training.checks(args.size, args.memory))


def main() -> None:
    """Print the findings."""
    args = parse_args()
    counts = Counter()
    found = examine(args)
    while True:
        with contextlib.redirect_stdout(sys.stderr):  # words of the hosts
            finding = next(found, None)
        if finding is None:
            break
        print(finding, flush=True)
        counts[finding.level] += 1
    print(', '.join(f'{counts[level]} {level}' for level in LEVELS))
    worst = counts['error'] or (args.strict and counts['warning'])
    sys.exit(1 if worst else 0)


if __name__ == '__main__':
    launch.run(main)
