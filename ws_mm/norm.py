"""Batch-Channel Normalization as a layer (arXiv 1911.09738)."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from .arguments import (
    check_choice,
    check_eps,
    check_momentum,
    reject_unknown,
)
from .checkpoint import reject_other_name, to_native_layout
from .functional import MODES, batch_channel_norm, largest_group_count
from .running_statistics import (
    RunningStatistics,
    channels_of,
    legal_arguments,
    measured_moments,
    moments_of_both,
    report_once,
)
from .symbolic import recorded

# Of Group Normalization and of the authors' BCN.
DEFAULT_GROUPS = 32
OUTER_AFFINES = ('group', 'channel')
ARGUMENTS = (
    *('running_mean', 'running_var'),
    *('bn_weight', 'bn_bias', 'weight', 'bias'),
)


@MODELS.register_module()
class BCN(RunningStatistics, nn.GroupNorm):
    """Batch-channel normalization, by default from running estimates.

    A channel (group) normalization whose input is first normalized per
    channel, by estimates that need no large batch; see
    :func:`~ws_mm.functional.batch_channel_norm` for the formula and the
    modes. With estimates (0, 1), inner affine (1, 0) and
    ``outer_affine='channel'`` it is its own ``nn.GroupNorm``.

    State: parameters ``weight``, ``bias`` (outer affine, one entry per group
        or per channel) and ``bn_weight``, ``bn_bias`` (inner affine, per
        channel); buffers ``running_mean``, ``running_var``, see
        :class:`~ws_mm.running_statistics.RunningStatistics`.
    Distributed: mode 'estimate' does not communicate;
        :class:`~ws_mm.hooks.SyncEstimatesHook` averages the estimates after
        each iteration. Rank 0 warns once if the hook is missing.
    Compiled: ``torch.compile`` goes with activation checkpointing since torch
        2.7. Before, a recomputation reads estimates that have moved, and
        gradients are wrong without an error.
    Frozen: ``norm_eval=True`` of a backbone does not reach this layer: its
        estimates keep moving. ``frozen_stages`` puts it into eval mode:
        estimates and affines stay those of the checkpoint, and the hooks of
        ``ws_mm`` warn if there was none.

    Args:
        num_features: channels of the input.
        num_groups: groups of the channel normalization. None means 32, or
            fewer, so that each group has two channels. A count that does
            not divide ``num_features`` becomes the largest smaller one that
            does and leaves two channels per group. As many groups as
            channels are kept: that is an instance norm, which a warning
            says once in training.
        eps: constant added to both variances.
        momentum: share of the newest batch in the running values, in (0, 1].
            The authors published none for their estimates; 0.01 was best
            and steadiest at one image among 0.01 to 0.3, see
            docs/results/momentum.md.
            It takes a few hundred steps to forget the start: use 0.1 for a
            shorter training, for the batch modes and as in
            ``nn.BatchNorm2d``. A captured CUDA graph keeps the value that it
            was captured with, as of ``nn.BatchNorm2d``: capture again after
            a change.
        affine: whether both affines are learned.
        mode: 'estimate' for batches of any size down to one image, 'batch'
            for large batches, 'sync_batch' for batches that are large over
            all ranks.
        outer_affine: 'group' as the authors' code, or 'channel' as
            ``nn.GroupNorm``, into which a GN checkpoint maps exactly.
        strict_groups: whether to reject a ``num_groups`` that does not
            divide ``num_features`` instead of lowering it.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown, or ``num_groups`` no whole number.
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

    statistics: ClassVar = {'running_mean': 0.0, 'running_var': 1.0}

    bn_weight: nn.Parameter | None
    bn_bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
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
        reject_unknown('BCN', 'norm_cfg', unknown, legal_arguments(BCN))
        check_eps(eps, 'norm_cfg', positive=True)  # F.batch_norm needs it
        check_momentum(momentum, 'norm_cfg')
        check_choice('mode', mode, MODES, 'norm_cfg')
        check_choice('outer_affine', outer_affine, OUTER_AFFINES, 'norm_cfg')
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
        self.register_statistics(num_features, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the estimates to (0, 1) and both affines to scale 1, shift 0.

        Builders without memory (FSDP, ``to_empty``) call only this, on every
        module that has parameters or buffers.
        """
        if not self._buffers:  # nn.GroupNorm calls this before they are made
            return
        self.reset_running_stats()
        if self.affine:
            for name in ('weight', 'bn_weight'):
                nn.init.ones_(getattr(self, name))
            for name in ('bias', 'bn_bias'):
                nn.init.zeros_(getattr(self, name))

    @recorded
    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, num_features, *)."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f'BCN({self.num_features}) takes an input of shape '
                f'(N, {self.num_features}, *), got {tuple(input.shape)}'
            )
        update = self.begin_forward(input)
        if self.training and self.num_groups == self.num_features > 1:
            _report_instance_norm(self.num_features)
        mean, var, bn_weight, bn_bias, weight, bias = self._values()
        return batch_channel_norm(
            input,
            self.num_groups,
            mean,
            var,
            bn_weight,
            bn_bias,
            weight,
            bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            mode=self.mode,
            update=update,
        )

    def _values(self) -> list[Tensor]:
        """Running values and affines, in the order of the function.

        FSDP and parametrizations take parameters out of torch's own dicts,
        which are four times as fast as attributes of a module.
        """
        own: dict[str, Any] = {**self._buffers, **self._parameters}
        return [
            own[name] if name in own else getattr(self, name)
            for name in ARGUMENTS
        ]

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return (
            f'{self.num_features}, num_groups={self.num_groups}, '
            f'eps={self.eps}, momentum={self.momentum}, '
            f'affine={self.affine}, mode={self.mode!r}, '
            f'outer_affine={self.outer_affine!r}'
        )

    @property
    def estimating(self) -> bool:
        """Return whether the mode is 'estimate'."""
        return self.mode == 'estimate'

    @property
    def synchronizes(self) -> bool:
        """Return whether the mode is 'sync_batch'."""
        return self.mode == 'sync_batch'

    def measure(self, input: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Moments of a batch: biased variance for estimates."""
        return measured_moments(
            input, self.synchronizes, unbiased=not self.estimating
        )

    def join(
        self,
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        share: Tensor,
    ) -> dict[str, Tensor]:
        """Moments of two sets of values; estimates count their distance."""
        if self.estimating:
            return moments_of_both(first, second, share)
        return super().join(first, second, share)

    @classmethod
    def from_norm(
        cls, norm: Any, arguments: Mapping[str, Any]
    ) -> 'tuple[BCN, dict[str, Tensor]]':
        """Make the BCN that takes the place of a norm.

        Convention: a GroupNorm keeps its groups and its affine, which becomes
            the outer one, with estimates (0, 1): the same function. The
            statistics and the affine of a BatchNorm become the estimates and
            the inner affine: another function. If weight and bias are all 0
            (zero_init_residual), the outer weight is 0 instead. eps is that
            of the norm, or 1e-5 where it has 0, since a constant group has no
            variance.
        """
        is_group_norm = isinstance(norm, nn.GroupNorm)
        # Without one: the constant of DETR's FrozenBatchNorm2d, as torch's.
        options: dict[str, Any] = dict(
            eps=float(getattr(norm, 'eps', 1e-5)) or 1e-5,
            affine=norm.weight is not None,
        )
        if is_group_norm:
            options |= dict(num_groups=norm.num_groups, outer_affine='channel')
        layer = cls(channels_of(norm), **{**options, **arguments})
        kind = type(norm).__name__
        if is_group_norm and layer.num_groups != norm.num_groups:
            raise ValueError(
                f'this {kind} has {norm.num_groups} groups, and BCN with '
                f'norm=dict(num_groups={arguments.get("num_groups")}) has '
                f'{layer.num_groups}: another function. Leave num_groups out'
            )
        if norm.weight is not None and not layer.affine:
            raise ValueError(
                f'norm=dict(affine=False) would drop the weight and bias of '
                f'this {kind}. Leave affine out'
            )
        sources: dict[str, Tensor] = {}
        if not is_group_norm:
            sources = {name: getattr(norm, name) for name in cls.statistics}
        for own in ('weight', 'bias'):
            values = getattr(norm, own)
            if not layer.affine or values is None:
                continue
            if is_group_norm and layer.outer_affine == 'group':
                rows = values.detach().view(norm.num_groups, -1)
                if not rows.is_meta and not rows.eq(rows[:, :1]).all():
                    raise ValueError(
                        f'the {own} of this {kind} differs within its groups, '
                        "and norm=dict(outer_affine='group') has one for "
                        "each. Use norm=dict(outer_affine='channel')"
                    )
                values = values[:: rows.shape[1]]
            sources[own if is_group_norm else f'bn_{own}'] = values
        if 'bn_weight' in sources and _is_zero(norm):
            # zero_init_residual. In the inner affine, one step would bring
            # the branch to full size: the second normalization scales it up.
            del sources['bn_weight']
            sources['weight'] = torch.zeros_like(layer.weight)
        return layer, sources

    def folded(self) -> tuple[Tensor, Tensor, nn.Module]:
        """Split into the first step and the GroupNorm that is the second."""
        scale = (self.running_var.double() + self.eps).rsqrt()
        shift = -self.running_mean.double() * scale
        if self.bn_weight is not None and self.bn_bias is not None:
            scale = scale * self.bn_weight
            shift = shift * self.bn_weight + self.bn_bias
        left = nn.GroupNorm(
            self.num_groups, self.num_features, self.eps, self.affine
        )
        if self.affine:
            for name in ('weight', 'bias'):
                values = getattr(self, name)
                repeats = self.num_features // values.numel()
                values = nn.Parameter(
                    values.repeat_interleave(repeats), values.requires_grad
                )
                setattr(left, name, values)
        return scale, shift, left.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if not any(name.startswith(prefix) for name in state_dict):
            # Of (metadata, strict, missing, unexpected, errors): what the
            # modules above have no place for.
            reject_other_name(prefix, args[3])
        mapped = to_native_layout(
            state_dict,
            prefix,
            self.num_features,
            self.outer_affine,
            self.num_groups,
        )
        if mapped:
            print_log(mapped, logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)


def _is_zero(norm: Any) -> bool:
    affine = [v for v in (norm.weight, norm.bias) if v is not None]
    return not any(values.is_meta or values.any() for values in affine)


def fit_num_groups(
    num_channels: int,
    num_groups: int | None = None,
    strict: bool = False,
    layer: str = 'BCN',
) -> int:
    """Number of groups of a layer.

    Args:
        num_channels: channels of the layer.
        num_groups: requested count; None means 32, or fewer, so that each
            group has two channels.
        strict: whether to reject a count that does not divide num_channels.
            Otherwise it becomes the largest smaller one that does and leaves
            two channels per group.
        layer: class name of the layer.

    Raises:
        TypeError: ``num_groups`` is no whole number.
        ValueError: ``num_groups`` is not positive, or does not divide
            ``num_channels`` while ``strict``.
    """
    asked = DEFAULT_GROUPS if num_groups is None else num_groups
    if isinstance(asked, bool) or not hasattr(asked, '__index__'):
        raise TypeError(
            f'num_groups={num_groups!r} must be a whole number '
            '(norm_cfg=dict(num_groups=...))'
        )
    if num_channels < 1 or asked < 1:
        raise ValueError(
            f'num_features={num_channels} and num_groups={asked} must '
            'both be at least 1 (norm_cfg=dict(num_groups=...))'
        )
    fitting = largest_group_count(num_channels, asked)
    if num_channels % asked == 0 and (
        asked < num_channels or num_groups is not None
    ):
        return asked
    if strict and num_channels % asked:
        raise ValueError(
            f'num_groups={asked} does not divide {num_channels} '
            f'channels; the largest count that does is {fitting} '
            '(norm_cfg=dict(num_groups=..., strict_groups=False))'
        )
    _report_fallback(layer, num_channels, asked, fitting)
    return fitting


@cache
def _report_fallback(
    layer: str, channels: int, asked: int, fitting: int
) -> None:
    why = f'do not divide {channels} channels'
    if asked == channels:
        why = f'leave one of {channels} channels to each'
    print_log(
        f'{layer}: {asked} groups {why}; layers of {channels} channels use '
        f'{fitting} groups',
        logger='current',
    )


# While it traces, a compiler runs this and puts nothing into its graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report_instance_norm(channels: int) -> bool:
    fewer = largest_group_count(channels, channels)
    return report_once(
        f'BCN: num_groups={channels} of {channels} channels leaves one '
        'channel per group. That is an instance norm: estimates and inner '
        f'affine do nothing in it. Set norm_cfg=dict(num_groups={fewer}), '
        'or leave num_groups out'
    )
