"""Look into a built model, and rebuild its convolutions and norms.

What normalizes a convolution is found by running the model: every tensor
operation that reads a convolution's output is seen, with the layer that ran
it. That is a proof for the inputs that were run. Without inputs, or for
layers that they do not reach, it is a guess from names and order.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checkpoint import from_batch_norm
from .conv import WSConv1d, WSConv2d, WSConv3d
from .functional import check_eps_mode, standardize_weight
from .norm import BCN

# A tensor, the positional or the named arguments of the model's forward, or
# a function that runs the model.
Inputs: TypeAlias = (
    Tensor
    | tuple[Any, ...]
    | Mapping[str, Any]
    | Callable[[nn.Module], Any]
    | None
)
WS_TO_PLAIN: dict[type, type] = {
    WSConv1d: nn.Conv1d,
    WSConv2d: nn.Conv2d,
    WSConv3d: nn.Conv3d,
}
PLAIN_TO_WS = {plain: ws for ws, plain in WS_TO_PLAIN.items()}
# Known by name: ws_mm imports neither mmcv nor timm.
FOREIGN_WS = {'ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'StdConv2dSame'}
CONVS = nn.modules.conv._ConvNd
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
NORMS = (
    BATCH_NORMS,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
# Behind these a normalization still takes out the scale of the convolution.
SCALE_KEEPING = {
    '_adaptive_avg_pool2d',
    '_to_copy',
    '_unsafe_view',
    'adaptive_avg_pool2d',
    'add',
    'add_',
    'alias',
    'avg_pool2d',
    'cat',
    'clone',
    'constant_pad_nd',
    'detach',
    'expand',
    'leaky_relu',
    'leaky_relu_',
    'max_pool2d_with_indices',
    'mean',
    'permute',
    'relu',
    'relu_',
    'select',
    'slice',
    'squeeze',
    'transpose',
    'unsqueeze',
    'upsample_bilinear2d',
    'upsample_nearest2d',
    'view',
}


@dataclass(frozen=True)
class ConvReport:
    """What became of one convolution.

    Attributes:
        name: of the module.
        kind: class name.
        standardized: whether its weight is.
        norms: names of the norms that follow.
        norm_kinds: their class names.
        via: operations between the convolution and its norms.
        others: what else reads its output, when proven.
        how: 'proven' by execution, or 'guessed' from names and order.
        mistake: what is wrong and how to mend it, or ''.
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
        """What is wrong, one message per convolution."""
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
    """Say for every convolution what normalizes it, and what is wrong.

    Proven, for convolutions that ``inputs`` reach: the norms that read the
    output, directly or behind operations that keep its scale (ReLU,
    pooling, resizing, sums, concatenation), and everything else that reads
    it. Guessed, for the rest: a sibling norm of the same number (``conv2``,
    ``bn2``), or the sibling norm that follows before any other convolution,
    if its channels fit. A standardized convolution is a mistake where no
    norm follows or something else reads its output, too.

    Args:
        model: any model. It runs once, in eval mode, without gradients, and
            is left as it was.
        inputs: a tensor, a tuple of arguments, a dict of named arguments, a
            function that takes the model and runs it, or None.
    """
    trace = _Trace() if inputs is None else _run(model, inputs)
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    report = Report()
    for name, module in modules.items():
        if not isinstance(module, CONVS):
            continue
        if module in trace.ran:
            how = 'proven'
            found = trace.norms.get(module, {})
            via = tuple({op: None for path in found.values() for op in path})
            others = tuple(sorted(trace.others.get(module, ())))
            norms = list(found)
        else:
            how, via, others = 'guessed', (), ()
            guess = _guess_norm(modules, name)
            norms = [] if guess is None else [guess]
        standardized = _is_standardized(module)
        mistake = ''
        if standardized and (others or not norms):
            mistake = _mistake(modules, name, bool(norms), others, how)
        report.append(
            ConvReport(
                name,
                type(module).__name__,
                standardized,
                tuple(names[norm] for norm in norms),
                tuple(type(norm).__name__ for norm in norms),
                via,
                others,
                how,
                mistake,
            )
        )
    return report


