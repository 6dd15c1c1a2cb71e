r"""Print the AP of dumped predictions with more digits than mmdet does.

    python tools/analysis_tools/coco_ap.py ANNOTATIONS \
        PREFIX.bbox.json [PREFIX.segm.json ...]

Predictions are written by mmdet, with ws_mm or without, where its test script
is called with --cfg-options test_evaluator.outfile_prefix=PREFIX. mmdet
rounds AP to three digits; here are six, by the same pycocotools.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checks, launch
from support.checks import SetupError

FIGURES = ('AP', 'AP50', 'AP75', 'AP small', 'AP medium', 'AP large')


def parse_args() -> argparse.Namespace:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('annotations', help='of the data set, COCO format')
    parser.add_argument(
        'predictions', nargs='+', help='file ending in .bbox.json, .segm.json'
    )
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='those of the model, if they are not all of the file (metainfo)',
    )
    return parser.parse_args()


def read(path: str) -> list | dict:
    """Read a file of JSON.

    Raises:
        SetupError: it is missing or none.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except FileNotFoundError as error:
        hint = checks.did_you_mean(path, '*.json')
        raise SetupError(f'No file {path}.{hint}') from error
    except (OSError, ValueError) as error:
        raise SetupError(f'{path} cannot be read as JSON: {error}') from error


def average_precision(
    annotations: str, predictions: str, classes: Sequence[str] | None = None
) -> list[float]:
    """The figures of one file of predictions, over all images.

    Args:
        annotations: file of the data set.
        predictions: file of boxes or of masks.
        classes: names of categories; None takes all of the data set.

    Raises:
        SetupError: a file is missing or not what it should be, or a class
            is not in the data set.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kind = predictions.removesuffix('.json').rpartition('.')[2]
    if kind not in ('bbox', 'segm'):
        raise SetupError(
            f'{predictions}: the name must end with .bbox.json or .segm.json, '
            'as mmdet names what it writes.'
        )
    found = read(predictions)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) for one in found
    ):
        raise SetupError(f'{predictions} is no list of detections.')
    content = read(annotations)
    try:
        known = [one['name'] for one in content['categories']]
    except (TypeError, KeyError) as error:
        raise SetupError(
            f'{annotations} has no categories with names: it is no file of '
            'COCO annotations.'
        ) from error
    if unknown := [name for name in classes or () if name not in known]:
        raise SetupError(
            f'--classes {unknown[0]}: the categories of {annotations} are '
            f'{", ".join(known)}.'
        )
    if not found:
        raise SetupError(f'{predictions} is empty: nothing was detected.')
    if kind == 'segm':
        # As mmdet does: the area is that of the mask, not of the box.
        for one in found:
            one.pop('bbox', None)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            truth = COCO(annotations)
            judge = COCOeval(truth, truth.loadRes(found), kind)
        # Whatever pycocotools may raise of other content.
        except Exception as error:
            raise SetupError(
                f'{predictions} does not belong to {annotations}: '
                f'{type(error).__name__}: {error}'
            ) from error
        if classes:
            judge.params.catIds = truth.getCatIds(catNms=list(classes))
        # mmdet's proposal_nums, of which AP is at 100, the rest at 1000.
        judge.params.maxDets = [100, 300, 1000]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [float(value) for value in judge.stats[: len(FIGURES)]]


def main() -> None:
    """Print one row per file."""
    args = parse_args()
    rows = [
        (path, average_precision(args.annotations, path, args.classes))
        for path in args.predictions
    ]
    print('| predictions | ' + ' | '.join(FIGURES) + ' |')
    print('|---' * (len(FIGURES) + 1) + '|')
    for path, figures in rows:
        cells = ' | '.join(f'{value:.6f}' for value in figures)
        print(f'| {path} | {cells} |')


if __name__ == '__main__':
    launch.run(main)
