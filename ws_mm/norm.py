"""Batch-Channel Normalization as a layer (arXiv 1911.09738)."""

import logging
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import (
    check_count,
    check_eps,
    check_flag,
    check_tensor_options,
    refuse_unknown,
)
from .checkpoint import refuse_other_name, report, to_native_layout
from .functional import batch_channel_norm, check_mode, check_not_symbolic

OUTER_AFFINES = ('group', 'channel')
ARGUMENTS = (
    *('num_features', 'num_groups', 'eps', 'momentum', 'affine', 'mode'),
    *('outer_affine', 'strict_groups', 'device', 'dtype'),
)


@MODELS.register_module()
class BCN(nn.GroupNorm):
    """Batch-channel normalization, by default from running estimates.

    A channel (group) normalization whose input is first normalized per
    channel, by estimates that need no large batch; see
    :func:`~ws_mm.functional.batch_channel_norm` for the formula and the
    modes. With estimates (0, 1), inner affine (1, 0) and
    ``outer_affine='channel'`` it is its own ``nn.GroupNorm``.

    State: parameters ``weight``, ``bias`` (outer affine, one entry per group
        or per channel) and ``bn_weight``, ``bn_bias`` (inner affine, per
        channel); buffers ``running_mean``, ``running_var`` (per channel,
        float32 whatever the dtype of the model). In training each forward
        updates the buffers; the recomputation of activation checkpointing
        does not, nor does an input that is infinite or NaN in the channels
        where it is.
    Distributed: mode 'estimate' does not communicate;
        :class:`~ws_mm.hooks.SyncEstimatesHook` averages the estimates after
        each iteration. Training in several processes without it is said
        once, by the first rank.
    Frozen: ``norm_eval=True`` of a backbone does not reach this layer: its
        estimates go on moving. ``frozen_stages`` puts it into eval mode:
        estimates and affines stay what the checkpoint made them, and the
        hooks of ``ws_mm`` warn where no checkpoint did.

    Args:
        num_features: channels of the input.
        num_groups: groups of the channel normalization. Where it does not
            divide ``num_features``, the largest smaller count that does.
        eps: added to both variances.
        momentum: update rate of the running values, in (0, 1]: the share
            that the newest batch gets. The authors published none for their
            estimates; 0.01 was best and steadiest at one image where rates
            from 0.01 to 0.3 were compared (docs/results.md). It takes a few
            hundred steps to forget the start: a shorter training wants 0.1,
            as do the batch modes and ``nn.BatchNorm2d``.
        affine: whether both affines are learned.
        mode: 'estimate' for batches of any size down to one image, 'batch'
            for large batches, 'sync_batch' for batches that are large over
            all ranks.
        outer_affine: 'group' as the authors' code, or 'channel' as
            ``nn.GroupNorm``, into which a GN checkpoint maps exactly.
        strict_groups: refuse a ``num_groups`` that does not divide
            ``num_features`` instead of lowering it.
        device: of parameters and buffers.
        dtype: of the parameters.
        **unknown: none; a misspelt argument is refused by name.

    Raises:
        TypeError: an argument is unknown or of the wrong type.
        ValueError: an argument has an illegal value; the message lists the
            legal ones.

    Example:
        >>> import torch, ws_mm
        >>> norm = ws_mm.BCN(64)
        >>> norm(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    # As in torchvision and in the authors' checkpoints: bn1, downsample.1.
    _abbr_ = 'bn'

    bn_weight: nn.Parameter | None
    bn_bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    # Values per channel that moved the estimates in this iteration, if
    # SyncEstimatesHook asks for them. No buffer: copies of the model made
    # before training (EMA) pair buffers by position.
    values_seen: Tensor | None = None
    # The rate of this iteration, if UpdateRateHook sets it. A compiler would
    # take momentum for a constant and compile again whenever it changes.
    update_rate: Tensor | None = None

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        mode: str = 'estimate',
        outer_affine: str = 'group',
        strict_groups: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown('BCN', 'norm_cfg', unknown, ARGUMENTS)
        check_count('num_features', num_features, 'norm_cfg')
        check_count('num_groups', num_groups, 'norm_cfg')
        check_eps(eps, 'norm_cfg')
        check_flag('affine', affine, 'norm_cfg')
        check_flag('strict_groups', strict_groups, 'norm_cfg')
        check_tensor_options(device, dtype, 'norm_cfg')
        check_mode(mode)
        if outer_affine not in OUTER_AFFINES:
            raise ValueError(
                f'outer_affine={outer_affine!r} must be one of '
                f'{", ".join(map(repr, OUTER_AFFINES))} '
                '(norm_cfg=dict(outer_affine=...))'
            )
        if (
            isinstance(momentum, bool)
            or not isinstance(momentum, (int, float))
            or not 0 < momentum <= 1
        ):
            raise ValueError(
                f'momentum={momentum!r}: the update rate must be a number '
                'in (0, 1] (norm_cfg=dict(momentum=...))'
            )
        num_groups = fit_num_groups(num_features, num_groups, strict_groups)
        super().__init__(
            num_groups, num_features, eps, False, device=device, dtype=dtype
        )
        self.num_features = num_features
        self.momentum = momentum
        self.affine = affine
        self.mode = mode
        self.outer_affine = outer_affine
        outer = num_groups if outer_affine == 'group' else num_features
        for name, size in (
            ('weight', outer),
            ('bias', outer),
            ('bn_weight', num_features),
            ('bn_bias', num_features),
        ):
            values = torch.empty(size, device=device, dtype=dtype)
            self.register_parameter(
                name, nn.Parameter(values) if affine else None
            )
        for name in ('running_mean', 'running_var'):
            values = torch.empty(num_features, device=device, dtype=dtype)
            if values.dtype in (torch.half, torch.bfloat16):
                values = values.float()
            self.register_buffer(name, values)
        self.reset_running_stats()
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the estimates to mean 0 and variance 1."""
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def reset_parameters(self) -> None:
        """Set both affines to scale 1 and shift 0."""
        if self.affine:
            for name in ('weight', 'bn_weight'):
                nn.init.ones_(getattr(self, name))
            for name in ('bias', 'bn_bias'):
                nn.init.zeros_(getattr(self, name))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        check_not_symbolic(input, 'BCN')
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f'BCN({self.num_features}) takes an input of shape '
                f'(N, {self.num_features}, *), got {tuple(input.shape)}'
            )
        if self.running_mean.dtype in (torch.half, torch.bfloat16):
            # FSDP with a buffer_dtype casts past _apply, once.
            self.running_mean = self.running_mean.float()
            self.running_var = self.running_var.float()
        # Activation checkpointing repeats the forward inside the backward.
        # A compiler decides itself what it recomputes, and keeps updates out.
        recomputed = (
            not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() != -1
        )
        if self.training and self.mode == 'estimate' and not recomputed:
            if self.values_seen is None:
                _report_unsynchronized()
            else:
                values = input.shape[0] * input.shape[2:].numel()
                self.values_seen.add_(values)
        momentum: Any = None
        if torch.compiler.is_compiling():
            momentum = self.update_rate
        return batch_channel_norm(
            input,
            self.num_groups,
            self.running_mean,
            self.running_var,
            self.bn_weight,
            self.bn_bias,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum if momentum is None else momentum,
            eps=self.eps,
            mode=self.mode,
            update=not recomputed,
        )

    def extra_repr(self) -> str:
        """The arguments that make this layer."""
        return (
            f'{self.num_features}, num_groups={self.num_groups}, '
            f'eps={self.eps}, momentum={self.momentum}, '
            f'affine={self.affine}, mode={self.mode!r}, '
            f'outer_affine={self.outer_affine!r}'
        )

    def _apply(self, fn: Any, recurse: bool = True) -> 'BCN':
        exact = {'running_mean': self.running_mean}
        exact['running_var'] = self.running_var
        super()._apply(fn, recurse)
        # model.half() must not round the estimates: a small update rate
        # would no longer move them.
        for name, values in exact.items():
            cast = getattr(self, name)
            if cast.dtype in (torch.half, torch.bfloat16):
                setattr(self, name, values.to(cast.device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if not any(name.startswith(prefix) for name in state_dict):
            # Of (metadata, strict, missing, unexpected, errors): what the
            # modules above have no place for.
            refuse_other_name(prefix, args[3])
        mapped = to_native_layout(
            state_dict,
            prefix,
            self.num_features,
            self.outer_affine,
            self.num_groups,
        )
        report(mapped)
        super()._load_from_state_dict(state_dict, prefix, *args)


def fit_num_groups(
    num_channels: int, num_groups: int, strict: bool = False
) -> int:
    """Return the largest divisor of num_channels up to num_groups.

    Raises:
        ValueError: ``num_groups`` is not positive, or does not divide
            ``num_channels`` while ``strict``.
    """
    if num_channels < 1 or num_groups < 1:
        raise ValueError(
            f'num_features={num_channels} and num_groups={num_groups} must '
            'both be at least 1 (norm_cfg=dict(num_groups=...))'
        )
    if num_channels % num_groups == 0:
        return num_groups
    fitting = next(
        groups
        for groups in range(min(num_groups, num_channels), 0, -1)
        if num_channels % groups == 0
    )
    if strict:
        raise ValueError(
            f'num_groups={num_groups} does not divide {num_channels} '
            f'channels; the largest count that does is {fitting} '
            '(norm_cfg=dict(num_groups=..., strict_groups=False))'
        )
    _report_fallback(num_channels, num_groups, fitting)
    return fitting


@cache
def _report_fallback(channels: int, asked: int, fitting: int) -> None:
    print_log(
        f'BCN: {asked} groups do not divide {channels} channels; layers of '
        f'{channels} channels use {fitting} groups',
        logger='current',
    )


_reported: list[str] = []


# While it traces, a compiler runs this and puts nothing into its graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report_unsynchronized() -> bool:
    if _reported or not (dist.is_available() and dist.is_initialized()):
        return False
    if dist.get_world_size() == 1 or dist.get_rank() != 0:
        return False
    message = (
        "BCN in mode='estimate' trains in several processes and nothing "
        'averages their estimates after each iteration: ranks differ, and a '
        'checkpoint holds those of rank 0. Add to the config: '
        "custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')] "
        '(SyncBuffersHook and broadcast_buffers=True do not replace it: the '
        "one comes after an iteration's checkpoint was saved, the other "
        'keeps what rank 0 saw)'
    )
    _reported.append(message)
    print_log(message, logger='current', level=logging.WARNING)
    return True
