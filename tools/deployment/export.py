"""Write a model as ONNX (OUT.onnx) or as a torch.export program (OUT.pt2).

Exports the backbone and neck of an mmdet detector, all of an mmseg segmentor
or an mmpretrain classifier up to the logits, or a bare backbone. Weights are
standardized once. BCN is folded into the convolution before it and a GroupNorm
if that is proven exact for every BCN; if not, all of them become plain
operations. Batch, height and width stay free; height and width may have to be
multiples of a divisor, which is found and printed. The input is the output of
the data_preprocessor, whose settings are in the file. Running the file needs
no ws_mm.
"""

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from mmengine.config import Config
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deployment import bake, formats
from support import checks, files, launch, models
from support.checks import SetupError

Size: TypeAlias = tuple[int, int, int]
# Of the largest value of each output, against the model as it was.
TOLERANCE = 1e-4
# Batch, height, width: the example, then odd, wide, small and several.
SIZES: tuple[Size, ...] = (
    *((2, 96, 128), (1, 128, 128), (3, 65, 97)),
    *((1, 131, 77), (1, 72, 320)),
)
# What heights and widths may have to be multiples of.
DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
# Pixels added where the sizes above are too small for a model.
LARGER = (0, 448)
PREPROCESSING = (
    'mean',
    'std',
    'bgr_to_rgb',
    'rgb_to_bgr',
    'to_rgb',
    'pad_size_divisor',
    'size',
    'size_divisor',
    'pad_val',
    'pad_value',
)


class Features(nn.Module):
    """Backbone and neck of a detector, or a backbone alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Of trackers and of semi-supervised detectors the detector.
        for name in ('detector', 'teacher'):
            model = getattr(model, name, model)
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        features = self.backbone(image)
        return tuple(self.neck(features) if self.neck else features)

    def names(self, count: int) -> list[str]:
        """Return the names of the outputs."""
        return [f'feature{index}' for index in range(count)]


class Logits(nn.Module):
    """All of a segmentor or a classifier, up to the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Auxiliary heads run in training only.
        if getattr(model, 'auxiliary_head', None) is not None:
            self.model.auxiliary_head = None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        if not hasattr(self.model, 'encode_decode'):
            return (self.model(image),)
        meta = dict(img_shape=image.shape[2:])
        return (self.model.encode_decode(image, [meta]),)

    def names(self, count: int) -> list[str]:
        """Return the name of the output."""
        return ['logits']


