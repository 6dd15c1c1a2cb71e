"""Batch normalization of the outputs of a classifier."""

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ._batch import BatchStatistics


@MODELS.register_module()
class OutputBN(BatchStatistics):
    """BN of the outputs of a classifier, before softmax and loss.

    For the last layer alone, behind which :func:`with_output_bn` puts it.

    Formula, with mean and biased var per class, of the batch in training:
        output = (input - mean) / sqrt(var + eps) + bias

    Convention: as in the authors' code there is no scale, so that outputs
        keep the variance 1.
    State: ``bias``, ``running_mean``, ``running_var``, one entry per class.
    One image: refused in training: BN removes what says which classes an
        image shows. Each rank needs two images, or regions in a box head.

    Args: those of :class:`~ws_mm.zoo._batch.BatchStatistics`, and
        num_features: number of classes.
        affine: whether a shift is learned.

    Source: arXiv 2103.11642; github.com/matthewbehrend/BNC.
    """

    wrapper = 'ws_mm.WithOutputBN'  # builds the head that has it

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, False, **kwargs)
        self.affine = affine
        self.add_parameter('bias', 0.0, num_features, exists=affine)

    def normalize(self, x: Tensor) -> Tensor:
        """BN without a scale."""
        if self.training and x.shape[0] == 1:
            raise ValueError(
                'OutputBN needs more than one image in training, got an '
                f'input of shape {tuple(x.shape)}: it removes the mean that '
                'says which classes an image shows. Set '
                'train_dataloader=dict(batch_size=2) or more, or take '
                'OutputBN out and normalize within the network instead '
                "(norm_cfg=dict(type='GN', num_groups=32))"
            )
        return self.scaled(self.batch_norm(x, None, None))


@MODELS.register_module(name='WithOutputBN')  # type: ignore[untyped-decorator]
def with_output_bn(
    of: str | type,
    layer: str,
    output_bn: dict[str, Any] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build a head, and put OutputBN behind its classifier.

    Example of a config:
        decode_head = dict(
            type='ws_mm.WithOutputBN', of='FCNHead', layer='conv_seg', ...)

    Args:
        of: type of the head.
        layer: name of its classifier: 'conv_seg' in MMSegmentation, 'fc_cls'
            in box heads. A checkpoint has it as ``conv_seg.0``.
        output_bn: arguments of :class:`OutputBN`.
        **arguments: those of the head.
    """
    head: nn.Module = MODELS.build(dict(type=of, **arguments))
    classifiers = {
        name: module
        for name, module in head.named_children()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    if layer not in classifiers:
        raise ValueError(
            f'layer={layer!r} must be one of '
            f'{", ".join(map(repr, classifiers))}, the linear layers and '
            f"convolutions of {of} (dict(type='ws_mm.WithOutputBN', of=..., "
            'layer=...))'
        )
    classifier = classifiers[layer]
    norm = OutputBN(len(classifier.weight), **(output_bn or {}))
    setattr(head, layer, nn.Sequential(classifier, norm))
    return head