def bake(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    fold_estimates: bool = False,
) -> nn.Module:
    """Return a copy of a model that holds plain convolutions only.

    Formula, for ``fold_estimates``, per channel:
        scale = bn_weight / sqrt(running_var + eps)
        weight = scale * standardized weight
        bias = scale * (bias - running_mean) + bn_bias

    Convention: the baked weight is bit for bit the one that the WS
        convolution used. Names, and so the keys of the state dict, stay;
        folding adds ``bias`` to convolutions and takes the inner affine and
        the estimates from norms, which become ``nn.GroupNorm`` with the
        outer affine repeated per channel. The copy is for eval and export:
        trained further, it is another model.

    Args:
        model: any model. It is left as it was.
        inputs: see :func:`check`; needed with ``fold_estimates``.
        fold_estimates: turn every BCN into a GroupNorm, its estimates and
            inner affine into the convolution before it.

    Raises:
        ValueError: a standardized convolution is not of ``ws_mm``; or a BCN
            does not follow, proven, exactly one convolution that feeds
            nothing else.
    """
    foreign = [
        name
        for name, module in model.named_modules()
        if isinstance(module, CONVS)
        and _is_standardized(module)
        and type(module) not in WS_TO_PLAIN
    ]
    if foreign:
        raise ValueError(
            f'{", ".join(foreign)}: only the convolutions of ws_mm can be '
            "baked. Build the model with conv_cfg=dict(type='ws_mm.WSConv2d')"
            ", which loads checkpoints of mmcv's ConvWS"
        )
    pairs = _pairs_to_fold(model, inputs) if fold_estimates else []
    baked = copy.deepcopy(model)
    modules = dict(baked.named_modules())
    for module in modules.values():
        if type(module) in WS_TO_PLAIN:
            _bake_conv(module)
    for conv_name, norm_name in pairs:
        _fold(modules[conv_name], modules[norm_name])
    return baked


