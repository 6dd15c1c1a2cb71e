"""Replace convolutions and norms of a built model."""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeAlias

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from . import replacement
from .arguments import check_choice, check_eps, counted, reject_unknown
from .checking import CONVS, NORMS, Inputs, Trace, run_traced
from .functional import EPS_MODES
from .running_statistics import (
    RunningStatistics,
    channels_of,
    legal_arguments,
    norm_class,
)

NOT_REACHED = 'not reached by the inputs'
# Of a ConvModule of mmcv, which then computes with the values of its norm.
EFFICIENT = (
    'skips its norm in eval mode, unless you call '
    'turn_on_efficient_conv_bn_eval(False)'
)
# Methods of timm and MMPretrain that fuse convolutions and their norms.
FUSIONS = ('fuse', 'reparameterize', 'switch_to_deploy')
# Names of layers, by reason.
Reasons: TypeAlias = defaultdict[str, list[str]]


def convert(
    model: nn.Module,
    conv: Mapping[str, Any] | None = None,
    norm: Mapping[str, Any] | None = None,
    *,
    inputs: Inputs = None,
    parts: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> nn.Module:
    """Return a copy of a model with WS convolutions, BCN norms or both.

    Every BatchNorm and GroupNorm becomes a BCN, torchvision's
    ``FrozenBatchNorm2d`` included; drop and activation of timm's norms, and
    norm and activation within detectron2's convolutions, stay where they
    are. A convolution is standardized if only norms read its output,
    directly or behind operations that do not mix it with other values.
    Everything else stays, and one line of the log names it with the reason:
    convolutions with filters of one entry, LayerNorm, norms on 1x1 maps that
    have a single channel.

    Convention: parameters, their names and ``requires_grad`` stay; a
        standardized convolution computes something else than the plain one
        did. GN to BCN is exact, with its groups and an affine per channel,
        but for eps (1 + eps) in the place of eps in its variance.
        BN to BCN keeps the running statistics as estimates and the affine as
        the inner one; of a BN of zeros the outer weight is 0. A norm on
        1x1 maps gets at most half as many groups as channels.

    Args:
        model: any model, of MMDetection and MMSegmentation, too, before or
            after ``init_weights``. It stays unchanged.
        conv: arguments of ``WSConv2d`` (1d, 3d), ``eps`` and ``eps_mode``,
            or ``{}``; None keeps the convolutions.
        norm: arguments of :class:`~ws_mm.norm.BCN`, or ``{}``; None keeps
            the norms. ``type`` names another class that keeps running
            statistics, see :mod:`ws_mm.running_statistics`.
        inputs: inputs of the model, see :func:`check`. With ``conv``, they
            have to reach every convolution. Norms alone need none; inputs
            show which norms run on 1x1 maps.
        parts: names of the submodules to convert; empty for the whole model.
        skip: names of submodules to keep.

    Raises:
        TypeError: ``conv`` or ``norm`` has an unknown argument; or a module
            is a script.
        ValueError: an argument has an illegal value; a convolution is not
            reached; a norm is of a type that cannot be replaced; or there is
            nothing to convert. The message names the layers.
    """
    kind = _check_arguments(conv, norm)
    modules = dict(model.named_modules())
    parts, skip = _known('parts', parts, model), _known('skip', skip, model)
    if inputs is None and conv is not None:
        raise ValueError(
            'convert proves what follows a convolution by running the model: '
            'give inputs=, such as torch.randn(1, 3, 64, 64), or convert the '
            'norms alone (conv=None)'
        )
    asked, kept = _inside(parts, model), _inside(skip, model)
    chosen = {
        name: module
        for name, module in modules.items()
        if (not parts or module in asked) and module not in kept
    }
    for name, module in chosen.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f'{name or "the model"} is a script of TorchScript, whose '
                'layers cannot be replaced. Convert the model, then script '
                f'it, or leave it: skip=[{name!r}]'
            )
    plan = _Plan()
    if norm is not None:
        plan.choose_norms(chosen)
    trace = Trace()
    if inputs is not None:
        trace = run_traced(model, inputs, plan.norms)
    if conv is not None:
        plan.choose_convs(chosen, trace)
    plan.check(chosen, conv is not None, norm is not None)
    converted = copy.deepcopy(model)
    copies = dict(converted.named_modules())
    for name in plan.convs.values():
        replacement.standardize(copies[name], **without_type(conv))
    floats = (p for p in model.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0))
    for module, name in list(plan.norms.items()):
        layer = plan.replacement_of(
            module, copies[name], kind, without_type(norm), trace, like
        )
        if layer is not None:
            replacement.become(copies[name], layer)
    plan.note_shared(modules)
    plan.note_fusions(modules)
    plan.report(conv is not None, kind if norm is not None else None)
    return converted


