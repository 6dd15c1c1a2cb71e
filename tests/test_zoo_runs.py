"""Every norm and filter of ws_mm/zoo in real models of the hosts.

By configuration alone: norm_cfg or conv_cfg.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from oracles import Case
from torch import nn

pytest.importorskip('mmdet.models', exc_type=ImportError)
pytest.importorskip('mmseg.models', exc_type=ImportError)

from host_parts import resnet
from in_process import tools  # noqa: F401
from mmcv.cnn import build_norm_layer
from tiny_runs import DET, SEG, write_config, write_data

from ws_mm import compat

CASES = oracles.cases()
both = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
norms = pytest.mark.parametrize(
    'case',
    [case for case in CASES if not case.is_conv],
    ids=lambda case: case.name,
)
ITERATIONS = 25


def parts_of(case: Case) -> dict[str, Any]:
    """The conv_cfg and norm_cfg of a config."""
    own = dict(type=f'ws_mm.{case.name}', **case.options)
    if case.activates:
        own['replaces_act'] = True
    if case.is_conv:
        return dict(conv_cfg=own, norm_cfg=dict(type='GN', num_groups=2))
    return dict(conv_cfg=None, norm_cfg=own)


def layers_of(case: Case, model: nn.Module) -> list[nn.Module]:
    kind = MODELS.get(f'ws_mm.{case.name}')
    return [module for module in model.modules() if type(module) is kind]


@norms
def test_builders_of_the_host(case):
    cfg = dict(type=f'ws_mm.{case.name}', requires_grad=False, **case.options)
    name, layer = build_norm_layer(cfg, 8, postfix=1)
    assert name == 'bn1'
    assert not any(p.requires_grad for p in layer.parameters())


@norms
def test_freezing_and_zero_init(case):
    parts = parts_of(case)
    model = resnet(frozen_stages=1, norm_eval=True, **parts)
    model.init_weights()
    model.train()
    frozen, free = layers_of(case, model.layer1), layers_of(case, model.layer2)
    assert not any(layer.training for layer in frozen)
    assert not any(p.requires_grad for x in frozen for p in x.parameters())
    # norm_eval reaches batch norms, and none of these is one to the host.
    assert all(layer.training for layer in free)
    if free[0].weight is not None:
        last = model.layer2[0].norm2
        assert not last.weight.any()  # zero_init_residual, the default
        assert model.layer2[0].norm1.weight.all()


@both
def test_norm_decay_mult(case):
    model = resnet(**parts_of(case))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
    )
    decay = {
        id(group['params'][0]): group['weight_decay']
        for group in wrapper.optimizer.param_groups
    }
    for layer in layers_of(case, model):
        for name, parameter in layer.named_parameters():
            expected = 0.5 if case.is_conv else 0
            assert decay[id(parameter)] == expected, name


def config_of(case: Case, text: str, folder: Path) -> Path:
    """Write a tiny config with the layer wherever one may stand."""
    cfg = Config.fromfile(write_config(folder, text))
    model = cfg.model
    # As in the configs of the hosts; a norm may keep the scale of pixels.
    model.data_preprocessor.update(mean=[127.0] * 3, std=[64.0] * 3)
    if text == DET:
        for part in (model.neck, model.roi_head.mask_head):
            part.norm_cfg = None
    else:
        # One image is pooled to one value per channel.
        model.decode_head.update(type='ASPPHead', dilations=(1, 6))
        model.decode_head.pop('num_convs')
    put(model, parts_of(case))
    if text == SEG and case.one_value:
        model.decode_head.norm_cfg = dict(type='GN', num_groups=2)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=ITERATIONS)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=ITERATIONS
    )
    cfg.log_processor = dict(by_epoch=False)
    cfg.experiment_name = f'{folder.parent.name}'  # else that of the second
    cfg.optim_wrapper.optimizer.lr = 0.002
    path = folder / 'zoo.py'
    cfg.dump(path)
    return path


def put(node: Any, parts: dict[str, Any]) -> None:
    """Put these wherever a model config has a norm_cfg."""
    if isinstance(node, dict):
        if 'norm_cfg' in node:
            for key, value in parts.items():
                node[key] = copy.deepcopy(value)
        for value in node.values():
            put(value, parts)


@both
@pytest.mark.parametrize('text', [DET, SEG], ids=['Mask R-CNN', 'DeepLabV3'])
def test_trains_on_one_image_saves_loads_and_evaluates(
    case, text, tmp_path, script
):
    if case.one_image:
        pytest.skip(case.one_image)
    config = config_of(case, text, write_data(tmp_path / 'data'))
    work = tmp_path / 'work'
    assert script('train', config, '--work-dir', work) == 0
    saved = work / f'iter_{ITERATIONS}.pth'
    state = compat.read_checkpoint(str(saved))['state_dict']
    assert all(v.isfinite().all() for v in state.values())
    (log,) = work.glob('*/vis_data/scalars.json')
    losses = [
        json.loads(line)['loss'] for line in log.read_text().splitlines()
    ]
    assert len(losses) == ITERATIONS
    assert all(math.isfinite(loss) for loss in losses)
    out = tmp_path / 'tested'
    assert script('test', config, saved, '--work-dir', out) == 0
