"""OutputBN behind the classifiers of the hosts' heads."""

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

import ws_mm
from ws_mm.zoo import OutputBN, with_output_bn

CLASSES = 3


@pytest.fixture(params=['mmdet', 'mmseg'])
def head(request: pytest.FixtureRequest) -> nn.Module:
    scope = request.param
    pytest.importorskip(f'{scope}.models', exc_type=ImportError)
    cfg = dict(
        type='ws_mm.WithOutputBN',
        of='FCNHead',
        layer='conv_seg',
        in_channels=4,
        channels=4,
        num_convs=1,
        num_classes=CLASSES,
        norm_cfg=dict(type='GN', num_groups=2),
        output_bn=dict(momentum=0.2),
    )
    if scope == 'mmdet':
        cfg = dict(
            type='ws_mm.WithOutputBN',
            of='Shared2FCBBoxHead',
            layer='fc_cls',
            in_channels=4,
            fc_out_channels=4,
            num_classes=CLASSES - 1,
            output_bn=dict(momentum=0.2),
        )
    with DefaultScope.overwrite_default_scope(scope):
        built = ws_mm.zoo.output_bn.MODELS.build(cfg)
        built.init_weights()
    return built


def outputs(head: nn.Module, number: int) -> Tensor:
    """One row per class."""
    x = torch.randn(number, 4, 7, 7)
    if hasattr(head, 'fc_cls'):
        return head(x)[0].T
    return head([x]).transpose(0, 1).flatten(1)


def test_outputs_are_standardized_and_shifted(head):
    (norm,) = (m for m in head.modules() if isinstance(m, OutputBN))
    assert norm.momentum == 0.2
    assert norm.bias.shape == (CLASSES,)
    assert not norm.bias.any()
    with torch.no_grad():
        norm.bias.copy_(torch.arange(float(CLASSES)))
        norm.eps = 1e-12  # outputs of a head as built are small
    y = outputs(head, 16)
    assert torch.allclose(y.mean(1), norm.bias, atol=1e-4)
    assert torch.allclose(y.var(1, correction=0), torch.ones(()), atol=1e-4)


def test_classifier_starts_as_without_it(head):
    (pair,) = (
        m for m in head.modules() if OutputBN in map(type, m.children())
    )
    classifier, norm = pair
    assert 0.005 < classifier.weight.std() < 0.02
    assert not norm.bias.any()


def test_one_image_is_refused_in_training_alone(head):
    with pytest.raises(ValueError, match=r'OutputBN.*more than one image'):
        outputs(head, 1)
    assert outputs(head.eval(), 1).isfinite().all()


def test_a_layer_that_is_not_there_is_named():
    pytest.importorskip('mmseg.models', exc_type=ImportError)
    sizes = dict(in_channels=4, channels=4, num_classes=3)
    with (
        DefaultScope.overwrite_default_scope('mmseg'),
        pytest.raises(ValueError, match=r"layer='fc_cls'.*'conv_seg'"),
    ):
        with_output_bn('FCNHead', 'fc_cls', **sizes)