def parse_args() -> argparse.Namespace:
    """Command line of exporting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of that config')
    parser.add_argument('out', help='new file, *.onnx or *.pt2')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images in pixels, where they cannot stay free',
    )
    launch.add_common_options(parser)
    return parser.parse_args()


def deployable(cfg: Config, model: nn.Module) -> Features | Logits:
    """The part of a model that is exported, in eval mode.

    Raises:
        SetupError: it is of none of these packages.
    """
    scope = cfg.get('default_scope')
    if (scope == 'mmseg' and hasattr(model, 'encode_decode')) or (
        scope == 'mmpretrain' and hasattr(model, 'head')
    ):
        return Logits(model).eval()
    if scope in launch.HOSTS:
        return Features(model).eval()
    raise SetupError(
        f'default_scope = {scope!r}: models of mmdet, mmseg and mmpretrain '
        'can be exported. In Python, ws_mm.bake(model, inputs, '
        'fold_estimates=True) makes plain layers of any model, which '
        'torch.onnx.export takes.'
    )


def plain(network: nn.Module, image: Tensor) -> tuple[nn.Module, str]:
    """Replace what is of ws_mm; also say what became of its norms."""
    import ws_mm
    from ws_mm.running_statistics import RunningStatistics

    kinds = Counter(
        type(layer).__name__
        for layer in network.modules()
        if isinstance(layer, RunningStatistics)
    )
    try:
        folded = ws_mm.bake(network, image, fold_estimates=True)
    except ValueError as error:
        stays = ', '.join(kinds)
        return ws_mm.bake(network), f'{stays} stays plain operations: {error}'
    what = ', '.join(f'{count} {kind}' for kind, count in kinds.items())
    what = what or '0 norms'
    return folded, f'{what} folded into the convolutions before them'


def fitting_sizes(
    network: nn.Module, asked: Sequence[int] | None = None
) -> tuple[tuple[Size, ...], int]:
    """Sizes that a network takes, found by trying, and their divisor.

    Args:
        network: Network to export.
        asked: height and width in pixels, the only ones of interest.

    Raises:
        SetupError: it takes none that was tried.
    """
    if asked:
        choices = [(tuple((n, *asked) for n in (2, 1, 3)), 1)]
    else:
        choices = [
            (
                tuple(
                    (batch, _multiple(high, divisor), _multiple(wide, divisor))
                    for batch, high, wide in (
                        (n, h + more, w + more) for n, h, w in SIZES
                    )
                ),
                divisor,
            )
            for more in LARGER
            for divisor in DIVISORS
        ]
    for sizes, divisor in choices:
        try:
            with torch.no_grad():
                # The odd ones first: they fail soonest.
                for size in reversed(sizes):
                    network(models.random_image(network, *size, seed=1))
        # Whatever the code of a model may raise.
        except Exception as error:
            reason = error
        else:
            return sizes, divisor
    tried = f'{asked[0]} x {asked[1]}' if asked else 'any size that was tried'
    raise SetupError(
        f'The model does not run on images of {tried}: '
        f'{models.first_line(reason)}. '
        + ('Give another --size.' if asked else 'Give --size HEIGHT WIDTH.')
    ) from reason


def _multiple(pixels: int, divisor: int) -> int:
    return -(-pixels // divisor) * divisor


def differences(
    network: nn.Module, path: str, sizes: Sequence[Size]
) -> Iterator[tuple[Size, float]]:
    """Compare a file with the model on random images of several sizes.

    A file that does not run at a size is infinitely far off.
    """
    run = formats.runner_of(path)
    for size in sizes:
        image = models.random_image(network, *size, seed=1)
        with torch.no_grad():
            expected = network(image)
            try:
                actual = run(image)
            # onnxruntime and torch have a class for each of their parts.
            except Exception:
                actual = []
        yield size, bake.largest_difference(list(expected), list(actual))


def notes_of(cfg: Config, config: str) -> dict[str, str]:
    """Return the notes on the input that go into the file."""
    # mmpretrain's configs have it beside the model.
    places = (cfg.model, cfg)
    found = (place.get('data_preprocessor') for place in places)
    settings = dict(next(filter(None, found), {}))
    settings = {
        key: settings[key]
        for key in PREPROCESSING
        if settings.get(key) is not None
    }
    return dict(
        config=Path(config).name,
        preprocessing=json.dumps(settings, default=list),
    )


def check_out(path: str) -> None:
    """See that the file can be written and checked.

    Raises:
        SetupError: another ending, a missing package, an unwritable folder.
    """
    if not path.endswith(('.onnx', '.pt2')):
        raise SetupError(
            f'OUT {path}: the name must end with .onnx (ONNX) or .pt2 '
            '(torch.export).'
        )
    if path.endswith('.onnx'):
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise SetupError(
                f'ONNX needs {error.name}: pip install -e ".[export]", or '
                'write a torch.export program (OUT.pt2).'
            ) from error
    elif not hasattr(torch, 'export') or not hasattr(torch.export, 'Dim'):
        raise SetupError(
            f'OUT {path}: this torch ({torch.__version__}) keeps no size '
            'free in a .pt2 file. Install torch 2.2 or newer, or write ONNX '
            '(OUT.onnx, pip install onnx onnxruntime).'
        )
    folder = os.path.dirname(os.path.abspath(path))
    checks.check_writable(folder, 'OUT')


def main() -> None:
    """Make plain, write, compare, and only then keep."""
    args = parse_args()
    check_out(args.out)
    # The host's hint about sizes of images.
    warnings.filterwarnings('ignore', 'When align_corners')
    cfg = launch.load_config(args, ('model',))
    model = models.build_model(cfg)
    bake.load_strictly(model, args.checkpoint)
    network = deployable(cfg, model)
    sizes, divisor = fitting_sizes(network, args.size)
    image = models.random_image(network, *sizes[0], seed=1)
    with torch.no_grad():
        outputs, again = network(image), network(image)
    if not bake.largest_difference(outputs, again) <= TOLERANCE:
        raise SetupError(
            'The model computes something else each time that it runs: it '
            'draws random numbers, as the decode head of SegNeXt does. No '
            'file can be compared with it, so none was written.'
        )
    names = network.names(len(outputs))
    new, told = plain(network, image)
    notes = notes_of(cfg, args.config) | dict(divisor=str(divisor))
    if args.size:
        notes['size'] = json.dumps(args.size)
    fixed = bool(args.size)
    found: dict[Size, float] = {}
    with files.replacing(args.out) as part:
        path = str(part)
        if path.endswith('.onnx'):
            formats.write_onnx(new, image, names, notes, path, fixed)
        else:
            formats.write_program(new, image, notes, path, divisor, fixed)
        for size, difference in differences(network, path, sizes):
            print(f'{_spelt(size)}: {difference:.1e}')
            found[size] = difference
        check_differences(found, path, fixed)
    print(f'{told}; outputs: {", ".join(names)}')
    print(
        f'Outputs differ by at most {max(found.values()):.1e} of the largest '
        f'value, over {len(sizes)} sizes (batch x height x width). '
        + (
            f'Images must be of {args.size[0]} x {args.size[1]} pixels.'
            if fixed
            else f'Height and width must be multiples of {divisor}.'
            if divisor > 1
            else 'Height and width are free.'
        )
    )
    print(args.out)


def _spelt(size: Size) -> str:
    return ' x '.join(map(str, size))


def check_differences(
    found: dict[Size, float], path: str, fixed: bool
) -> None:
    """See that a file computes what the model does at every size.

    Args:
        found: largest relative difference by size, the example's first.
        path: File.
        fixed: True if height and width are fixed.

    Raises:
        SetupError: it does not.
    """
    wrong = [size for size, one in found.items() if not one <= TOLERANCE]
    if not wrong:
        return
    example = next(iter(found))
    if example not in wrong:
        other = 'OUT.pt2' if path.endswith('.onnx') else 'OUT.onnx'
        raise SetupError(
            'Sizes of the example became constants: the file is right at '
            f'{_spelt(example)} (batch x height x width) and wrong at '
            f'{", ".join(map(_spelt, wrong))}; nothing was written. '
            f'{formats.instead(other, fixed)}'
        )
    raise SetupError(
        'The exported model computes something else (largest relative '
        f'difference {max(found.values()):.1e}, accepted {TOLERANCE:.0e}); '
        'nothing was written.'
    )


if __name__ == '__main__':
    launch.run(main)