@dataclass
class _Plan:
    """Layers to convert, and the reasons to keep the others."""

    convs: dict[nn.Module, str] = field(default_factory=dict)
    norms: dict[nn.Module, str] = field(default_factory=dict)
    problems: Reasons = field(default_factory=lambda: defaultdict(list))
    left: Reasons = field(default_factory=lambda: defaultdict(list))
    notes: Reasons = field(default_factory=lambda: defaultdict(list))

    def choose_norms(self, modules: Mapping[str, nn.Module]) -> None:
        """Take the norms that can be replaced."""
        for name, module in modules.items():
            kind = type(module).__name__
            if isinstance(module, RunningStatistics) or not _looks_like_norm(
                module
            ):
                continue
            why = replacement.why_kept(module)
            if not why:
                self.norms[module] = name
            elif _needs_a_batch(module):
                self.problems[f'{kind} {why}'].append(name)
            else:
                self.left[f'{kind} {why}'].append(name)

    def choose_convs(
        self, modules: Mapping[str, nn.Module], trace: Trace
    ) -> None:
        """Take the convolutions whose scale only norms see."""
        for name, module in modules.items():
            if not isinstance(module, CONVS):
                continue
            kind = type(module).__name__
            norms = trace.norms.get(module, {})
            if replacement.standardizes(module):
                why = f'{kind} standardizes its filters itself'
            elif module not in trace.ran:
                self.problems[NOT_REACHED].append(name)
                continue
            elif not norms:
                continue
            elif trace.others.get(module):
                why = 'read by a norm and by something else'
            elif any(map(_mixes, norms, norms.values())):
                why = 'mixed with other values before a norm reads it'
            elif replacement.fan_in(module) < 2:
                why = 'filters of one entry have no variance'
            elif replacement.ws_type(module) is None:
                why = f'{kind} is more than its torch namesake'
            else:
                why = ''
            if why:
                self.left[why].append(name)
            else:
                self.convs[module] = name

    def check(
        self, modules: Mapping[str, nn.Module], convs: bool, norms: bool
    ) -> None:
        """Raise if a layer cannot be converted, or if there is none."""
        for name, module in modules.items():
            if getattr(module, 'efficient_conv_bn_eval_forward', None):
                self.problems[EFFICIENT].append(name)
        if self.problems:
            fix = 'Leave'
            if NOT_REACHED in self.problems:
                fix = (
                    'Give inputs that reach every convolution, such as '
                    'inputs=lambda model: model.train()(x) for layers that '
                    'only run in training, or leave'
                )
            names = {n for layers in self.problems.values() for n in layers}
            others = {
                name
                for name, module in modules.items()
                if (convs and isinstance(module, CONVS))
                or (norms and _looks_like_norm(module))
            }
            skip = ', '.join(map(repr, _covering(names, others - names)))
            raise ValueError(
                f'cannot convert: {_listed(self.problems)}. {fix} these '
                f'layers as they are: skip=[{skip}]'
            )
        if self.convs or self.norms:
            return
        found: Reasons = defaultdict(list)
        frozen = ''
        for name, module in modules.items():
            if _looks_like_norm(module):
                kind = type(module).__name__
                found[kind].append(name)
                known = isinstance(module, NORMS)
                if not known and not replacement.why_kept(module):
                    frozen = kind
        wanted = []
        if convs:
            wanted.append('no convolution is read by norms and nothing else')
        if norms:
            wanted.append('no BatchNorm or GroupNorm is here')
        message = f'nothing to convert: {", and ".join(wanted)}'
        if self.left:
            message += f'. {_listed(self.left)}'
        elif found:
            message += f'. The norms here: {_listed(found)}'
        else:
            message += ', nor any other norm'
        if frozen:
            message += (
                f'. {frozen} takes no scale out of a convolution in '
                'training. norm={} makes a BCN of it, which does'
            )
        raise ValueError(message)

    def replacement_of(
        self,
        norm: nn.Module,
        copied: nn.Module,
        kind: type[RunningStatistics],
        arguments: dict[str, Any],
        trace: Trace,
        like: Tensor,
    ) -> RunningStatistics | None:
        """Make the new layer for a norm; None if the norm stays."""
        name, sizes = self.norms[norm], trace.sizes.get(norm, set())
        if len(sizes) > 1:
            self.notes['one estimate for maps of several sizes'].append(name)
        if (
            any(size.numel() == 1 for size in sizes)
            and not isinstance(norm, nn.GroupNorm)
            and 'num_groups' in legal_arguments(kind)
        ):
            half = channels_of(norm) // 2
            if not half:
                self.left['a single channel on 1x1 maps'].append(name)
                del self.norms[norm]
                return None
            self.notes['groups of channels alone, on 1x1 maps'].append(name)
            asked = arguments.get('num_groups') or 32
            arguments = arguments | dict(num_groups=min(half, asked))
        with _own_words(name):
            return replacement.replacement_of(copied, kind, arguments, like)

    def note_shared(self, modules: Mapping[str, nn.Module]) -> None:
        """Name norms whose weight or bias another layer had, too."""
        holders = Counter(
            values
            for module in modules.values()
            for values in {*module.parameters(recurse=False)}
        )
        for norm, name in self.norms.items():
            if any(holders[p] > 1 for p in norm.parameters(recurse=False)):
                why = 'weight and bias are no longer those of other layers'
                self.notes[why].append(name)

    def note_fusions(self, modules: Mapping[str, nn.Module]) -> None:
        """Name modules that would fuse a convolution with its norm."""
        for name, module in modules.items():
            method = next((m for m in FUSIONS if _has_method(module, m)), None)
            inside = {*module.modules()} if method else set()
            if inside & self.norms.keys():
                why = f'{method}() would take the new norm for a BatchNorm'
            elif inside & self.convs.keys():
                why = f'bake before {method}(), which reads raw filters'
            else:
                continue
            self.notes[why].append(name or 'the model')

    def report(self, has_conv: bool, kind: type | None) -> None:
        """Log what was asked for and done, and what was not."""
        done = []
        if has_conv:
            done.append(
                f'{len(self.convs)} convolutions now standardize their filters'
            )
        if kind is not None:
            done.append(f'{len(self.norms)} norms are now {kind.__name__}')
        message = f'ws_mm.convert: {", ".join(done)}'
        if self.left:
            message += f'. Left as they are: {_listed(self.left)}'
        if self.notes:
            message += f'. Worth a look: {_listed(self.notes)}'
        print_log(message, logger='current')


