"""EvoNorm-B0 and EvoNorm-S0 (arXiv 2004.02967)."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..arguments import check_momentum
from ..functional import check_group_size
from ..norm import fit_num_groups
from ..running_statistics import RunningStatistics
from ._activating import ActivatingNorm
from ._batch import instance_moments
from ._norm import over_channels, per_channel


class _EvoNorm(ActivatingNorm):
    """What both have: ``v``, and scale and shift where no ReLU follows."""

    def __init__(self, num_features: int, *args: Any) -> None:
        super().__init__(num_features, *args)
        device, dtype = args[-2:]
        self.v = nn.Parameter(
            torch.empty(num_features, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Set scale and v to 1, shift to 0, statistics as built."""
        super().reset_parameters()
        if hasattr(self, 'v'):  # nn.GroupNorm calls this before it is made
            nn.init.ones_(self.v)

    def linear(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        shift = 0 * self.v
        if self.affine:
            x = x * per_channel(self.weight.to(x.dtype), x)
            shift = shift + self.bias
        return x + per_channel(shift.to(x.dtype), x)


@MODELS.register_module()
class EvoNormS0(_EvoNorm):
    """EvoNorm-S0: divides a Swish by the deviation of a group.

    Formula, with the biased variance of a group of channels of one image:
        output = weight * x sigmoid(v x) / sqrt(var + eps) + bias
        output = weight * x + bias        in the place of a norm without ReLU

    Convention: as in the official code, what stands in the place of a norm
        without ReLU (with ``replaces_act``, norm3 of a block) normalizes
        nothing, so use no weight standardization with it. The official code,
        too, lowers a number of groups that does not divide the channels;
        ours leaves two channels in each. Parameters have the names of timm's
        ``EvoNorm2dS0``, which raises a bare assertion there.
    State: ``weight``, ``bias`` and ``v``, one entry per channel.

    Args:
        num_features: channels of the input.
        num_groups: groups of channels; None means 32, or fewer, see
            :class:`~ws_mm.norm.BCN`.
        eps: constant added to the variance.
        affine: whether scale and shift are learned.
        replaces_act: whether the ReLU that directly follows becomes
            this layer, see :class:`~ws_mm.zoo._activating.ActivatingNorm`.
        device: device of the parameters.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown, or ``num_groups`` no whole number.
        ValueError: an argument has an illegal value; at a forward, a group
            has one value.

    Source: github.com/tensorflow/tpu, models/official/resnet/resnet_model.py.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        replaces_act: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            affine,
            replaces_act,
            unknown,
            device,
            dtype,
        )
        self.num_groups = fit_num_groups(
            num_features, num_groups, layer='EvoNormS0'
        )
        self.reset_parameters()

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the whole formula."""
        check_group_size(x, self.num_groups, 'EvoNormS0')
        groups = x.unflatten(1, (self.num_groups, -1))
        var = groups.var(tuple(range(2, groups.dim())), correction=0)
        std = (var + self.eps).sqrt()
        std = std.repeat_interleave(x.shape[1] // self.num_groups, 1)
        gate = torch.sigmoid(per_channel(self.v.to(x.dtype), x) * x)
        std = std.view(*x.shape[:2], *[1] * (x.dim() - 2))
        return self.scaled(x * gate / std)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return f'{super().extra_repr()}, num_groups={self.num_groups}'


@MODELS.register_module()
class EvoNormB0(RunningStatistics, _EvoNorm):
    """EvoNorm-B0: divides by a deviation of the batch or of the image.

    Formula, with biased variances, of a channel over the batch (in
    evaluation running_var) and over each image:
        batch = sqrt(var_batch + eps)
        image = v x + sqrt(var_image + eps)
        output = weight * x / max(batch, image) + bias
        running_var = (1 - momentum) running_var + momentum var_batch
        output = weight * x + bias        in the place of a norm without ReLU

    Convention: as the official code, running_var is biased, where timm's
        ``EvoNorm2dB0`` divides by zero for one value, and there is no
        normalization without a ReLU, see :class:`EvoNormS0`. Parameters and
        buffers have timm's names.
    State: ``weight``, ``bias`` and ``v``, one entry per channel; buffer
        ``running_var``. Training does not read it, and a layer without a
        ReLU never moves it.

    Args:
        num_features: channels of the input.
        eps: constant added to the variances.
        momentum: share of the newest batch in running_var, in (0, 1].
        affine: whether scale and shift are learned.
        replaces_act: whether the ReLU that directly follows becomes
            this layer, see :class:`~ws_mm.zoo._activating.ActivatingNorm`.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.
        **unknown: none; a misspelt argument is rejected by name.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has an illegal value; in training, a channel
            has one value.

    Source: github.com/tensorflow/tpu, models/official/resnet/resnet_model.py.
    """

    statistics: ClassVar = {'running_var': 1.0}

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        replaces_act: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            affine,
            replaces_act,
            unknown,
            device,
            dtype,
        )
        check_momentum(momentum, 'norm_cfg')
        self.momentum = momentum
        self.register_statistics(num_features, device, dtype)
        self.reset_parameters()

    @property
    def estimating(self) -> bool:
        """Return False: training normalizes by the batch."""
        return False

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the whole formula, and move running_var."""
        var = self.running_var.to(x.dtype)
        if self.training:
            if x.numel() == x.shape[1]:
                raise ValueError(
                    'EvoNormB0 needs more than one value per channel in '
                    f'training, got an input of shape {tuple(x.shape)}. Use '
                    "norm_cfg=dict(type='GN', num_groups=32) here"
                )
            var = x.var(over_channels(x), correction=0)
        if self.begin_forward(x):
            self.move_statistics({'running_var': var.detach()}, self.momentum)
        batch = per_channel((var + self.eps).sqrt(), x)
        image = (instance_moments(x)[1] + self.eps).sqrt()
        image = per_channel(self.v.to(x.dtype), x) * x + image
        return self.scaled(x / torch.maximum(batch, image))

    def batch_statistics(self, input: Tensor) -> dict[str, Tensor]:
        """The biased variance of each channel."""
        x = input.detach().double()
        return dict(running_var=x.var(over_channels(x), correction=0))