def convert(
    model: nn.Module,
    conv: Mapping[str, Any] | None = None,
    norm: Mapping[str, Any] | None = None,
    *,
    inputs: Inputs,
    parts: Sequence[str] = (),
) -> nn.Module:
    """Return a copy with WS convolutions, BCN norms or both.

    Only convolutions whose output a norm, and nothing else, reads directly
    are touched, with that norm. The others stay as they are, as do filters
    of one entry. Parameters are kept: a standardized convolution computes
    something else than the plain one did; GN to BCN is exact, BN to BCN
    keeps the running statistics as estimates.

    Args:
        model: any model. It is left as it was.
        conv: arguments of ``WSConv2d`` (1d, 3d), such as ``dict()``; None
            keeps the convolutions.
        norm: arguments of :class:`~ws_mm.norm.BCN`; None keeps the norms.
        inputs: see :func:`check`. They have to reach every convolution.
        parts: names of the submodules to convert, all of the model if none.

    Raises:
        ValueError: a convolution is not reached; or it feeds a norm and
            something else; or it, or its norm, is of a type that cannot be
            replaced. The message lists all.
    """
    modules = dict(model.named_modules())
    for part in parts:
        if part not in modules:
            raise ValueError(
                f'parts={part!r}: the model has no such module. It has '
                f'{", ".join(name for name, _ in model.named_children())}'
            )
    if inputs is None:
        raise ValueError(
            'convert proves what follows a convolution by running the model: '
            'give inputs=, such as torch.randn(1, 3, 64, 64)'
        )
    trace = _run(model, inputs)
    problems, pairs = [], []
    for name, module in modules.items():
        if not isinstance(module, CONVS) or not _within(name, parts):
            continue
        norms = trace.norms.get(module, {})
        direct = [one for one, path in norms.items() if not path]
        others = trace.others.get(module, set())
        if module not in trace.ran:
            problems.append(f'{name} is not reached by the inputs')
        elif not direct:
            continue
        elif len(norms) > 1 or others:
            problems.append(f'{name} feeds {_fed(model, norms, others)}')
        elif module.weight.shape[1:].numel() < 2:
            continue
        elif conv is not None and type(module) not in (
            *PLAIN_TO_WS,
            *WS_TO_PLAIN,
        ):
            problems.append(f'{name} is a {type(module).__name__}')
        elif norm is not None and (unlike := _unlike_torch(direct[0])):
            problems.append(
                f'the norm after {name} is a {type(direct[0]).__name__}, '
                f'which {unlike}'
            )
        else:
            pairs.append((name, direct[0]))
    if problems:
        raise ValueError(
            f'cannot convert: {"; ".join(problems)}. Give inputs that reach '
            'every convolution, or parts=[...] without these'
        )
    if not pairs:
        raise ValueError(
            'nothing to convert: no convolution is read directly by a '
            'normalization, and by nothing else'
            + (f', in parts={list(parts)}' if parts else '')
        )
    names = {module: name for name, module in modules.items()}
    bcn = {names[one]: _to_bcn(one, norm, names[one]) for _, one in pairs}
    converted = copy.deepcopy(model)
    copies = dict(converted.named_modules())
    for conv_name, _ in pairs:
        if conv is not None:
            _standardize(copies[conv_name], **conv)
    if norm is not None:
        new = {copies[name]: layer for name, layer in bcn.items()}
        for parent in list(converted.modules()):
            for key, child in parent._modules.items():
                if child in new:
                    parent._modules[key] = new[child]
    return converted


@dataclass
class _Trace:
    """What read the outputs of convolutions."""

    ran: set[nn.Module] = field(default_factory=set)
    norms: dict[nn.Module, dict[nn.Module, tuple[str, ...]]] = field(
        default_factory=dict
    )
    others: dict[nn.Module, set[str]] = field(default_factory=dict)
    # Of each norm: the convolutions that fed it directly; None for the rest.
    feeders: dict[nn.Module, set[nn.Module | None]] = field(
        default_factory=dict
    )


