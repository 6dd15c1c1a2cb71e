"""EvoNorm-B0 and EvoNorm-S0 (arXiv 2004.02967)."""

from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import check_group_size
from ..norm import fit_num_groups
from ._activating import ActivatingNorm
from ._maps import affine_of_maps, joined_moments, moments_of_maps
from ._norm import RunningNorm, per_channel


class _EvoNorm(ActivatingNorm):
    """Base of both: ``v``, and scale and shift where no ReLU follows."""

    v: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_parameter('v', 1.0, self.num_features)

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
        nothing, so use no weight standardization with it. A number of groups
        that does not divide the channels is lowered, as there; ours leaves
        two channels in each. Names are those of timm's ``EvoNorm2dS0``.
    State: ``weight``, ``bias`` and ``v``, one entry per channel.

    Args: those of :class:`~ws_mm.zoo._activating.ActivatingNorm`, and
        num_groups: see :class:`~ws_mm.norm.BCN`.

    Source: github.com/tensorflow/tpu, models/official/resnet/resnet_model.py.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, affine, **kwargs)
        groups = fit_num_groups(num_features, num_groups, layer='EvoNormS0')
        self.num_groups = groups

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the whole formula."""
        check_group_size(x, self.num_groups, 'EvoNormS0')
        groups = 1, (self.num_groups, -1)
        mean, var = moments_of_maps(x)
        mean, var = mean.unflatten(*groups), var.unflatten(*groups)
        std = (joined_moments(mean, var, 2)[1] + self.eps).sqrt()
        std = std.expand_as(mean).flatten(1, 2)
        gate = torch.sigmoid(per_channel(self.v.to(x.dtype), x) * x)
        return self.scaled_maps(x * gate, torch.zeros_like(std), 1 / std)


@MODELS.register_module()
class EvoNormB0(RunningNorm, _EvoNorm):
    """EvoNorm-B0: divides by a deviation of the batch or of the image.

    Formula, with biased variances, of a channel over the batch (in
    evaluation running_var) and over each image:
        batch = sqrt(var_batch + eps)
        image = v x + sqrt(var_image + eps)
        output = weight * x / max(batch, image) + bias
        running_var = (1 - momentum) running_var + momentum var_batch
        output = weight * x + bias        in the place of a norm without ReLU

    Convention: as in the official code, running_var is biased, and nothing is
        normalized without a ReLU, see :class:`EvoNormS0`. Names are those of
        timm's ``EvoNorm2dB0``, which divides by zero for one value.
    State: ``weight``, ``bias`` and ``v``, one entry per channel; buffer
        ``running_var``, which a layer without a ReLU never moves.

    Args: those of :class:`~ws_mm.zoo._activating.ActivatingNorm`, and
        momentum: share of the newest batch in running_var, in (0, 1].

    Source: github.com/tensorflow/tpu, models/official/resnet/resnet_model.py.
    """

    statistics: ClassVar = {'running_var': 1.0}
    estimating = False

    def activated(self, x: Tensor, linear: Tensor | None = None) -> Tensor:
        """Apply the whole formula, and move running_var."""
        of_maps = moments_of_maps(x)
        (var,) = self.running(x)
        if self.training:
            self.check_values(x)
            var = joined_moments(*of_maps, 0)[1]
            if self.begin_forward(x):
                batch = dict(running_var=var.flatten())
                self.move_statistics(batch, self.momentum)
        deviation = (var + self.eps).sqrt()
        image = (of_maps[1] + self.eps).sqrt()
        v = per_channel(self.v.to(x.dtype), x)
        # The maximum as a ReLU, whose gradient is faster.
        over = affine_of_maps(x, torch.zeros_like(image), v, image - deviation)
        return self.scaled(x / (torch.relu(over) + deviation))
