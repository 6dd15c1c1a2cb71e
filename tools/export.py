"""Write a model as ONNX (OUT.onnx) or as a torch.export program (OUT.pt2).

Of an mmdet detector the backbone and the neck, of an mmseg segmentor all up
to the logits, of a config of a bare backbone that. Weights are standardized
once and for all; BCN becomes the convolution before it and a GroupNorm where
that is proven exact, and plain operations elsewhere. Batch, height and width
stay free. The input is what the data_preprocessor makes of an image; its
settings are in the file. Nothing of ws_mm is needed to run it.
"""

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bake
import checks
import launch
import models
import torch
from checks import SetupError
from mmengine.config import Config
from torch import Tensor, nn

# Of the largest value of each output, against the model as it was.
TOLERANCE = 1e-4
OPSET = 18
# Batch, height, width: the example, then odd, wide, small and several.
SIZES = ((2, 96, 128), (1, 128, 128), (3, 65, 97), (1, 131, 77), (1, 72, 320))
# torch.export distinguishes a feature map of one row from larger ones. The
# smallest image that leaves more than one row at stride 64, FPN's coarsest.
SMALLEST = 65
PREPROCESSING = (
    'mean',
    'std',
    'bgr_to_rgb',
    'rgb_to_bgr',
    'pad_size_divisor',
    'size',
    'size_divisor',
    'pad_val',
)


class Features(nn.Module):
    """Backbone and neck of a detector, or a backbone alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        features = self.backbone(image)
        return tuple(self.neck(features) if self.neck else features)

    def names(self, count: int) -> list[str]:
        """What the outputs are called."""
        return [f'feature{index}' for index in range(count)]


class Logits(nn.Module):
    """All of a segmentor, up to logits at the size of the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Auxiliary heads run in training only.
        if getattr(model, 'auxiliary_head', None) is not None:
            self.model.auxiliary_head = None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        meta = dict(img_shape=image.shape[2:])
        return (self.model.encode_decode(image, [meta]),)

    def names(self, count: int) -> list[str]:
        """What the output is called."""
        return ['logits']


def parse_args() -> argparse.Namespace:
    """Command line of exporting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file of that config')
    parser.add_argument('out', help='new file, *.onnx or *.pt2')
    launch.add_common_options(parser)
    return parser.parse_args()


def deployable(cfg: Config, model: nn.Module) -> Features | Logits:
    """The part of a model that is exported, in eval mode.

    Raises:
        SetupError: it is neither of mmdet nor of mmseg.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmseg' and hasattr(model, 'encode_decode'):
        return Logits(model).eval()
    if scope in ('mmdet', 'mmseg'):
        return Features(model).eval()
    raise SetupError(
        f'default_scope = {scope!r}: models of mmdet and mmseg can be '
        'exported. In Python, ws_mm.bake(model, inputs, fold_estimates=True) '
        'makes plain layers of any model, which torch.onnx.export takes.'
    )


def plain(network: nn.Module, image: Tensor) -> tuple[nn.Module, str]:
    """Replace what is of ws_mm; also say what became of BCN."""
    import ws_mm

    count = sum(isinstance(layer, ws_mm.BCN) for layer in network.modules())
    try:
        folded = ws_mm.bake(network, image, fold_estimates=True)
    except ValueError as error:
        return ws_mm.bake(network), f'BCN stays plain operations: {error}'
    return folded, f'{count} BCN folded into the convolutions before them'


