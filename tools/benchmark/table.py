"""Print a benchmark result as the Markdown table that README.md shows.

python tools/benchmark/table.py tools/benchmark/results/layers--cpu.json
"""

import argparse
import json
from pathlib import Path
from typing import Any


def cell(row: dict[str, Any] | None) -> str:
    """A ratio, or why there is none."""
    if row is None:
        return ''
    return 'error' if 'error' in row else f'{row["ratio"]:.2f}'


def table(result: dict[str, Any]) -> str:
    """One table for each baseline of the result."""
    blocks = []
    for baseline in dict.fromkeys(c['baseline'] for c in result['cases']):
        cases = [c for c in result['cases'] if c['baseline'] == baseline]
        names = [
            row['contender']
            for row in cases[0]['rows']
            if row['contender'] != baseline
        ]
        lines = [
            f'| time over {baseline} | ' + ' | '.join(names) + ' |',
            '|---' * (len(names) + 1) + '|',
        ]
        for case in cases:
            rows = {row['contender']: row for row in case['rows']}
            cells = (cell(rows.get(name)) for name in names)
            lines.append(f'| {case["name"]} | ' + ' | '.join(cells) + ' |')
        blocks.append('\n'.join(lines))
    return '\n\n'.join(blocks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('result', type=Path)
    print(table(json.loads(parser.parse_args().result.read_text())))


if __name__ == '__main__':
    main()