class _Watch(TorchDispatchMode):
    """Follow the outputs of convolutions through every operation."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.trace = _Trace()
        self.stack: list[nn.Module] = []
        # By id: the tensor, kept alive so that its id stays its own, and
        # for each convolution in it the operations since.
        self.origin: dict[
            int, tuple[Tensor, dict[nn.Module, tuple[str, ...]]]
        ] = {}
        self.read: set[int] = set()

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
        if not read:
            return output
        self.read.update(map(id, read))
        layer = self.layer()
        operation = func.__name__.split('.')[0]
        if isinstance(layer, NORMS):
            for tensor in read:
                self.normalized(tensor, layer)
        elif isinstance(layer, CONVS) or operation not in SCALE_KEEPING:
            where = self.names.get(layer, '') if layer else ''
            what = f'{operation} in {where or "the model itself"}'
            for tensor in read:
                self.used(tensor, what)
        else:
            merged: dict[nn.Module, tuple[str, ...]] = {}
            for tensor in read:
                for conv, path in self.origin[id(tensor)][1].items():
                    path = (*merged.get(conv, ()), *path)
                    own = operation.strip('_')
                    merged[conv] = tuple(dict.fromkeys((*path, own)))
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.origin[id(tensor)] = (tensor, merged)
        return output

    def known(self, value: Any) -> bool:
        """Whether a value holds the output of a convolution."""
        return isinstance(value, Tensor) and id(value) in self.origin

    def layer(self) -> nn.Module | None:
        """The norm or convolution that runs, else the innermost module."""
        for module in self.stack:
            if isinstance(module, (*NORMS, CONVS)):
                return module
        return self.stack[-1] if self.stack else None

    def normalized(self, tensor: Tensor, norm: nn.Module) -> None:
        """Note that a norm read a tensor."""
        for conv, path in self.origin[id(tensor)][1].items():
            norms = self.trace.norms.setdefault(conv, {})
            norms[norm] = tuple(dict.fromkeys((*norms.get(norm, ()), *path)))

    def used(self, tensor: Tensor, what: str) -> None:
        """Note that something else read a tensor."""
        for conv in self.origin[id(tensor)][1]:
            self.trace.others.setdefault(conv, set()).add(what)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a module runs."""
        self.stack.append(module)
        if not isinstance(module, NORMS):
            return
        feeders = self.trace.feeders.setdefault(module, set())
        for value in tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor):
                continue
            paths = self.origin[id(value)][1] if self.known(value) else {}
            direct = [conv for conv, path in paths.items() if not path]
            feeders.update(direct or [None])

    def leave(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """After a module ran."""
        self.stack.pop()
        if isinstance(module, CONVS) and isinstance(output, Tensor):
            self.trace.ran.add(module)
            self.origin[id(output)] = (output, {module: ()})
        elif not list(module.children()) and not isinstance(module, NORMS):
            # A compiled operator may not pass the dispatcher.
            outputs = {id(value) for value in tree_leaves(output)}
            for value in tree_leaves((args, kwargs)):
                if (
                    self.known(value)
                    and id(value) not in self.read
                    and id(value) not in outputs
                ):
                    self.read.add(id(value))
                    self.used(value, self.names[module])


def _run(model: nn.Module, inputs: Inputs) -> _Trace:
    """Run a model in eval mode and see what reads which convolution."""
    watch = _Watch({module: name for name, module in model.named_modules()})
    with _eval_mode(model), torch.no_grad(), _hooked(model, watch), watch:
        if isinstance(inputs, Tensor):
            output = model(inputs)
        elif isinstance(inputs, tuple):
            output = model(*inputs)
        elif isinstance(inputs, Mapping):
            output = model(**inputs)
        elif callable(inputs):
            output = inputs(model)
        else:
            raise TypeError(
                f'inputs of type {type(inputs).__name__}: give a tensor, a '
                'tuple or dict of arguments, or a function of the model'
            )
    for value in tree_leaves(output):
        if watch.known(value):
            watch.used(value, 'the output of the model')
    return watch.trace


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _hooked(model: nn.Module, watch: _Watch) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(watch.enter, with_kwargs=True),
            module.register_forward_hook(watch.leave, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_standardized(conv: nn.Module) -> bool:
    return type(conv) in WS_TO_PLAIN or any(
        base in WS_TO_PLAIN or base.__name__ in FOREIGN_WS
        for base in type(conv).__mro__
    )


def _guess_norm(modules: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The sibling norm of the same number, or the next one in order."""
    path, _, own = name.rpartition('.')
    parent, conv = modules[path], modules[name]
    order = getattr(parent, 'order', ())
    if {'conv', 'norm'} <= set(order) and (
        order.index('norm') < order.index('conv')
    ):
        return None
    siblings = list(parent.named_children())
    number = re.search(r'\d+$', own)
    if number and own != number[0]:
        for sibling, module in siblings:
            if re.fullmatch(rf'[a-z_]+{number[0]}', sibling) and _fits(
                module, conv
            ):
                return module
    later = [module for _, module in siblings]
    # Absent where the same module has another name, too.
    if conv not in later:
        return None
    for module in later[later.index(conv) + 1 :]:
        if isinstance(module, NORMS):
            return module if _fits(module, conv) else None
        if isinstance(module, CONVS) or list(module.children()):
            return None
    return None


def _fits(norm: nn.Module, conv: nn.Module) -> bool:
    if not isinstance(norm, NORMS):
        return False
    channels = getattr(norm, 'num_channels', getattr(norm, 'num_features', 0))
    return channels in (0, conv.out_channels)


def _mistake(
    modules: dict[str, nn.Module],
    name: str,
    normalized: bool,
    others: tuple[str, ...],
    how: str,
) -> str:
    key, above = 'model', name.rpartition('.')[0]
    part = above.partition('.')[0]
    while above:
        module = modules[above]
        # A ConvModule has both, too, but no key of its own in a config.
        if hasattr(module, 'norm_cfg') and not hasattr(module, 'order'):
            part = above
            break
        above = above.rpartition('.')[0]
    key = f'model.{part}' if part else 'model'
    kind = type(modules[name]).__name__
    goes = f': its output goes to {", ".join(others)}' if others else ''
    lacks = (
        f'is normalized, but not everywhere{goes}'
        if normalized
        else f'has no normalization after it ({how}){goes}'
    )
    return (
        f'{name} ({kind}) {lacks}. The scale of its output is fixed and '
        f"cannot be learned. Set {key}.norm_cfg=dict(type='ws_mm.BCN'), or "
        f'keep this convolution plain with {key}.conv_cfg=None'
    )


def _fed(
    model: nn.Module,
    norms: Mapping[nn.Module, Any],
    others: set[str],
) -> str:
    names = {module: name for name, module in model.named_modules()}
    return ' and '.join([*(names[norm] for norm in norms), *sorted(others)])


def _within(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(
        name == part or name.startswith(f'{part}.') for part in parts
    )


def _pairs_to_fold(model: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """Names of each BCN and the one convolution that feeds nothing else."""
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if isinstance(module, BCN)]
    if not layers:
        return []
    if inputs is None:
        raise ValueError(
            'fold_estimates proves which convolution feeds which BCN by '
            'running the model: give inputs=, such as torch.randn(1, 3, 64, '
            '64)'
        )
    trace = _run(model, inputs)
    problems, pairs = [], []
    for norm in layers:
        feeders = trace.feeders.get(norm, set())
        convs = [conv for conv in feeders if conv is not None]
        if not feeders:
            problems.append(f'{names[norm]} is not reached by the inputs')
        elif None in feeders or not convs:
            problems.append(f'{names[norm]} does not follow a convolution')
        elif len(convs) > 1:
            shared = ' and '.join(sorted(names[conv] for conv in convs))
            problems.append(f'{names[norm]} is shared by {shared}')
        elif len(trace.norms[convs[0]]) > 1 or trace.others.get(convs[0]):
            fed = _fed(
                model, trace.norms[convs[0]], trace.others.get(convs[0], set())
            )
            problems.append(f'{names[convs[0]]} feeds {fed}')
        elif type(convs[0]) not in (*WS_TO_PLAIN, *PLAIN_TO_WS):
            problems.append(
                f'{names[convs[0]]} is a {type(convs[0]).__name__}'
            )
        else:
            pairs.append((names[convs[0]], names[norm]))
    if problems:
        raise ValueError(
            f'cannot fold the estimates: {"; ".join(problems)}. Bake without '
            'fold_estimates, or export with torch.export or ONNX, which need '
            'no folding'
        )
    return pairs


@torch.no_grad()
def _bake_conv(conv: Any) -> None:
    weight = standardize_weight(conv.weight, conv.eps, conv.eps_mode)
    # In place, so that whatever holds the layer, under however many names,
    # holds the plain one.
    conv.__class__ = WS_TO_PLAIN[type(conv)]
    del conv.eps, conv.eps_mode
    # Its own, where another layer has the same raw filters.
    conv.weight = nn.Parameter(weight, conv.weight.requires_grad)


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.bn_weight is not None:
        scale = scale * norm.bn_weight
        shift = shift * norm.bn_weight + norm.bn_bias
    weight = conv.weight
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    per_filter = scale.view(-1, *[1] * (weight.dim() - 1))
    folded = weight.double() * per_filter
    conv.weight = nn.Parameter(folded.to(weight), weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight), weight.requires_grad)
    if norm.affine:
        for name in ('weight', 'bias'):
            values = getattr(norm, name)
            repeats = norm.num_features // values.numel()
            setattr(
                norm, name, nn.Parameter(values.repeat_interleave(repeats))
            )
    norm.__class__ = nn.GroupNorm
    for name in ('bn_weight', 'bn_bias', 'running_mean', 'running_var'):
        delattr(norm, name)
    for name in ('num_features', 'momentum', 'mode', 'outer_affine'):
        delattr(norm, name)


def _standardize(
    conv: Any, eps: float = 1e-5, eps_mode: str = 'outside'
) -> None:
    check_eps_mode(eps_mode)
    if type(conv) in PLAIN_TO_WS:
        conv.__class__ = PLAIN_TO_WS[type(conv)]
    conv.eps, conv.eps_mode = eps, eps_mode


@torch.no_grad()
def _unlike_torch(norm: Any) -> str:
    """Why a norm is no BatchNorm, GroupNorm or BCN; '' where it is one.

    Subclasses, such as timm's, may hold an activation, too: they are run.
    """
    is_batch = isinstance(norm, BATCH_NORMS)
    if not (is_batch or isinstance(norm, nn.GroupNorm)):
        return 'is no BatchNorm or GroupNorm'
    if is_batch and norm.running_mean is None:
        return 'keeps no statistics'
    if type(norm).__module__.startswith(('torch.nn.', 'ws_mm.')):
        return ''
    channels = norm.num_features if is_batch else norm.num_channels
    state = next(iter(norm.state_dict().values()), torch.empty(0))
    # Values of both signs in every channel, which no activation leaves.
    x = torch.linspace(-3, 3, 2 * 9 * channels).to(state)
    x = x.view(2, 9, channels).transpose(1, 2)
    if not isinstance(norm, nn.BatchNorm1d):
        size = (3, 3, 1) if isinstance(norm, nn.BatchNorm3d) else (3, 3)
        x = x.reshape(2, channels, *size)
    if is_batch:
        statistics = norm.running_mean, norm.running_var
        expected = nn.functional.batch_norm(
            x, *statistics, norm.weight, norm.bias, eps=norm.eps
        )
    else:
        expected = nn.functional.group_norm(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps
        )
    with _eval_mode(norm):
        try:
            same = torch.allclose(norm(x), expected, rtol=1e-2, atol=1e-2)
        except (RuntimeError, TypeError, ValueError):
            same = False
    return '' if same else 'computes something else than its base class'


def _to_bcn(
    norm: Any, arguments: Mapping[str, Any] | None, name: str
) -> nn.Module:
    """A BCN that holds what a norm held; a BCN itself as it is."""
    if arguments is None or isinstance(norm, BCN):
        return norm  # type: ignore[no-any-return]
    state = norm.state_dict()
    first = next(iter(state.values()), torch.empty(0))
    channels = getattr(norm, 'num_features', None) or norm.num_channels
    options = dict(eps=norm.eps, affine=norm.affine)
    if isinstance(norm, nn.GroupNorm):
        options['num_groups'] = norm.num_groups
    options |= dict(arguments)
    options.pop('type', None)
    layer = BCN(
        channels, device=first.device, dtype=first.dtype, **options
    ).train(norm.training)
    if isinstance(norm, nn.GroupNorm):
        if layer.num_groups != norm.num_groups:
            raise ValueError(
                f'{name}: the GroupNorm has {norm.num_groups} groups, BCN '
                f'{layer.num_groups}. Leave num_groups out of norm='
            )
    else:
        from_batch_norm(state, '', layer.weight)
    if state:
        # BCN itself refuses what it cannot hold, such as GN per group.
        layer.load_state_dict(state)
    return layer