def write_onnx(
    network: nn.Module,
    image: Tensor,
    names: list[str],
    notes: dict[str, str],
    path: str,
) -> None:
    """Write ONNX with free batch, height and width.

    By torch's exporter that traces (``dynamo=False``). The one of torch 2.10
    that starts from torch.export gives the same operators, needs a minute
    instead of seconds for a ResNet-18, and takes no image below 65 pixels.

    Args:
        network: to write.
        image: example of its input.
        names: of its outputs.
        notes: become metadata of the file.
        path: of the new file.

    Raises:
        SetupError: an operator is not of ONNX itself.
    """
    import onnx

    axes = {0: 'batch', 2: 'height', 3: 'width'}
    free: dict[str, dict[int, str]] = {'image': axes}
    for name in names:
        free[name] = {0: 'batch', 2: f'{name}_height', 3: f'{name}_width'}
    with warnings.catch_warnings():
        # That the exporter is the older one, and that sizes in messages of
        # the host become constants.
        warnings.simplefilter('ignore')
        torch.onnx.export(
            network,
            (image,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=['image'],
            output_names=names,
            dynamic_axes=free,
        )
    content = onnx.load(path)
    foreign = {node.op_type for node in content.graph.node if node.domain}
    if foreign or content.functions:
        raise SetupError(
            f'The model has operators that are not of ONNX: '
            f'{", ".join(sorted(foreign))}. Nothing was written.'
        )
    onnx.helper.set_model_props(content, notes)
    onnx.checker.check_model(content, full_check=True)
    onnx.save(content, path)


def write_program(
    network: nn.Module, image: Tensor, notes: dict[str, str], path: str
) -> None:
    """Write a torch.export program with free batch, height and width.

    Args:
        network: to write.
        image: example of its input.
        notes: go into the file as ``notes.json``.
        path: of the new file.

    Raises:
        SetupError: a size would be a constant.
    """
    dim = torch.export.Dim
    free = {
        0: dim('batch', min=1),
        2: dim('height', min=SMALLEST),
        3: dim('width', min=SMALLEST),
    }
    try:
        with torch.no_grad(), _free_sizes():
            program = torch.export.export(
                network, (image,), dynamic_shapes=(free,), strict=False
            )
    except (torch._dynamo.exc.UserError, RuntimeError) as error:
        raise SetupError(
            f'torch.export cannot keep the sizes of this model free: '
            f'{str(error)[:500]} Write ONNX instead (OUT.onnx).'
        ) from error
    files = {'notes.json': json.dumps(notes)}
    torch.export.save(program, path, extra_files=files)


@contextmanager
def _free_sizes() -> Iterator[None]:
    """Keep torch and mmseg from asking what the example's sizes are."""
    import torch._meta_registrations as meta

    undo = []
    if hasattr(meta, 'div_rtn'):
        # It asks for the sign of the remainder, and so ties every pooling to
        # an odd or an even size. Python's // rounds down already.
        undo.append((meta, 'div_rtn', meta.div_rtn))
        meta.div_rtn = lambda x, y: x // y
    try:
        from mmseg.models.utils.wrappers import resize
    except ImportError:
        pass
    else:
        # Its last argument, warning=True, compares the sizes for a hint.
        undo.append((resize, '__defaults__', resize.__defaults__))
        resize.__defaults__ = (*resize.__defaults__[:-1], False)
    try:
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


def runner_of(path: str) -> Any:
    """A function that runs what was written, as its users will."""
    if path.endswith('.pt2'):
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider']
    )

    def run(image: Tensor) -> list[Tensor]:
        outputs = session.run(None, {'image': image.numpy()})
        return [torch.from_numpy(values) for values in outputs]

    return run


def differences(
    network: nn.Module, path: str, sizes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Compare a file with the model on random images of several sizes."""
    run = runner_of(path)
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in sizes:
        image = torch.randn(batch, 3, height, width, generator=generator)
        with torch.no_grad():
            expected, actual = network(image), run(image)
        yield (
            (batch, height, width),
            bake.largest_difference(list(expected), list(actual)),
        )


def notes_of(cfg: Config, config: str) -> dict[str, str]:
    """What whoever runs the file has to know about its input."""
    settings = dict(cfg.model.get('data_preprocessor') or {})
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
    image = torch.randn(SIZES[0][0], 3, *SIZES[0][1:])
    with torch.no_grad():
        names = network.names(len(network(image)))
    new, told = plain(network, image)
    notes = notes_of(cfg, args.config)
    folder, name = os.path.split(os.path.abspath(args.out))
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=folder, prefix='.writing-') as made:
        path = os.path.join(made, name)
        if path.endswith('.onnx'):
            write_onnx(new, image, names, notes, path)
        else:
            write_program(new, image, notes, path)
        for size, difference in differences(network, path, SIZES):
            print(f'{" x ".join(map(str, size))}: {difference:.1e}')
            worst = max(worst, difference)
        if not worst <= TOLERANCE:
            raise SetupError(
                'The exported model computes something else (largest '
                f'relative difference {worst:.1e}, accepted '
                f'{TOLERANCE:.0e}); nothing was written.'
            )
        os.replace(path, args.out)
    print(f'{told}; outputs: {", ".join(names)}')
    print(
        f'Outputs differ by at most {worst:.1e} of the largest value, over '
        f'{len(SIZES)} sizes (batch x height x width).'
    )
    print(args.out)


if __name__ == '__main__':
    launch.run(main)
