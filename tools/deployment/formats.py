"""Write a network as ONNX or as a torch.export program, and run the file."""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from support import models
from support.checks import SetupError
from torch import Tensor, nn

OPSET = 18
# torch.export distinguishes a feature map of one row from larger ones. The
# smallest image that leaves more than one row at stride 64, FPN's coarsest.
SMALLEST = 65


def write_onnx(
    network: nn.Module,
    image: Tensor,
    names: list[str],
    notes: dict[str, str],
    path: str,
    fixed: bool = False,
) -> None:
    """Write ONNX with free batch, height and width.

    By torch's exporter that traces (``dynamo=False``). The one of torch 2.10
    that starts from torch.export gives the same operators, needs a minute
    instead of seconds for a ResNet-18, and takes no image below 65 pixels.

    Args:
        network: Network to write.
        image: example of its input.
        names: Names of its outputs.
        notes: Metadata of the file.
        path: New file.
        fixed: Keep height and width of the image.

    Raises:
        SetupError: an operator is not of ONNX itself.
    """
    import onnx

    free: dict[str, dict[int, str]] = {'image': {0: 'batch'}}
    free |= {name: {0: 'batch'} for name in names}
    if not fixed:
        free['image'] |= {2: 'height', 3: 'width'}
        for name in names:
            free[name] |= {2: f'{name}_height', 3: f'{name}_width'}
    # The exporter prints all of the graph before it raises.
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        _exportable(),
    ):
        # That the exporter is the older one, and that sizes in messages of
        # the host become constants.
        warnings.simplefilter('ignore')
        try:
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
        # One class per version of torch.
        except Exception as error:
            raise SetupError(
                'ONNX has no form of an operation of this model, or not with '
                f'free sizes: {models.first_line(error)}. Nothing was '
                f'written. {instead("OUT.pt2", fixed)}'
            ) from error
    content = onnx.load(path)
    foreign = {node.op_type for node in content.graph.node if node.domain}
    if foreign or content.functions:
        raise SetupError(
            f'The model has operators that are not of ONNX: '
            f'{", ".join(sorted(foreign))}. Nothing was written. Only the '
            'host runs them: bake the model instead '
            '(tools/deployment/bake.py), or train it without them '
            '(dcn=None for deformable convolutions).'
        )
    onnx.helper.set_model_props(content, notes)
    onnx.checker.check_model(content, full_check=True)
    onnx.save(content, path)


def instead(other: str, fixed: bool) -> str:
    """Advise the other file format, or a fixed size."""
    size = '' if fixed else ', or keep the size: --size HEIGHT WIDTH'
    return f'Write the other form instead ({other}){size}.'


def write_program(
    network: nn.Module,
    image: Tensor,
    notes: dict[str, str],
    path: str,
    divisor: int = 1,
    fixed: bool = False,
) -> None:
    """Write a torch.export program with free batch, height and width.

    Args:
        network: Network to write.
        image: example of its input.
        notes: Content of ``notes.json`` in the file.
        path: New file.
        divisor: Divisor of height and width, in pixels.
        fixed: Keep height and width of the image.

    Raises:
        SetupError: the model cannot be written so; its error is named.
    """
    dim = torch.export.Dim
    least = -(-SMALLEST // divisor)
    try:
        free = {0: dim('batch', min=1)}
        if not fixed:
            for axis, name in ((2, 'height'), (3, 'width')):
                free[axis] = dim(name, min=least)
                if divisor > 1:
                    free[axis] = divisor * free[axis]
        with torch.no_grad(), _exportable():
            program = torch.export.export(
                network, (image,), dynamic_shapes=(free,), strict=False
            )
    # One class per version of torch and per part of its compiler.
    except Exception as error:
        raise SetupError(
            'torch.export cannot keep the sizes of this model free: '
            f'{models.first_line(error)}. Nothing was written. '
            f'{instead("OUT.onnx", fixed)}'
        ) from error
    files = {'notes.json': json.dumps(notes)}
    torch.export.save(program, path, extra_files=files)


@contextmanager
def _exportable() -> Iterator[None]:
    """Keep torch and mmseg from making constants of the example's sizes."""
    import torch._meta_registrations as meta

    undo: list[tuple[Any, str, Any]] = []
    pool = torch.nn.functional.adaptive_avg_pool2d
    undo.append((torch.nn.functional, 'adaptive_avg_pool2d', pool))
    torch.nn.functional.adaptive_avg_pool2d = _pool
    if hasattr(meta, 'div_rtn'):
        # It asks for the sign of the remainder, and so ties every pooling to
        # an odd or an even size. Python's // rounds down already.
        undo.append((meta, 'div_rtn', meta.div_rtn))
        meta.div_rtn = lambda x, y: x // y
    try:
        from mmseg.models.utils.wrappers import Upsample, resize
    except ImportError:
        pass
    else:
        forward = Upsample.forward

        def upsample(layer: Any, x: Tensor) -> Tensor:
            factor = layer.scale_factor
            if layer.size or int(factor) != factor:
                return forward(layer, x)
            # The host's int(pixels * 2.0) would become a constant.
            size = [pixels * int(factor) for pixels in x.shape[-2:]]
            return resize(x, size, None, layer.mode, layer.align_corners)

        undo.append((Upsample, 'forward', forward))
        Upsample.forward = upsample
        # Its last argument, warning=True, compares the sizes for a hint.
        undo.append((resize, '__defaults__', resize.__defaults__))
        resize.__defaults__ = (*resize.__defaults__[:-1], False)
    try:
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


def _pool(x: Tensor, size: Any) -> Tensor:
    """Adaptive average pooling of any size, as products of matrices.

    ONNX has a pooling to one pixel only, and those whose windows are alike.
    """
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    if high == 1 and wide == 1:
        return x.mean((-2, -1), keepdim=True)
    if high is not None:
        x = _windows(x.shape[-2], high, x) @ x
    if wide is not None:
        x = x @ _windows(x.shape[-1], wide, x).transpose(0, 1)
    return x


def _windows(pixels: int, count: int, like: Tensor) -> Tensor:
    """The share that each pixel has in each window, ``(count, pixels)``."""
    window = torch.arange(count, device=like.device)
    start = window * pixels // count
    stop = ((window + 1) * pixels + count - 1) // count
    place = torch.arange(pixels, device=like.device)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    return inside.to(like.dtype) / (stop - start)[:, None].to(like.dtype)


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
