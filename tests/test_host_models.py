"""Operations of mmdet, mmseg and mmengine on our layers."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import torch.distributed as dist
from comparison import relative_error
from host_parts import BCN4, BN, WS, features, image, resnet, trained
from mmengine.config import Config
from mmengine.model import (
    BaseModel,
    MMDistributedDataParallel,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import (
    Runner,
    activation_checkpointing,
    turn_on_activation_checkpointing,
)
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ws_mm import BCN, WSConv2d, bake, convert, hooks

mmdet = pytest.importorskip('mmdet.models', exc_type=ImportError)
mmseg = pytest.importorskip('mmseg.models', exc_type=ImportError)
mmdet_structures = pytest.importorskip('mmdet.structures')
BitmapMasks = pytest.importorskip('mmdet.structures.mask').BitmapMasks
bricks = pytest.importorskip('mmcv.cnn')


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


@pytest.mark.parametrize('bias', [False, True])
def test_fusing_a_norm_into_a_ws_conv_is_refused(bias: bool) -> None:
    block = bricks.ConvModule(3, 8, 3, conv_cfg=WS, norm_cfg=BN, bias=bias)
    trained(block)
    before, x = tensors(block), image()
    expected = block(x)
    for fuse in (
        bricks.fuse_conv_bn,
        lambda block: fuse_conv_bn_eval(block.conv, block.bn),
    ):
        with pytest.raises(RuntimeError, match=r'fuse_conv_bn.*ws_mm\.bake'):
            fuse(block)
        assert unchanged(block, before)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize('norm', [BN, BCN4], ids=['BN', 'BCN'])
@pytest.mark.parametrize('depth', [18, 50])
def test_a_baked_model_can_be_fused(depth: int, norm: dict) -> None:
    model = trained(resnet(depth, conv_cfg=WS, norm_cfg=norm).double())
    x = image().double()
    expected = features(model, x)
    baked = bake(model)
    fused = bricks.fuse_conv_bn(copy.deepcopy(baked))
    found = {type(module) for module in fused.modules()}
    assert WSConv2d not in found
    assert nn.BatchNorm2d not in found
    assert relative_error(features(fused, x), expected) < 1e-10
    if norm is BN:
        # Refused, the model is as it was; BCN is never fused with anything.
        with pytest.raises(RuntimeError, match='fuse_conv_bn'):
            bricks.fuse_conv_bn(model)
    else:
        bricks.fuse_conv_bn(model)
    assert torch.equal(features(model, x), expected)


@pytest.mark.parametrize('norm', [BN, BCN4], ids=['BN', 'BCN'])
def test_efficient_conv_bn_eval_of_the_runner_is_refused(norm: dict) -> None:
    # As the Runner does with efficient_conv_bn_eval=['backbone'].
    model = nn.Module()
    model.backbone = resnet(conv_cfg=WS, norm_cfg=norm)
    refused = pytest.raises(TypeError, match='efficient_conv_bn_eval')
    with refused:
        turn_on_efficient_conv_bn_eval(model, ['backbone'])
    assert 'forward' not in vars(model.backbone)
    model.backbone = resnet(norm_cfg=BCN4)
    with refused:
        turn_on_efficient_conv_bn_eval(model, ['backbone'])
    baked = trained(bake(resnet(conv_cfg=WS, norm_cfg=BN)))
    model.backbone, x = baked, image()
    expected = features(model.backbone, x)
    turn_on_efficient_conv_bn_eval(model, ['backbone'])
    assert relative_error(features(model.backbone, x), expected) < 1e-4


def test_efficient_conv_bn_eval_of_conv_module_is_refused() -> None:
    options = dict(conv_cfg=WS, efficient_conv_bn_eval=True)
    block = bricks.ConvModule(3, 8, 3, norm_cfg=BN, **options)
    block(image(images=2))
    with pytest.raises(RuntimeError, match='efficient_conv_bn_eval'):
        trained(block)(image())
    # No BatchNorm, nothing to fuse.
    block = bricks.ConvModule(3, 8, 3, norm_cfg=BCN4, **options)
    plain = bricks.ConvModule(3, 8, 3, norm_cfg=BCN4, conv_cfg=WS)
    plain.load_state_dict(trained(block).state_dict())
    x = image()
    assert torch.equal(block.eval()(x), plain.eval()(x))


def test_efficient_conv_bn_eval_is_turned_off_before_convert() -> None:
    block = bricks.ConvModule(
        3, 8, 3, norm_cfg=BN, efficient_conv_bn_eval=True
    )
    model, x = nn.Sequential(block), image()
    for options in (dict(norm={}), dict(conv={}, inputs=x)):
        with pytest.raises(ValueError, match=r"eval\(False\).*skip=\['0'\]"):
            convert(model, **options)
    block.turn_on_efficient_conv_bn_eval(False)
    new = convert(model, {}, {}, inputs=x)
    assert [type(new[0].conv), type(new[0].bn)] == [WSConv2d, BCN]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group, which SyncBN of mmcv wants to be built in."""
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def sync(implementation: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: convert_sync_batchnorm(model, implementation)


@pytest.mark.parametrize(
    'change',
    [sync('torch'), sync('mmcv'), revert_sync_batchnorm],
    ids=['sync_bn=torch', 'sync_bn=mmcv', 'revert'],
)
@pytest.mark.usefixtures('one_process')
def test_sync_bn_leaves_bcn_alone(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(
        resnet(conv_cfg=WS, norm_cfg=BCN4), nn.BatchNorm2d(8)
    )
    trained(model)
    x, before = image(), tensors(model)
    expected = features(model[0], x)
    ours = [m for m in model.modules() if isinstance(m, (BCN, WSConv2d))]
    changed = change(model)
    found = [m for m in changed.modules() if isinstance(m, (BCN, WSConv2d))]
    assert all(a is b for a, b in zip(found, ours, strict=True))
    assert unchanged(changed, before)
    assert torch.equal(features(changed[0], x), expected)


@pytest.mark.parametrize('implementation', ['torch', 'mmcv'])
@pytest.mark.usefixtures('one_process')
def test_ws_conv_before_a_converted_sync_bn(implementation: str) -> None:
    block = bricks.ConvModule(3, 8, 3, conv_cfg=WS, norm_cfg=BN)
    trained(block)
    x = image()
    expected = block(x)
    converted = convert_sync_batchnorm(copy.deepcopy(block), implementation)
    assert type(converted.bn).__name__ == 'SyncBatchNorm'
    assert relative_error(converted.eval()(x), expected) < 1e-6
    reverted = revert_sync_batchnorm(converted)
    assert torch.equal(reverted(x), expected)


class Trained(BaseModel):
    """A backbone and a loss, for a Runner to train."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor, mode: str) -> dict[str, Tensor]:
        return dict(loss=features(self.backbone, inputs).square().mean())


def train(model: nn.Module, folder: Path, *hook_types: str) -> None:
    """Two iterations of the Runner."""
    # What the Runner sets for the process is taken back.
    with DefaultScope.overwrite_default_scope('mmengine'):
        Runner(
            Trained(model),
            str(folder),
            train_dataloader=dict(
                dataset=[dict(inputs=one) for one in image(images=2)],
                sampler=dict(type='DefaultSampler', shuffle=False),
                batch_size=1,
                collate_fn=dict(type='default_collate'),
                num_workers=0,
            ),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=[dict(type=name) for name in hook_types],
            default_hooks=dict(checkpoint=None),
            experiment_name=folder.name,
        ).train()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the hooks."""
    messages: list[str] = []
    monkeypatch.setattr(
        hooks, 'print_log', lambda message, **_: messages.append(message)
    )
    hooks._warn_once.cache_clear()
    return messages


FROZEN = ['bn1', *(f'layer1.{i}.bn{j}' for i in (0, 1) for j in (1, 2))]


def learned(model: nn.Module) -> dict[str, bool]:
    """Which BCN layers' estimates are not the initial ones."""
    return {
        name: bool(module.running_mean.any())
        for name, module in model.named_modules()
        if isinstance(module, BCN)
    }


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_frozen_layers_that_never_learned_are_named(
    package: str, tmp_path: Path, warned: list[str]
) -> None:
    options = dict(base_channels=8, conv_cfg=WS, norm_cfg=BCN4)
    if package == 'mmseg':
        options['stem_channels'] = 8
    model = globals()[package].ResNet(
        18, frozen_stages=1, norm_eval=True, **options
    )
    both = 'SyncEstimatesHook', 'CheckModelHook'
    train(model, tmp_path, *(f'ws_mm.{hook}' for hook in both))
    (message,) = warned
    frozen = [name for name, moved in learned(model).items() if not moved]
    assert frozen == FROZEN
    named = ', '.join(f'backbone.{name}' for name in frozen)
    assert f'any estimates: {named}. ' in message
    assert 'frozen_stages=-1' in message


@pytest.mark.parametrize('name', ['running_mean', 'running_var', 'weight'])
@pytest.mark.usefixtures('one_process')
def test_frozen_layers_of_a_checkpoint_are_not_named(
    name: str, warned: list[str]
) -> None:
    model = resnet(norm_cfg=BCN4, norm_eval=True, frozen_stages=0)
    model.bn2 = BCN(8, 4, affine=False).eval()
    runner = SimpleNamespace(model=DistributedDataParallel(model))
    getattr(model.bn1, name).data[0] += 0.1
    for hook in (hooks.SyncEstimatesHook(), hooks.CheckModelHook()):
        hook.before_train_iter(runner, 0)
        assert 'any estimates: bn2. ' in warned.pop()
        hooks._warn_once.cache_clear()
        # It is looked for once.
        hook.before_train_iter(runner, 1)
        assert not warned


class Semi(nn.Module):
    """Student and teacher, named as in mmdet's SemiBaseDetector."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, 4), nn.GroupNorm(4, 8))
            for _ in range(2)
        )
        self.teacher.eval().requires_grad_(False)


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('skip', [True, False])
@pytest.mark.usefixtures('one_process')
def test_a_teacher_without_estimates_is_named(
    skip: bool, wrapped: bool, warned: list[str]
) -> None:
    mean_teacher = pytest.importorskip('mmdet.engine.hooks').MeanTeacherHook
    model = Semi()
    model = DistributedDataParallel(model) if wrapped else model
    own = mean_teacher(skip_buffer=skip)
    runner = SimpleNamespace(model=model, hooks=[own])
    hooks.SyncEstimatesHook().before_train_iter(runner, 0)
    assert ['skip_buffer=False' in line for line in warned] == skip * [True]


def test_a_teacher_that_has_no_estimates_is_not_named(
    warned: list[str],
) -> None:
    mean_teacher = pytest.importorskip('mmdet.engine.hooks').MeanTeacherHook
    model = Semi()
    for part in (model.student, model.teacher):
        part[1] = nn.BatchNorm2d(8)
    runner = SimpleNamespace(model=model, hooks=[mean_teacher()])
    hooks.SyncEstimatesHook().before_train_iter(runner, 0)
    assert not [line for line in warned if 'skip_buffer' in line]


def test_a_teacher_is_not_frozen_as_it_was_built() -> None:
    model = Semi()
    assert not hooks.frozen_problems(model)
    model.student.eval().requires_grad_(False)
    found = ' '.join(hooks.frozen_problems(model))
    assert 'student.1' in found
    assert 'student.2' in found
    assert 'teacher' not in found


def test_batch_norms_that_are_frozen_as_they_were_built_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).train()
    assert not hooks.frozen_problems(model)
    norm = model[1].eval()  # as norm_eval and frozen_stages put it
    (problem,) = hooks.frozen_problems(model)
    assert problem.startswith('These BatchNorm2d layers use the statistics')
    assert ': 1 layer (1). ' in problem
    assert 'norm_eval=False and frozen_stages=-1' in problem
    nn.init.zeros_(norm.weight)  # mmdet's last norm of a residual block
    assert hooks.frozen_problems(model)
    # A checkpoint that folded the statistics, and one that did not.
    for tensor in (norm.weight, norm.running_mean):
        with torch.no_grad():
            kept, _ = tensor.clone(), tensor.copy_(torch.rand(8))
            assert not hooks.frozen_problems(model)
            tensor.copy_(kept)


def test_norm_eval_does_not_stop_the_estimates() -> None:
    model = resnet(norm_cfg=BCN4, norm_eval=True)
    model.train()
    model(image())
    assert all(learned(model).values())


def detector() -> nn.Module:
    """A Mask R-CNN with BCN and WS in every part that takes them."""
    text = tiny_runs.DET.replace(
        "type='Shared2FCBBoxHead',",
        "type='Shared4Conv1FCBBoxHead', conv_out_channels=8, **layers,",
    )
    text = text.replace("type='FCNMaskHead',", "type='FCNMaskHead', **layers,")
    layers = 'layers = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)\nanchors'
    cfg = Config.fromstring(text.replace('anchors', layers, 1), '.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def one_image(boxes: int) -> dict[str, list]:
    """An image with so many boxes, as mmdet's pipeline gives it."""
    sample = mmdet_structures.DetDataSample(
        metainfo=dict(img_shape=(64, 64), pad_shape=(64, 64))
    )
    corners = torch.rand(boxes, 2) * 20
    sample.gt_instances = InstanceData(
        bboxes=torch.cat([corners, corners + 30], 1),
        labels=torch.zeros(boxes, dtype=torch.long),
        masks=BitmapMasks(np.ones((boxes, 64, 64), np.uint8), 64, 64),
    )
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    return dict(inputs=[pixels], data_samples=[sample])


@pytest.mark.usefixtures('one_process')
def test_an_image_without_boxes_trains_under_ddp() -> None:
    model = detector()
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps, seen = OptimWrapper(optimizer), []
    head = model.roi_head.mask_head
    head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    for boxes in (1, 0, 0, 2):
        before = tensors(head)
        # DDP raises here if the step before left a gradient out.
        losses = wrapped.train_step(one_image(boxes), steps)
        assert all(loss.isfinite() for loss in losses.values())
        assert all(v.isfinite().all() for v in model.state_dict().values())
        moved = {
            name.rpartition('.')[2]
            for name, values in tensors(head).items()
            if not torch.equal(values, before[name])
        }
        assert ('running_mean' in moved) == (boxes > 0)
    assert [bool(rois) for rois in seen] == [True, False, False, True]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of one training step, with the buffers after it."""
    x = x.clone().requires_grad_()
    output = features(model, x)
    torch.manual_seed(2)
    output.backward(torch.randn_like(output))
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers()) | {'input': x.grad}


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('switch', ['with_cp', 'activation_checkpointing'])
@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_activation_checkpointing_changes_nothing(
    package: str,
    switch: str,
    reentrant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []

    def checkpoint(*args: Any) -> Tensor:
        runs.append(1)
        return recompute(*args, use_reentrant=reentrant)

    recompute = torch.utils.checkpoint.checkpoint
    for module in (torch.utils.checkpoint, activation_checkpointing):
        monkeypatch.setattr(module, 'checkpoint', checkpoint)
    options = dict(conv_cfg=WS, norm_cfg=BCN4, base_channels=8)
    # One output: a sum of three gradients depends on their order.
    options |= dict(stem_channels=8, norm_eval=False, out_indices=[3])
    build = globals()[package].ResNet
    plain = build(18, **options)
    if switch == 'with_cp':
        model = build(18, with_cp=True, **options)
    else:
        model = build(18, **options)
        turn_on_activation_checkpointing(model, ['layer1', 'layer3.0'])
    model.load_state_dict(plain.state_dict())
    x = image(images=2)
    expected, actual = gradients(plain, x), gradients(model, x)
    assert runs
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_every_branch_learns_from_scratch(package: str, depth: int) -> None:
    model = globals()[package].ResNet(
        depth,
        base_channels=8,
        stem_channels=8,
        conv_cfg=WS,
        norm_cfg=BCN4,
        zero_init_residual=True,
    )
    model.init_weights()
    last = 'bn3' if depth == 50 else 'bn2'
    ends = [m for n, m in model.named_modules() if n.endswith(last)]
    starts_at_zero = [not end.weight.any() for end in ends]
    assert starts_at_zero == [True] * len(ends)
    assert all(end.bn_weight.all() for end in ends)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        found = gradients(model, image(images=2))
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if not found[n].any()]
    assert not dead