def _has_method(module: nn.Module, method: str) -> bool:
    """Return whether a class has a method that takes no arguments."""
    function = getattr(type(module), method, None)
    return callable(function) and len(signature(function).parameters) == 1


def _listed(reasons: Reasons) -> str:
    """Each reason, with the number of its layers and some names."""
    return '; '.join(
        f'{why}: {counted(names)}' for why, names in reasons.items()
    )


def _covering(names: set[str], others: set[str]) -> list[str]:
    """The fewest modules that hold all these layers and no others."""
    roots = set()
    for name in sorted(names):
        root = name
        while above := root.rpartition('.')[0]:
            if any(_within(other, [above]) for other in others):
                break
            root = above
        roots.add(root)
    return sorted(roots)


def _known(
    key: str, names: Sequence[str], model: nn.Module
) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    # Of a module that has several, each is known.
    modules = {n for n, _ in model.named_modules(remove_duplicate=False)}
    for name in names:
        if name not in modules:
            raise ValueError(
                f'{key}={name!r}: the model has no such module. It has '
                f'{", ".join(name for name, _ in model.named_children())}'
            )
    return names


def _check_arguments(
    conv: Mapping[str, Any] | None, norm: Mapping[str, Any] | None
) -> type[RunningStatistics]:
    """Reject what no layer can be made with; return the class of the norms."""
    if conv is None and norm is None:
        raise ValueError('nothing to convert: give conv={}, norm={} or both')
    check_options(conv, norm)
    wanted = (norm or {}).get('type', 'ws_mm.BCN')
    found = norm_class(wanted)
    if found is None:
        raise ValueError(
            f'norm=dict(type={wanted!r}): convert makes BCN, or a registered '
            'subclass of ws_mm.running_statistics.RunningStatistics. Leave '
            'type out for BCN'
        )
    if norm is not None:
        options = without_type(norm)
        takes = legal_arguments(found)[1:]
        takes = tuple(n for n in takes if n not in ('device', 'dtype'))
        _reject_unknown(found.__name__, 'norm', options, takes)
        groups = options.get('num_groups', 32)
        with _own_words():
            found(2 * groups if isinstance(groups, int) else 2, **options)
    return found


