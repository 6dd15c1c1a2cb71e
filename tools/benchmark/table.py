"""Print a benchmark result as the Markdown table that documents show.

python tools/benchmark/table.py tools/benchmark/results/layers--cpu.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.result import brief, check


def table(result: dict[str, Any]) -> str:
    """One table for each baseline and set of contenders of the result."""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for case in result['cases']:
        baseline = case['baseline']
        rows = {row['contender']: row for row in case['rows']}
        key = baseline, *(name for name in rows if name != baseline)
        if key not in blocks:
            blocks[key] = [
                f'| time over {baseline} | ' + ' | '.join(key[1:]) + ' |',
                '|---' * len(key) + '|',
            ]
        cells = (brief(rows[name]) for name in key[1:])
        blocks[key].append(f'| {case["name"]} | ' + ' | '.join(cells) + ' |')
    return '\n\n'.join('\n'.join(lines) for lines in blocks.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('result', type=Path)
    path = parser.parse_args().result
    try:
        result = json.loads(path.read_text())
        check(result)
    except (OSError, ValueError, TypeError) as error:
        parser.error(f'{path} is no result of a benchmark: {error}')
    print(table(result))


if __name__ == '__main__':
    main()
