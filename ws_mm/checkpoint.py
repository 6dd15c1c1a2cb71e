"""Checkpoints of other layouts and formats."""

import hashlib
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from mmengine.dist import barrier, get_rank
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from .compat import weights_only

# The authors' README names the inner normalization bn, their code pbn.
AUTHORS_INNER = ('pbn.', 'bn.')
CONVERTER = (
    'python tools/model_converters/convert_checkpoint.py OLD NEW --norm bcn'
)
# Version of the state of a standardized convolution. torch writes it into
# every state dict, so that its filters can be told from plain ones.
STANDARDIZED = 2
# Version of the state of a centered one; deformable ones have 3.
CENTERED = 4


@CheckpointLoader.register_scheme(  # type: ignore[untyped-decorator]
    # mmengine asks first for what sorts last.
    prefixes=[r'https?://.*\.safetensors$', r'.*\.safetensors$'],
    force=True,
)
def load_from_safetensors(
    filename: str, map_location: Any = None
) -> dict[str, Any]:
    """Read a .safetensors file, wherever mmengine takes a checkpoint.

    Args:
        filename: a path or URL.
        map_location: device of the tensors; a function, or a dict of
            devices, leaves them on the CPU.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f'{filename} needs safetensors. Install it with: pip install '
            'safetensors'
        ) from error
    if filename.startswith(('http://', 'https://')):
        filename = _downloaded(filename)
    device = map_location or 'cpu'
    if callable(device) or isinstance(device, Mapping):
        device = 'cpu'
    with safe_open(os.path.expanduser(filename), 'pt', device='cpu') as file:
        state = OrderedDict(
            (name, file.get_tensor(name).to(device)) for name in file.keys()
        )
        header = file.metadata() or {}
    if 'ws_mm' in header:
        mark_standardized(state)
    return dict(state_dict=state)


def _downloaded(url: str) -> str:
    """Keep a file where torch keeps those that it downloads.

    Rank 0 first, as mmengine does; then those that do not see its disk.
    """
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    # Many URLs end in the same name, such as model.safetensors.
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = os.path.join(folder, f'{digest}.safetensors')

    def fetch() -> None:
        if not os.path.isfile(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)

    if get_rank() == 0:
        fetch()
    barrier()
    fetch()
    return path


# File names of releases whose filters were trained standardized, as
# OpenMMLab and the authors write them: resnet50_gn_ws-15beedd8.pth,
# R-50-GN-WS.pth.tar, rn50_bcn_ws.pth.
_RELEASE = r'(?i:[^/]*[_-](gn|bn|bcn)[_-]ws(?=[_.-])[^/]*\.(pth|tar))$'


@CheckpointLoader.register_scheme(  # type: ignore[untyped-decorator]
    prefixes=[
        r'open-mmlab://jhu/\w+_gn_ws$',
        r'openmmlab://jhu/\w+_gn_ws$',
        rf'https?://.*/{_RELEASE}',
        rf'(.*/)?{_RELEASE}',
    ],
    force=True,
)
def load_from_release(
    filename: str, map_location: Any = None
) -> dict[str, Any]:
    """Read a release of a GN+WS, BN+WS or BCN+WS network and mark it.

    Args:
        filename: a path or URL whose name says so.
        map_location: device of the tensors.
    """
    scheme = ''.join(filename.partition('://')[:2])
    if '://' not in filename:
        scheme = ''
    load = CheckpointLoader._get_checkpoint_loader(scheme)
    content: dict[str, Any] = load(filename, map_location=map_location)
    if not isinstance(content, dict):
        return content  # mmengine rejects it
    key = 'state_dict' if 'state_dict' in content else None
    found = content[key] if key else content
    state = OrderedDict(found)
    # torch's convolutions have version 1, and know nothing of it.
    state._metadata = getattr(  # type: ignore[attr-defined]
        found, '_metadata', {}
    )
    mark_standardized(state)
    return {**content, key: state} if key else state


def mark_standardized(state: OrderedDict[str, Any]) -> None:
    """Mark the filters of a state dict as those of WS convolutions.

    Those of layers with later versions, such as deformable ones, have them.
    """
    versions: OrderedDict[str, Any] = OrderedDict(
        (name.removeprefix('module.'), version)
        for name, version in getattr(state, '_metadata', {}).items()
    )
    for name, values in state.items():
        if not isinstance(values, torch.Tensor) or values.dim() < 3:
            continue
        layer = name.removeprefix('module.').removesuffix('.weight')
        version = versions.get(layer, {}).get('version') or 1
        if name.endswith('.weight') and version < STANDARDIZED:
            versions[layer] = dict(version=STANDARDIZED)
    state._metadata = versions  # type: ignore[attr-defined]


def without_prefix(
    state: Mapping[str, Any], prefix: str = 'module.'
) -> OrderedDict[str, Any]:
    """Copy a state dict without a prefix, with the versions of its layers.

    torch keeps those in an attribute of the dict, which a plain copy loses.
    """
    copied = OrderedDict(
        (name.removeprefix(prefix), values) for name, values in state.items()
    )
    versions = getattr(state, '_metadata', None)
    if versions is not None:
        copied._metadata = OrderedDict(  # type: ignore[attr-defined]
            # The entry of a layer has the layer's name, without a dot.
            (f'{name}.'.removeprefix(prefix)[:-1], version)
            for name, version in versions.items()
        )
    return copied


def differing_prefixes(
    theirs: Iterable[str], ours: Collection[str]
) -> tuple[str, str]:
    """Prefixes by which the names of a checkpoint and a model differ.

    Args:
        theirs: names of a checkpoint, none of which is among ``ours``.
        ours: names of a model.

    Returns:
        A prefix of ``theirs`` and one of ``ours``; ('', '') if most names
        differ in more than that.
    """
    theirs = list(theirs)
    best, extra, part = 1, '', ''
    tops = {name.partition('.')[0] + '.' for name in ours if '.' in name}
    for top in ('', *sorted(tops)):
        inner = {
            name.removeprefix(top) for name in ours if name.startswith(top)
        }
        counts: Counter[str] = Counter()
        for name in theirs:
            parts = name.split('.')
            counts.update(
                ''.join(f'{each}.' for each in parts[:n])
                for n in range(len(parts))
                if '.'.join(parts[n:]) in inner
            )
        for prefix, count in counts.most_common(1):
            if count > max(best, min(len(inner), len(theirs)) // 2):
                best, extra, part = count, prefix, top
    return extra, part


def to_native_layout(
    state_dict: dict[str, Any],
    prefix: str,
    num_features: int,
    outer_affine: str,
    num_groups: int | None = None,
) -> str:
    """Rename the entries of one BCN layer in a checkpoint, in place.

    ======================================  ============================
    layout under prefix                     action
    ======================================  ============================
    ``bn_weight``, ``running_mean``, ...    BCN's own: kept; an outer
                                            affine per group is repeated
                                            per channel, else rejected
    ``pbn.weight``, ``weight`` (1, G, 1)    the authors' BCN: mapped
    ``weight``, ``bias`` alone              GN: exact, with estimates
                                            (0, 1), if the outer affine
                                            is per channel, else rejected
    ``weight``, ``running_mean``, ...       BN: rejected
    ======================================  ============================

    Args:
        state_dict: state dict of the checkpoint.
        prefix: prefix of the layer's entries.
        num_features: channels of the layer.
        outer_affine: outer_affine of the layer.
        num_groups: groups of the layer; None is not compared.

    Returns:
        A line that says what was mapped; '' if nothing was.

    Raises:
        ValueError: the entries belong to another kind of layer.
    """
    name = prefix[:-1]

    def has(name: str) -> bool:
        return prefix + name in state_dict

    for inner in AUTHORS_INNER:
        entries = 'weight', 'bias', f'{inner}weight', f'{inner}running_mean'
        if all(map(has, entries)):
            _map_authors(state_dict, prefix + inner, prefix)
            _fit_outer(
                state_dict, prefix, num_features, outer_affine, num_groups
            )
            return (
                f"{name}: the authors' BCN: weight, bias -> weight, bias "
                f'({outer_affine}); {inner}weight, {inner}bias -> bn_weight, '
                f'bn_bias; {inner}running_mean, {inner}running_var -> '
                'running_mean, running_var'
            )
    if has('bn_weight'):
        return _fit_outer(
            state_dict, prefix, num_features, outer_affine, num_groups
        )
    # A batch norm without an affine has no weight, and BCN counts nothing.
    is_batch_norm = has('weight') or has('num_batches_tracked')
    if has('running_mean') and is_batch_norm:
        raise ValueError(
            f'{name}: the checkpoint holds a plain BatchNorm here, '
            'and BCN normalizes differently: loaded, its affine would mean '
            'something else. Use a BCN or a GN checkpoint, train from '
            'scratch (backbone.init_cfg=None, load_from=None), or make a '
            f'start for training of a ResNet with: {CONVERTER} --approximate'
        )
    if not has('weight'):
        return ''
    if outer_affine != 'channel':
        raise ValueError(
            f'{name}: the checkpoint holds a GroupNorm here, whose '
            'affine is per channel, and this BCN has one per group. Set '
            "norm_cfg=dict(outer_affine='channel') to load it exactly, or "
            f'convert a ResNet, verified, with: {CONVERTER} --ws-source'
        )
    # load_state_dict(assign=True) takes dtypes and devices, too.
    ones = torch.ones_like(state_dict[f'{prefix}weight'])
    exact = ones.to(torch.promote_types(ones.dtype, torch.float32))
    for name, values in (
        ('bn_weight', ones),
        ('bn_bias', 0 * ones),
        ('running_mean', 0 * exact),
        ('running_var', exact),
    ):
        state_dict[prefix + name] = values.clone()
    return (
        f'{prefix[:-1]}: GroupNorm: weight, bias -> weight, bias; created '
        'bn_weight 1, bn_bias 0, running_mean 0, running_var 1'
    )


def _fit_outer(
    state_dict: dict[str, Any],
    prefix: str,
    num_features: int,
    outer_affine: str,
    num_groups: int | None,
) -> str:
    """Repeat an outer affine per group where it is kept per channel."""
    outer = state_dict.get(f'{prefix}weight')
    inner = state_dict[f'{prefix}bn_weight']
    if outer is None or f'{prefix}bias' not in state_dict:
        return ''  # torch reports it.
    if inner.numel() != num_features:
        return ''  # Other channels: torch reports them.
    found = outer.numel()
    per_channel = outer_affine == 'channel'
    if found == (num_features if per_channel else num_groups or found):
        return ''
    if found == num_features:
        fix = (
            "norm_cfg=dict(outer_affine='channel') if it is one per channel, "
            f'norm_cfg=dict(num_groups={found}) if its groups are of one '
            'channel each'
        )
        what = (
            f'an outer affine of {found} entries, this BCN of {num_features} '
            f'channels one of {num_groups}, per group'
        )
    elif num_groups not in (None, found):
        fix = f'norm_cfg=dict(num_groups={found})'
        what = f'{found} groups here, this BCN {num_groups}'
    else:
        for name in ('weight', 'bias'):
            state_dict[prefix + name] = state_dict[
                prefix + name
            ].repeat_interleave(num_features // found)
        return (
            f'{prefix[:-1]}: BCN: weight, bias of {found} groups -> weight, '
            f'bias of {num_features} channels'
        )
    raise ValueError(
        f'{prefix[:-1]}: the checkpoint has {what}: it would compute '
        f'something else. Set {fix}'
    )


def reject_other_name(prefix: str, unexpected: list[str]) -> None:
    """Reject a checkpoint that has a GroupNorm under another name.

    Args:
        prefix: prefix of a BCN layer for which the checkpoint has nothing.
        unexpected: names that the model has no place for.

    Raises:
        ValueError: ``gn1`` is there for ``bn1``.
    """
    above, dot, name = prefix[:-1].rpartition('.')
    other = f'{above}{dot}{re.sub("^bn", "gn", name)}'
    if other == prefix[:-1] or f'{other}.weight' not in unexpected:
        return
    raise ValueError(
        f'{prefix[:-1]}: the checkpoint holds a GroupNorm named {other}; '
        'loaded by name, every BCN would stay as it was initialised. Use '
        "init_cfg=dict(type='ws_mm.PretrainedGN', checkpoint=...) with "
        "norm_cfg=dict(type='ws_mm.BCN', outer_affine='channel'), or, for a "
        f"ResNet with torchvision's names, {CONVERTER} --ws-source"
    )


def _map_authors(state_dict: dict[str, Any], inner: str, prefix: str) -> None:
    for name in ('weight', 'bias'):
        state_dict[prefix + name] = state_dict[prefix + name].flatten()
    for name, own in (
        ('weight', 'bn_weight'),
        ('bias', 'bn_bias'),
        ('running_mean', 'running_mean'),
        ('running_var', 'running_var'),
    ):
        if inner + name in state_dict:  # else torch reports it
            state_dict[prefix + own] = state_dict.pop(inner + name)
    for name in ('num_batches_tracked', 'estbn_moving_speed'):
        state_dict.pop(inner + name, None)


def from_batch_norm(
    state_dict: dict[str, Any], prefix: str, outer: torch.Tensor | None
) -> None:
    """Turn the entries of a BatchNorm into those of a BCN, in place.

    The result computes another function: the running statistics become the
    estimates, the affine the inner one, and the normalization over groups
    is new, with outer affine (1, 0).

    Args:
        state_dict: state dict with the entries of the BatchNorm.
        prefix: prefix of these entries.
        outer: tensor of the shape of the outer affine; None for a layer
            without affines.
    """
    for name in ('weight', 'bias'):
        if prefix + name in state_dict:
            state_dict[f'{prefix}bn_{name}'] = state_dict.pop(prefix + name)
    if outer is not None:
        mean = state_dict[f'{prefix}running_mean']
        # A BatchNorm without an affine becomes a BCN with one.
        state_dict.setdefault(f'{prefix}bn_weight', torch.ones_like(mean))
        state_dict.setdefault(f'{prefix}bn_bias', torch.zeros_like(mean))
        state_dict[f'{prefix}weight'] = torch.ones_like(outer)
        state_dict[f'{prefix}bias'] = torch.zeros_like(outer)
    state_dict.pop(f'{prefix}num_batches_tracked', None)


@WEIGHT_INITIALIZERS.register_module()
class PretrainedGN(PretrainedInit):
    """Start a BCN model from a GroupNorm checkpoint, exactly.

    For checkpoints of OpenMMLab's names (``gn1``, ``layer1.0.gn1``), such as
    ``open-mmlab://jhu/resnext101_32x4d_gn_ws``. The model's BCN layers need
    ``outer_affine='channel'``; their estimates start at (0, 1), where BCN
    equals the GroupNorm of the checkpoint.

    Args:
        checkpoint: path or URL, as in ``init_cfg=dict(type='Pretrained')``.
        prefix: prefix to remove from the names of the checkpoint, such as
            ``'module.encoder_q.'``.
        map_location: device of the loaded tensors.

    Raises:
        ValueError: the checkpoint has no name of the model.
    """

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into ``module``."""
        # mmengine initialises the parts after any type but 'Pretrained',
        # which would overwrite the loaded values.
        for part in module.children():
            if hasattr(part, 'init_weights') and not getattr(
                part, 'is_init', False
            ):
                part.init_weights()  # type: ignore[operator]
                part.is_init = True  # type: ignore[assignment]
        prefix = self.prefix and f'{self.prefix.rstrip(".")}.'
        with weights_only():
            content = load_checkpoint(
                module,
                self.checkpoint,
                map_location=self.map_location,
                logger='current',
                revise_keys=[
                    (rf'^{re.escape(prefix or "module.")}', ''),
                    (r'\bgn(\d*)\b', r'bn\1'),
                ],
            )
        theirs = {
            re.sub(r'\bgn(\d*)\b', r'bn\1', name)
            for name in content.get('state_dict', content)
        }
        ours = module.state_dict().keys()
        if any(
            name.removeprefix(prefix or 'module.') in ours for name in theirs
        ):
            return
        extra, _ = differing_prefixes(theirs, ours)
        fix = f' Set init_cfg=dict(prefix={extra!r}).' if extra else ''
        has, wants = (
            f'{min(names)!r}...' if names else 'nothing'
            for names in (theirs, ours)
        )
        raise ValueError(
            f'{self.checkpoint} has no name of the model: it has {has}, the '
            f'model {wants}.{fix}'
        )
