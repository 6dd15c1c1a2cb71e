"""Check which norm follows each convolution of a built model.

The model runs, and every tensor operation that reads the output of a
convolution is noted with the layer that ran it. This proves what normalizes
the convolution for these inputs. Without inputs, and for layers that they do
not reach, names and order give a guess.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .compat import tree_leaves
from .replacement import BATCH_NORMS, standardizes
from .restoring import restored
from .running_statistics import RunningStatistics

# A tensor, positional or named arguments of the model's forward, or a
# function that runs the model.
Inputs: TypeAlias = (
    Tensor
    | tuple[Any, ...]
    | Mapping[str, Any]
    | Callable[[nn.Module], Any]
    | None
)
CONVS = nn.modules.conv._ConvNd
CONVOLUTION = 'convolution.default'
NORMS = (
    BATCH_NORMS,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    RunningStatistics,
)
# A norm behind these operations still removes the scale of the convolution.
# Names without underscores at either end.
SCALE_KEEPING = frozenset(
    'adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d '
    'adaptive_max_pool3d add alias avg_pool2d avg_pool3d cat clone '
    'constant_pad_nd detach expand leaky_relu max_pool2d_with_indices '
    'max_pool3d_with_indices mean permute pixel_shuffle pixel_unshuffle '
    'prelu_kernel reflection_pad1d reflection_pad2d reflection_pad3d '
    'relu replication_pad1d replication_pad2d replication_pad3d select '
    'slice split split_with_sizes squeeze stack to_copy transpose '
    'unbind unsafe_view unsqueeze upsample_bicubic2d '
    'upsample_bilinear2d upsample_linear1d upsample_nearest1d '
    'upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d '
    'upsample_nearest_exact2d upsample_nearest_exact3d '
    'upsample_trilinear3d view'.split()
)


@dataclass(frozen=True)
class ConvReport:
    """One convolution and what reads its output.

    Attributes:
        name: path of the module.
        kind: class name.
        standardized: whether its weight is standardized.
        norms: names of the norms that follow.
        norm_kinds: class names of these norms.
        via: operations between the convolution and its norms.
        others: other readers of its output, when proven.
        how: 'proven' by execution, or 'guessed' from names and order.
        mistake: the problem and its fix, or ''.
    """

    name: str
    kind: str
    standardized: bool
    norms: tuple[str, ...]
    norm_kinds: tuple[str, ...]
    via: tuple[str, ...]
    others: tuple[str, ...]
    how: str
    mistake: str = ''


class Report(list[ConvReport]):
    """One :class:`ConvReport` per convolution; printed, it is a table."""

    @property
    def mistakes(self) -> list[str]:
        """Messages, one for each convolution that is wrong."""
        return [conv.mistake for conv in self if conv.mistake]

    def __str__(self) -> str:
        rows = [('convolution', 'type', 'WS', 'normalized by', 'known')]
        for conv in self:
            norms = ', '.join(
                f'{name} ({kind})'
                for name, kind in zip(conv.norms, conv.norm_kinds, strict=True)
            )
            if norms and conv.via:
                norms += f' after {", ".join(conv.via)}'
            if conv.others:
                norms = f'{norms or "-"}; goes to {", ".join(conv.others)}'
            ws = 'yes' if conv.standardized else '-'
            rows.append((conv.name, conv.kind, ws, norms or '-', conv.how))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return '\n'.join(
            '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows
        )


def check(model: nn.Module, inputs: Inputs = None) -> Report:
    """Report for every convolution which norm follows, and what is wrong.

    For convolutions that ``inputs`` reach, the report is proven: it lists
    the norms that read the output, directly or behind operations that keep
    its scale (ReLU, pooling, resizing, sums, concatenation), and all other
    readers. For the rest it is guessed: a sibling norm of the same number
    (``conv2``, ``bn2``), or the next sibling norm before any other
    convolution, if its channels fit. A standardized convolution is a mistake
    if no norm follows, or if another operation reads its output, too.

    Args:
        model: any model. It runs once, in eval mode, without gradients, and
            is left as it was.
        inputs: a tensor, a tuple of arguments, a dict of named arguments, a
            function that takes the model and runs it, or None. For layers
            that only run in training: ``lambda model: model.train()(x)``.
    """
    trace = Trace() if inputs is None else run_traced(model, inputs)
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    report = Report()
    for name, module in modules.items():
        if not isinstance(module, CONVS):
            continue
        found = trace.norms.get(module, {})
        others = tuple(sorted(trace.others.get(module, ())))
        how = 'proven' if module in trace.ran else 'guessed'
        if how == 'guessed':
            found = dict.fromkeys(_guess_norm(modules, name), ())
        standardized = standardizes(module)
        mistake = ''
        if standardized and (others or not found):
            mistake = _mistake(modules, name, bool(found), others, how)
        report.append(
            ConvReport(
                name,
                type(module).__name__,
                standardized,
                tuple(names[norm] for norm in found),
                tuple(type(norm).__name__ for norm in found),
                tuple({op: None for path in found.values() for op in path}),
                others,
                how,
                mistake,
            )
        )
    return report


@dataclass
class Trace:
    """Readers of the outputs of convolutions.

    Attributes:
        ran: convolutions that ran.
        norms: norms that read each convolution, and the operations between.
        others: other readers of each convolution.
        feeders: convolutions that fed each norm directly; None for the rest.
        sizes: spatial sizes that each norm ran on.
    """

    ran: set[nn.Module] = field(default_factory=set)
    norms: dict[nn.Module, dict[nn.Module, tuple[str, ...]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    others: dict[nn.Module, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )
    feeders: dict[nn.Module, set[nn.Module | None]] = field(
        default_factory=lambda: defaultdict(set)
    )
    sizes: dict[nn.Module, set[torch.Size]] = field(
        default_factory=lambda: defaultdict(set)
    )


class _Watch(TorchDispatchMode):
    """Follow the outputs of convolutions through every operation."""

    def __init__(
        self, names: dict[nn.Module, str], norms: Collection[nn.Module]
    ) -> None:
        super().__init__()
        self.names = names
        self.norms = {*norms, *(m for m in names if isinstance(m, NORMS))}
        # Convolutions that hold a norm or an activation, as detectron2's:
        # these read what they do not return.
        self.holders = {
            module
            for module in names
            if isinstance(module, CONVS)
            and (
                self.norms & {*module.children()}
                or getattr(module, 'activation', None) is not None
            )
        }
        self.trace = Trace()
        self.stack: list[nn.Module] = []
        # By id: the tensor, kept alive so that its id stays its own, and
        # for each convolution in it the operations since.
        self.origin: dict[
            int, tuple[Tensor, dict[nn.Module, tuple[str, ...]]]
        ] = {}
        self.read: set[tuple[int, nn.Module | None]] = set()  # in a module

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Run one operation and note what it read."""
        kwargs = kwargs or {}
        read = [t for t in tree_leaves((args, kwargs)) if self.known(t)]
        output = func(*args, **kwargs)
        module = self.stack[-1] if self.stack else None
        if module in self.holders and func.__name__ == CONVOLUTION:
            self.origin[id(output)] = (output, {module: ()})
        changed = self.changed(func, args, kwargs)
        read += changed
        if not read:
            return output
        self.read.update((id(tensor), module) for tensor in read)
        layer = self.layer()
        operation = func.__name__.split('.')[0]
        own = operation.strip('_')
        paths: dict[nn.Module, tuple[str, ...]] = {}
        for tensor in read:
            for conv, path in self.origin[id(tensor)][1].items():
                both = (*paths.get(conv, ()), *path)
                paths[conv] = tuple(dict.fromkeys(both))
        if layer in self.norms:
            for conv, path in paths.items():
                both = (*self.trace.norms[conv].get(layer, ()), *path)
                self.trace.norms[conv][layer] = tuple(dict.fromkeys(both))
        elif own not in SCALE_KEEPING or (
            isinstance(layer, CONVS) and layer not in self.holders
        ):
            where = self.names.get(layer, '') if layer else ''
            what = f'{operation} in {where or "the model itself"}'
            for tensor in read:
                self.used(tensor, what)
        else:
            for conv, path in paths.items():
                paths[conv] = tuple(dict.fromkeys((*path, own)))
            for tensor in (*tree_leaves(output), *changed):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.origin[id(tensor)] = (tensor, paths)
        return output

    def changed(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Tensors of convolutions whose values an operation writes into.

        They need not be its arguments: those may be views of them.
        """
        written = set()
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info and argument.alias_info.is_write:
                    value = kwargs.get(argument.name)
                    if place < len(args):
                        value = args[place]
                    written |= {*map(_memory, tree_leaves(value))} - {None}
        if not written:
            return []
        known = [tensor for tensor, _ in self.origin.values()]
        return [tensor for tensor in known if _memory(tensor) in written]

    def known(self, value: Any) -> bool:
        """Return whether a value holds the output of a convolution."""
        return isinstance(value, Tensor) and id(value) in self.origin

    def layer(self) -> Any:
        """Return the norm or convolution that runs, else the inner module."""
        norms = (m for m in self.stack if m in self.norms)
        convs = (m for m in self.stack if isinstance(m, CONVS))
        return next(iter((*norms, *convs, *self.stack[-1:], None)))

    def used(self, tensor: Tensor, what: str) -> None:
        """Note that an operation other than a norm read a tensor."""
        for conv in self.origin[id(tensor)][1]:
            self.trace.others[conv].add(what)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a module runs."""
        self.stack.append(module)
        if module not in self.norms:
            return
        for value in tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor):
                continue
            self.trace.sizes[module].add(value.shape[2:])
            paths = self.origin[id(value)][1] if self.known(value) else {}
            direct = [conv for conv, path in paths.items() if not path]
            self.trace.feeders[module].update(direct or [None])

    def leave(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """After a module ran, or failed."""
        if self.stack[-1:] != [module]:
            return  # a hook before :meth:`enter` failed
        self.stack.pop()
        if isinstance(module, CONVS) and isinstance(output, Tensor):
            self.trace.ran.add(module)
            if module not in self.holders:
                self.origin[id(output)] = (output, {module: ()})
        elif not list(module.children()) and module not in self.norms:
            # A compiled operator may not pass the dispatcher.
            outputs = {id(value) for value in tree_leaves(output)}
            for value in tree_leaves((args, kwargs)):
                if (
                    self.known(value)
                    and (id(value), module) not in self.read
                    and id(value) not in outputs
                ):
                    self.used(value, self.names[module])


def _returned(output: Any) -> Iterator[Any]:
    """Leaves of what a model returns, and of the objects among them.

    Such are dataclasses, and the data samples of the hosts, which nest.
    """
    leaves, opened = tree_leaves(output), set[int]()
    for _ in range(4):
        yield from leaves
        objects = {
            id(leaf): leaf
            for leaf in leaves
            if not isinstance(leaf, (Tensor, nn.Module, type))
            and id(leaf) not in opened
        }
        opened |= objects.keys()
        leaves = tree_leaves(
            [{**getattr(each, '__dict__', {})} for each in objects.values()]
        )


def _memory(value: Any) -> int | None:
    """The memory of a tensor, which its views share."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model in eval mode on inputs, see :func:`check`."""
    model.eval()
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if callable(inputs):
        return inputs(model)
    raise TypeError(
        f'inputs of type {type(inputs).__name__}: give a tensor, a tuple or '
        'dict of arguments, or a function of the model'
    )


def run_traced(
    model: nn.Module, inputs: Inputs, norms: Collection[nn.Module] = ()
) -> Trace:
    """Run a model in eval mode and note the readers of its convolutions.

    Args:
        model: any model.
        inputs: see :func:`check`.
        norms: modules that count as norms beside torch's.
    """
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(names, norms)
    with _watched(model, watch), watch:
        output = run(model, inputs)
    for value in _returned(output):
        if watch.known(value):
            watch.used(value, 'the output of the model')
    return watch.trace


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Hook a model, and leave it as it was: inputs may train it."""
    handles = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it takes no hooks; its operations are seen
        handles += [
            module.register_forward_pre_hook(watch.enter, with_kwargs=True),
            # The inputs may try what fails, and go on.
            module.register_forward_hook(
                watch.leave, with_kwargs=True, always_call=True
            ),
        ]
    try:
        with restored(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _guess_norm(modules: dict[str, nn.Module], name: str) -> list[nn.Module]:
    """Return the norm within, the sibling of the same number, or the next."""
    path, _, own = name.rpartition('.')
    parent, conv = modules[path], modules[name]
    for module in conv.children():
        if isinstance(module, NORMS):
            return [module] if _fits(module, conv) else []
    order = [one for one in getattr(parent, 'order', ()) if one != 'act']
    if order == ['norm', 'conv']:
        return []
    siblings = dict(parent.named_children())
    number = re.search(r'\d+$', own)
    if number and own != number[0]:
        for sibling, module in siblings.items():
            same = re.fullmatch(rf'[a-z_]+{number[0]}', sibling)
            if same and isinstance(module, NORMS) and _fits(module, conv):
                return [module]
    # A convolution that is the whole model has no siblings.
    later = list(siblings.values())
    for module in later[later.index(conv) + 1 :] if conv in later else ():
        if isinstance(module, NORMS):
            return [module] if _fits(module, conv) else []
        if isinstance(module, CONVS) or list(module.children()):
            break
    return []


def _fits(norm: nn.Module, conv: nn.Module) -> bool:
    channels = getattr(norm, 'num_channels', getattr(norm, 'num_features', 0))
    return channels in (0, conv.out_channels)


def _mistake(
    modules: dict[str, nn.Module],
    name: str,
    normalized: bool,
    others: tuple[str, ...],
    how: str,
) -> str:
    above = name.split('.')[:-1]
    part = ''.join(above[:1])
    for depth in range(len(above), 0, -1):
        module = modules['.'.join(above[:depth])]
        # A ConvModule has both, too, but no key of its own in a config.
        if hasattr(module, 'norm_cfg') and not hasattr(module, 'order'):
            part = '.'.join(above[:depth])
            break
    key = f'model.{part}' if part else 'model'
    kind = type(modules[name]).__name__
    goes = f': its output goes to {", ".join(others)}' if others else ''
    lacks = (
        f'is normalized, but not everywhere{goes}'
        if normalized
        else f'has no normalization after it ({how}){goes}'
    )
    fix = (
        f"Set {key}.norm_cfg=dict(type='ws_mm.BCN'), or keep this "
        f'convolution plain with {key}.conv_cfg=None'
    )
    if not any(isinstance(module, BaseModule) for module in modules.values()):
        fix = (
            'Let a normalization, and nothing else, read its output, or make '
            'it a plain convolution (where a config built it, conv_cfg=None)'
        )
    return (
        f'{name} ({kind}) {lacks}. The scale of its output is fixed and '
        f'cannot be learned. {fix}'
    )
