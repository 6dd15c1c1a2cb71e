"""Result of a benchmark: environment, schema, file and plot."""

import argparse
import json
import math
import os
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark.race import Row
from support.environment import versions
from support.files import write_text

SCHEMA = 2
TIMES = {'ms', 'ms_p20', 'ms_p80'}
Suite = dict[str, tuple[str, Callable[[], list[Row]]]]


def arguments(
    doc: str,
    rounds: int,
    argv: list[str] | None = None,
    flags: Sequence[str] = (),
) -> argparse.Namespace:
    """The command line that all suites share, seeded and checked.

    Args:
        doc: what the suite says of itself.
        rounds: default of --rounds.
        argv: arguments; those of the process if None.
        flags: options of the suite alone, such as '--dry'.
    """
    parser = argparse.ArgumentParser(description=doc.split('\n')[0])
    parser.add_argument('out_dir', type=Path)
    parser.add_argument('--rounds', type=int, default=rounds)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only',
        default='',
        help='cases whose name contains this; files end in --part',
    )
    for flag in flags:
        parser.add_argument(flag, action='store_true')
    options = parser.parse_args(argv)
    options.given = ''.join(
        f' {flag}' for flag in flags if getattr(options, flag.lstrip('-'))
    )
    if options.rounds < 1:
        parser.error(f'--rounds={options.rounds} must be at least 1')
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    options.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    options.parser = parser
    return options


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios to the baseline of every case, as bars with their spread."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    cases = [
        case
        for case in result['cases']
        if any('ratio' in row for row in case['rows'])
    ]
    columns = 2 if len(cases) > 6 else 1
    lines = math.ceil(len(cases) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(7 * columns, 1.7 * lines),
        layout='constrained',
        squeeze=False,
    )
    for axis in axes.flat[len(cases) :]:
        axis.axis('off')
    for axis, case in zip(axes.flat, cases, strict=False):
        rows = [row for row in case['rows'] if 'ratio' in row]
        ratios = [row['ratio'] for row in rows]
        names = [row['contender'] for row in rows]
        ours = [name.startswith(('BCN', 'WS', 'GN+WS')) for name in names]
        axis.barh(
            names,
            ratios,
            xerr=[
                [row['ratio'] - row['ratio_p20'] for row in rows],
                [row['ratio_p80'] - row['ratio'] for row in rows],
            ],
            color=['tab:orange' if own else 'tab:gray' for own in ours],
            error_kw={'linewidth': 0.8},
        )
        axis.axvline(1, color='black', linewidth=0.8)
        if max(ratios) > 4:
            axis.set_xscale('log')
        axis.set_title(f'{case["name"]}, over {case["baseline"]}', size=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(
        f'{result["environment"]["device"]}: time, {result["what"]}', size=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(
    name: str,
    what: str,
    suite: Suite,
    options: argparse.Namespace,
    derive: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    draw: Callable[[dict[str, Any], Path], None] = plot,
) -> None:
    """Run the chosen cases and write the result and its plot.

    Args:
        name: Name of the suite, of its script and of its files.
        what: Description of a time.
        suite: Baseline and measuring function of each case.
        options: see :func:`arguments`.
        derive: Function of all cases that adds keys to the result.
        draw: Function that makes the plot.
    """
    chosen = {k: v for k, v in suite.items() if options.only in k}
    if not chosen:
        options.parser.error(
            f'--only={options.only!r} names no case of {", ".join(suite)}'
        )
    options.out_dir.mkdir(parents=True, exist_ok=True)
    only = f' --only {options.only!r}' if options.only else ''
    cases: list[dict[str, Any]] = []
    result = {
        'schema': SCHEMA,
        'suite': name,
        'what': what,
        'command': (
            f'python tools/benchmark/{name}.py OUT_DIR --rounds '
            f'{options.rounds} --seed {options.seed}{only}{options.given}'
        ),
        'environment': environment(),
        'cases': cases,
    }
    # A part is not to replace the whole.
    part = '--part' if options.only else ''
    stem = options.out_dir / f'{name}--{options.device}{part}'
    for case, (baseline, measure) in chosen.items():
        rows = measure()
        cases.append({'name': case, 'baseline': baseline, 'rows': rows})
        shown = (f'{row["contender"]} {brief(row)}' for row in rows)
        print(f'{case}: {", ".join(shown)}', flush=True)
        left = list(chosen)[len(cases) :]
        # What is there is kept if a later case is stopped.
        whole = result | (derive(cases) if derive else {})
        whole |= {'not_run': left} if left else {}
        check(whole)
        text = json.dumps(whole, indent=1) + '\n'
        write_text(stem.with_suffix('.json'), text)
    rows = [row for case in cases for row in case['rows']]
    if len(cases) > 1 and any('ratio' in row for row in rows):
        draw(whole, stem.with_suffix('.png'))


def brief(row: Row) -> str:
    """A ratio, or why there is none."""
    if 'error' in row:
        return 'error'
    if 'ratio' not in row:
        return f'{row["ms"]:.1f} ms'
    return f'{row["ratio"]:.2f}'


def environment() -> dict[str, Any]:
    """Return versions and machine, which the figures depend on."""
    gpu = torch.cuda.is_available()
    return {
        **versions('torch', 'triton', 'mmcv', 'timm', 'ws_mm'),
        'python': platform.python_version(),
        'device': torch.cuda.get_device_name() if gpu else cpu_name(),
        'threads': torch.get_num_threads(),
        'load': os.getloadavg()[0],
    }


def cpu_name() -> str:
    """The processor as the kernel names it."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def check(result: dict[str, Any]) -> None:
    """Reject a result that does not describe itself.

    Raises:
        ValueError: something is missing; the message names it.
    """
    needed = ('schema', 'suite', 'what', 'command', 'environment', 'cases')
    for key in needed:
        if key not in result:
            raise ValueError(f'the result lacks {key!r}')
    if result['schema'] != SCHEMA:
        raise ValueError(
            f'schema={result["schema"]!r} is not {SCHEMA}: measure again '
            f'with {result["command"]!r}'
        )
    for case in result['cases']:
        contenders = [row['contender'] for row in case['rows']]
        if case['baseline'] not in contenders:
            raise ValueError(f'{case["name"]!r} lacks its baseline')
        for row in case['rows']:
            if 'error' not in row and not set(row) >= TIMES:
                raise ValueError(f'a row of {case["name"]!r} lacks a time')
