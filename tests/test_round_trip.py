"""From a released checkpoint to ONNX, with shallow networks."""

import pytest
import torch
from in_process import load, tools  # noqa: F401

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('torchvision')
pytest.importorskip('onnxruntime')


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize(
    ('name', 'norm', 'stages'),
    [
        ('resnet50', 'gn', 1),
        ('resnext50', 'bcn', 1),
        ('deeplabv3_r50', 'gn', 2),
        ('mask-rcnn_r50_fpn', 'bcn', 2),
    ],
)
def test_onnx_computes_what_the_released_network_did(
    name, norm, stages, tmp_path
):
    round_trip = load('round_trip')
    found = round_trip.round_trip(name, norm, tmp_path, stages)
    assert len(found) == 2
    assert max(found.values()) < 1e-4


@pytest.mark.usefixtures('tools')
def test_swapped_tensors_are_seen_at_the_end(tmp_path, monkeypatch):
    round_trip = load('round_trip')
    call = round_trip.call

    def swapped(script, *args):
        call(script, *args)
        if script is round_trip.convert_checkpoint:
            content = torch.load(args[1], weights_only=True)
            one, two = (f'layer1.{block}.conv1.weight' for block in (1, 2))
            state = content['state_dict']
            state[one], state[two] = state[two], state[one]
            torch.save(content, args[1])

    monkeypatch.setattr(round_trip, 'call', swapped)
    found = round_trip.round_trip('resnet50', 'gn', tmp_path, stages=1)
    assert min(found.values()) > 1e-2
