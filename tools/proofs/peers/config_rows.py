"""Rows of the host contract: configs."""

import sys
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from mmdet.models import ResNet, RetinaHead
from mmengine.registry import DefaultScope

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from proofs.peers.rows import main, observe

WS = dict(type='ConvWS')
GN = dict(type='GN', num_groups=4)


def build(**cfgs: object) -> str:
    """Build and run a ConvModule of these configs; report the result."""

    def run() -> str:
        ConvModule(4, 8, 3, **cfgs)(torch.randn(2, 4, 5, 5))
        return 'no word'

    return observe(run)


def typo() -> str:
    """A misspelt argument, a misspelt type."""
    return '; '.join(
        (
            f'BN: {build(norm_cfg=dict(type="BN", momentun=0.1))}',
            f'type: {build(norm_cfg=dict(type="BNN"))}',
        )
    )


def left_over() -> str:
    """num_groups that a GN config below left."""
    return build(norm_cfg=dict(type='BN', num_groups=4))


def wrong_values() -> str:
    """Values of the wrong type or size."""
    values = (('eps', -1.0), ('eps', '1e-5'), ('momentum', '0.1'))
    found = [
        f'BN {name}={value!r}: {build(norm_cfg={"type": "BN", name: value})}'
        for name, value in (*values, ('momentum', 2), ('affine', 'False'))
    ]
    return '; '.join(found)


def no_norm() -> str:
    """conv_cfg without norm_cfg."""
    return f'ConvWS: {build(conv_cfg=WS)}'


def one_entry() -> str:
    """Filters of one entry."""
    module = ConvModule(1, 8, 1, conv_cfg=WS, norm_cfg=GN)
    finite = module(torch.randn(2, 1, 5, 5)).isfinite().all()
    return 'ConvWS: no word, ' + ('finite' if finite else 'NaN')


def dcn() -> str:
    """conv_cfg together with dcn."""
    DefaultScope.get_instance('peers', scope_name='mmdet')
    ResNet(
        50,
        conv_cfg=WS,
        dcn=dict(type='DCNv2', deform_groups=1),
        stage_with_dcn=(False, True, True, True),
    )
    return 'no word'


def shared_head() -> str:
    """BN in a head that five pyramid levels share."""
    DefaultScope.get_instance('peers', scope_name='mmdet')
    head = RetinaHead(1, 8, feat_channels=8, norm_cfg=dict(type='BN'))
    calls: list[object] = []
    norm = head.cls_convs[0].norm
    norm.register_forward_hook(lambda *_: calls.append(1))
    head.train()([torch.randn(1, 8, size, size) for size in (32, 16, 8, 4, 2)])
    return f'RetinaHead with BN: no word; {len(calls)} updates per iteration'


ROWS = {
    'typo': typo,
    'left_over': left_over,
    'wrong_values': wrong_values,
    'no_norm': no_norm,
    'one_entry': one_entry,
    'dcn': dcn,
    'shared_head': shared_head,
}

if __name__ == '__main__':
    main(ROWS)