def check_options(
    conv: Mapping[str, Any] | None, norm: Mapping[str, Any] | None
) -> None:
    """Reject what is no dict, and what no WS convolution is made with."""
    for key, given in (('conv', conv), ('norm', norm)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f'{key}={given!r} must be a dict of arguments, such as {{}}'
            )
    if conv is not None:
        kind = conv.get('type', 'WSConv2d')
        name = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
        legal = 'WSConv1d', 'WSConv2d', 'WSConv3d'
        if name not in legal:
            raise ValueError(
                f'conv=dict(type={kind!r}): convert makes '
                f'{", ".join(legal)}. Leave type out'
            )
        options = without_type(conv)
        _reject_unknown('WSConv2d', 'conv', options, ('eps', 'eps_mode'))
        with _own_words():
            check_eps(options.get('eps', 1e-5), 'conv')
            eps_mode = options.get('eps_mode', 'outside')
            check_choice('eps_mode', eps_mode, EPS_MODES, 'conv')


def _reject_unknown(
    layer: str, key: str, options: dict[str, Any], legal: Sequence[str]
) -> None:
    unknown = {n: options[n] for n in sorted(options.keys() - {*legal})}
    reject_unknown(layer, key, unknown, legal)


def without_type(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a layer, from what also names it."""
    return {k: v for k, v in (options or {}).items() if k != 'type'}


@contextmanager
def _own_words(layer: str = '') -> Iterator[None]:
    """Let errors name the arguments of convert, not config keys."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = re.sub(r'\b(conv|norm)_cfg\b', r'\1', str(error))
        raise type(error)(f'{layer}: {text}' if layer else text) from None


def _looks_like_norm(module: nn.Module) -> bool:
    """Recognize a norm, also by its name and state."""
    if isinstance(module, NORMS) or replacement.is_batch_norm(module):
        return True
    return (
        'norm' in type(module).__name__.lower()
        and not isinstance(module, (CONVS, nn.Linear))
        and bool(module._parameters or module._buffers)
    )


def _needs_a_batch(norm: nn.Module) -> bool:
    """Return whether a norm learns statistics from its batches."""
    if isinstance(norm, replacement.INSTANCE_NORMS):
        return False
    return bool({'running_mean', 'running_var'} & norm._buffers.keys())


def _mixes(norm: nn.Module, path: tuple[str, ...]) -> bool:
    """Return whether a norm sees the convolution mixed with others."""
    per_channel = isinstance(
        norm, (RunningStatistics, replacement.INSTANCE_NORMS)
    ) or replacement.is_batch_norm(norm)
    return 'add' in path or ('cat' in path and not per_channel)


def _inside(names: Sequence[str], model: nn.Module) -> set[nn.Module]:
    return {m for name in names for m in model.get_submodule(name).modules()}


def _within(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f'{part}.') for part in parts)
