"""BCN that takes the place of a trained batch norm."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import check_group_size
from ..kernels.plain import of_channels
from ..norm import fit_num_groups
from ..running_statistics import moments_of_both
from ._maps import affine_of_maps, joined_moments, moments_of_maps
from ._norm import RunningNorm, per_channel


@MODELS.register_module()
class EasedBCN(RunningNorm):
    """BCN whose second normalization begins as the identity.

    Formula, with mean and var the running values after their update, and
    group_mean and group_var of z, per image and group of channels:
        z = (input - mean) / sqrt(var + eps) * weight + bias
        y = (z - group_mean) / sqrt(group_var + eps) * gn_weight + gn_bias
        output = z + gate * (y - z)
    with a learned gate per channel, 0 at the start. With gate 1 it is BCN in
    mode 'estimate'; with gate 0 a batch norm that its running values
    normalize in training, too. Their update is that of
    :func:`~ws_mm.functional.updated_estimates`.

    Names are those of ``nn.BatchNorm2d``: its checkpoint loads as it is, and
    evaluates to the same function.

    Convention: ours, not published. It is for layers that have trained
        statistics. Without them nothing is normalized at first, of which
        SyncEstimatesHook warns: take GN or BCN there, as in the heads behind
        a pretrained backbone.
    State: ``weight``, ``bias``, ``gate``, ``running_mean`` and
        ``running_var`` per channel, ``gn_weight`` and ``gn_bias`` per group.

    Args: those of :class:`~ws_mm.zoo._norm.RunningNorm`, and
        momentum: share of the newest batch in the running values.
        num_groups: groups of the second normalization, as of ``BCN``: None
            means 32, or fewer, so that each group has two channels.

    Source: docs/results/pretrained.md. BCN is arXiv 1911.09738.
    """

    statistics: ClassVar = {'running_mean': 0.0, 'running_var': 1.0}
    continues_batch_norm = True
    running_mean: Tensor
    gate: nn.Parameter
    gn_weight: nn.Parameter | None
    gn_bias: nn.Parameter | None
    join = staticmethod(moments_of_both)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        *args: Any,
        num_groups: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, *args, **kwargs)
        # That of nn.GroupNorm, too, which is otherwise not used here.
        self.num_groups = fit_num_groups(
            num_features, num_groups, layer='EasedBCN'
        )
        for name, initial in (('gn_weight', 1.0), ('gn_bias', 0.0)):
            self.add_parameter(
                name, initial, self.num_groups, exists=self.affine
            )
        self.add_parameter('gate', 0.0, num_features)

    def normalize(self, x: Tensor) -> Tensor:
        """Both steps as one scale and shift per channel of an image."""
        check_group_size(x, self.num_groups, 'EasedBCN')
        means, variances = moments_of_maps(x)
        if self.begin_forward(x):
            new_mean, new_var = of_channels(
                means.detach().flatten(1),
                variances.detach().flatten(1),
                self.running_mean,
            )
            batch = dict(running_mean=new_mean, running_var=new_var)
            self.move_statistics(batch, self.momentum)
        # z = scale * (x - mean) + shift
        mean, var = self.running(x)
        scale = (var + self.eps).rsqrt()
        shift = torch.zeros_like(scale)
        if self.weight is not None:
            scale = scale * per_channel(self.weight.to(x.dtype), x)
        if self.bias is not None:
            shift = shift + per_channel(self.bias.to(x.dtype), x)
        # y = factor * z + offset, of groups, then of their channels
        rows = 1, (self.num_groups, -1)
        z_means = (scale * (means - mean) + shift).unflatten(*rows)
        z_variances = (scale.square() * variances).unflatten(*rows)
        group_mean, group_var = joined_moments(z_means, z_variances, 2)
        factor = (group_var + self.eps).rsqrt()
        if self.gn_weight is not None:
            factor = factor * per_channel(self.gn_weight.to(x.dtype), factor)
        offset = -group_mean * factor
        if self.gn_bias is not None:
            offset = offset + per_channel(self.gn_bias.to(x.dtype), offset)
        factor = factor.expand_as(z_means).flatten(1, 2)
        offset = offset.expand_as(z_means).flatten(1, 2)
        gate = per_channel(self.gate.to(x.dtype), x)
        factor = 1 + gate * (factor - 1)
        shift = shift * factor + gate * offset
        return affine_of_maps(x, mean, scale * factor, shift)

    @classmethod
    def from_norm(
        cls, norm: Any, arguments: Mapping[str, Any]
    ) -> 'tuple[EasedBCN, dict[str, Tensor]]':
        """Take statistics and affine of a BatchNorm: the same function."""
        if isinstance(norm, nn.GroupNorm):
            raise ValueError(
                'EasedBCN takes the place of a batch norm, and this '
                f'{type(norm).__name__} has no running statistics. Use '
                "norm=dict(type='BCN'), which keeps its function"
            )
        return super().from_norm(norm, arguments)
