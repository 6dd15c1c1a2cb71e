"""Changes and measures of the experiments, from the formulas."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from PIL import Image
from torch import nn

import ws_mm

pytest.importorskip('mmcv')

ROOT = Path(__file__).resolve().parents[1]
from experiments import classification, contrast, hooks, variants  # noqa: E402

EPS = 1e-5


def randomized(kind=variants.VariantBCN, **kwargs) -> ws_mm.BCN:
    torch.manual_seed(0)
    norm = kind(6, 3, momentum=0.25, **kwargs).double()
    for values in norm.parameters():
        nn.init.uniform_(values, 0.5, 1.5)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def written_down(x, norm, mean, var):
    """BCN of one image from given statistics."""
    y = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    y = y * norm.bn_weight[:, None, None] + norm.bn_bias[:, None, None]
    groups = y.reshape(3, -1)
    middle = groups.mean(1, keepdim=True)
    spread = (groups - middle).square().mean(1, keepdim=True)
    groups = (groups - middle) / (spread + EPS).sqrt()
    groups = groups * norm.weight[:, None] + norm.bias[:, None]
    return groups.view_as(x)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(scaling=False),
        dict(centering=False),
        dict(centering=False, scaling=False),
        dict(blend=0.3),
        dict(blend=1.0),
    ],
    ids=str,
)
def test_variants_compute_their_formula(settings, training):
    norm = randomized(**settings).train(training)
    x = torch.randn(2, 6, 5, 4, dtype=torch.double) * 2 + 1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        deviation = x - mean[:, None, None]
        var = 0.75 * var + 0.25 * deviation.square().mean((0, 2, 3))
        mean = 0.75 * mean + 0.25 * x.mean((0, 2, 3))
    x.requires_grad_()
    output = norm(x)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    expected = []
    for image in x:
        b = settings.get('blend', 0.0)
        m = image.detach().mean((1, 2))
        v = image.detach().var((1, 2), correction=0)
        used = (1 - b) * mean + b * m, (1 - b) * var + b * v
        if not settings.get('centering', True):
            used = torch.zeros_like(mean), used[1]
        if not settings.get('scaling', True):
            used = used[0], torch.ones_like(var)
        expected.append(written_down(image, norm, *used))
    expected = torch.stack(expected)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(x)
    inputs = [x, *norm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
    )


def channel_first(x, norm, mean, var):
    """An image's groups, then the channels by given statistics."""
    groups = x.reshape(3, -1)
    middle = groups.mean(1, keepdim=True)
    spread = (groups - middle).square().mean(1, keepdim=True)
    groups = (groups - middle) / (spread + EPS).sqrt()
    z = (groups * norm.weight[:, None] + norm.bias[:, None]).view_as(x)
    if mean is None:
        return z
    y = (z - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    return y * norm.bn_weight[:, None, None] + norm.bn_bias[:, None, None]


@pytest.mark.parametrize('training', [True, False])
def test_the_other_order_computes_its_formula(training):
    norm = randomized(kind=variants.ChannelFirstBCN).train(training)
    x = torch.randn(2, 6, 5, 4, dtype=torch.double, requires_grad=True)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        z = torch.stack([channel_first(i, norm, None, None) for i in x])
        z = z.detach()
        deviation = (z - mean[:, None, None]).square()
        var = 0.75 * var + 0.25 * deviation.mean((0, 2, 3))
        mean = 0.75 * mean + 0.25 * z.mean((0, 2, 3))
    output = norm(x)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    expected = torch.stack([channel_first(i, norm, mean, var) for i in x])
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(x)
    inputs = [x, *norm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
    )
    assert norm.train()(x[:0]).shape == (0, 6, 5, 4)
    torch.testing.assert_close(norm.running_mean, mean)


@pytest.mark.parametrize(
    ('kind', 'formula'),
    [
        (variants.VariantBCN, written_down),
        (variants.ChannelFirstBCN, channel_first),
    ],
)
def test_a_variant_is_called_twice_before_the_backward(kind, formula):
    norm = randomized(kind=kind).train()
    x = torch.randn(2, 6, 5, 4, dtype=torch.double, requires_grad=True)
    first = norm(x)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.randn_like(x))
    expected = torch.stack([formula(i, norm, mean, var) for i in x])
    cotangent = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(first, x, cotangent),
        torch.autograd.grad(expected, x, cotangent),
    )


@pytest.mark.parametrize('blend', [0.0, 0.5])
def test_a_variant_takes_no_image_and_vectors(blend):
    norm = randomized(blend=blend).train()
    mean = norm.running_mean.clone()
    assert norm(torch.empty(0, 6, 5, 4).double()).shape == (0, 6, 5, 4)
    assert torch.equal(norm.running_mean, mean)
    x = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(norm.eval()(x[..., None])[..., 0], norm(x))
    plain = variants.VariantBCN(6, 3, affine=False, blend=blend).double()
    ones = variants.VariantBCN(6, 3, blend=blend).double()
    torch.testing.assert_close(plain(x), ones(x))


def test_a_variant_has_its_limits():
    with pytest.raises(ValueError, match='blend=1.5 must be in'):
        variants.VariantBCN(6, 3, blend=1.5)
    with pytest.raises(ValueError, match="mode='batch'.*'estimate'"):
        variants.VariantBCN(6, 3, mode='batch')
    with pytest.raises(ValueError, match="mode='batch'.*'estimate'"):
        variants.ChannelFirstBCN(6, 3, mode='batch')


class Bowl(BaseModel):
    """A loss of known curvature, with state that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, inputs, mode='tensor'):
        self.calls += 1
        noise = torch.rand(1)  # as a detector's sampling
        return {'loss': 0.5 * 7 * (self.place * noise).square().sum()}


def test_turning_gradients_of_a_bowl():
    model = Bowl()
    written = {}
    runner = SimpleNamespace(
        model=model,
        iter=0,
        visualizer=SimpleNamespace(
            add_scalars=lambda values, step: written.update(values, step=step)
        ),
    )
    torch.manual_seed(3)
    following = torch.rand(1)
    torch.manual_seed(3)
    hook = hooks.SmoothnessHook(interval=2)
    batch = {'inputs': torch.zeros(1)}
    hook.before_train_iter(runner, 0, batch)
    with torch.no_grad():
        model.place *= 0.9
    hook.after_train_iter(runner, 0, batch)
    torch.manual_seed(0)
    curvature = 7 * torch.rand(1).item() ** 2
    torch.manual_seed(3)
    assert written['smoothness/lipschitz'] == pytest.approx(curvature, 1e-4)
    assert written['smoothness/change'] == pytest.approx(0.1, 1e-4)
    assert written['step'] == 1
    assert model.calls == 0
    assert model.place.grad is None
    runner.iter, before = 1, dict(written)
    hook.before_train_iter(runner, 0, batch)
    hook.after_train_iter(runner, 0, batch)
    assert written == before
    assert torch.rand(1) == following


def test_random_numbers_go_on_as_if_nothing_was_measured():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    hooks.gradient(Bowl(), {'inputs': torch.zeros(1)})
    assert torch.rand(1) == expected


def runner_over(model, image, training=()):
    """A runner that validates one batch; what it saw and wrote."""
    seen, written = [], {}

    class Loader(list):
        dataset = range(4)

    def val_step(batch):
        output = model(batch)
        seen.append(output)
        return output

    model.val_step = val_step
    runner = SimpleNamespace(
        model=model,
        iter=7,
        train_dataloader=training,
        val_dataloader=Loader([image]),
        val_evaluator=SimpleNamespace(
            process=lambda data_samples, data_batch: None,
            evaluate=lambda size: {'score': size},
        ),
        visualizer=SimpleNamespace(
            add_scalars=lambda values, step: written.update(values, step=step)
        ),
    )
    return runner, seen, written


def test_training_mode_is_measured_and_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    nn.init.constant_(model[0].running_mean, 5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    image = torch.randn(4, 3, 8, 8) + 2
    runner, seen, written = runner_over(model, image)
    model.train()
    hooks.TrainModeGapHook().after_train(runner)
    # The batch's own statistics, and no dropout.
    torch.testing.assert_close(
        seen[0], nn.functional.batch_norm(image, None, None, training=True)
    )
    assert written == {'train_mode/score': 4, 'step': 7}
    torch.testing.assert_close(dict(model.state_dict()), state)
    assert model.training
    assert model[1].training


def test_an_image_that_training_mode_cannot_take_is_no_failure():
    model = nn.Sequential(nn.BatchNorm2d(3))
    runner, seen, written = runner_over(model, torch.randn(1, 3, 1, 1))
    hooks.TrainModeGapHook().after_train(runner)
    assert not seen
    assert not written
    assert model.training
    runner, *_ = runner_over(model, torch.randn(3))
    with pytest.raises(ValueError, match='expected 4D'):
        hooks.TrainModeGapHook().after_train(runner)


def test_recalibrated_estimates_are_measured_and_undone():
    torch.manual_seed(0)
    model = nn.Sequential(ws_mm.BCN(4, 2), nn.Dropout(0.5))
    images = torch.randn(5, 2, 4, 8, 8) * 3 + 2  # five batches, four taken
    norm = model[0]
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    image = torch.randn(4, 4, 8, 8)
    runner, seen, written = runner_over(model, image, list(images))
    model.train()
    hooks.RecalibratedHook(4).after_train(runner)
    var, mean = torch.var_mean(images[:4], (0, 1, 3, 4), correction=0)
    expected = nn.functional.group_norm(
        nn.functional.batch_norm(image, mean, var), 2
    )
    torch.testing.assert_close(seen[0], expected)
    assert written == {'recalibrated/score': 4, 'step': 7}
    torch.testing.assert_close(dict(model.state_dict()), state)
    assert norm.momentum == 0.01
    assert model.training
    assert norm.training
    # Nothing to say of a model without estimates.
    del model[0]
    runner, seen, written = runner_over(model, image, list(images))
    hooks.RecalibratedHook(4).after_train(runner)
    assert not seen
    assert not written


def test_the_mean_of_the_last_weights_is_measured_and_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), ws_mm.BCN(4, 2), nn.Dropout(0.5))
    image = torch.randn(4, 4, 8, 8)
    runner, seen, written = runner_over(model, image)
    runner.max_iters = 10
    hook = hooks.AveragedHook(0.2)
    states = []
    for iteration in range(10):
        runner.iter = iteration
        for values in model.state_dict().values():
            if values.is_floating_point():
                nn.init.uniform_(values, 0.5, 1.5)
        hook.after_train_iter(runner, iteration)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    model.train()
    hook.after_train(runner)
    a, b = ({k: v.double() for k, v in s.items()} for s in states[-2:])
    mean = {key: ((a[key] + b[key]) / 2).float() for key in a}
    y = nn.functional.batch_norm(
        image,
        *(mean[f'0.running_{key}'] for key in ('mean', 'var')),
        mean['0.weight'],
        mean['0.bias'],
    )
    y = nn.functional.batch_norm(
        y,
        *(mean[f'1.running_{key}'] for key in ('mean', 'var')),
        mean['1.bn_weight'],
        mean['1.bn_bias'],
    ).view(4, 2, -1)
    y = (y - y.mean(2, True)) / (
        y.var(2, correction=0, keepdim=True) + EPS
    ) ** 0.5
    y = y * mean['1.weight'][:, None] + mean['1.bias'][:, None]
    torch.testing.assert_close(seen[0], y.view_as(image))
    assert written == {'averaged/score': 4, 'step': 9}
    torch.testing.assert_close(dict(model.state_dict()), states[-1])
    assert model.training


def test_the_mean_begins_behind_the_last_checkpoint():
    for share in (0, 0.25):
        with pytest.raises(ValueError, match=f'share={share} must be'):
            hooks.AveragedHook(share)


def test_thirds_by_contrast():
    found = contrast.by_contrast([1, 2, 3, 4, 5, 6], [9, 1, 8, 2, 5, 4])
    assert found == {
        'contrast/low': 3.0,  # contrasts 1, 2: values 2, 4
        'contrast/middle': 5.5,
        'contrast/high': 2.0,
    }
    assert contrast.by_contrast([1], [1]) == {'contrast/low': 1}


def test_iou_by_contrast(tmp_path):
    metric = contrast.ContrastIoUMetric()
    metric.dataset_meta = {'classes': ('background', 'nucleus')}
    random = np.random.default_rng(0)
    samples, expected = [], []
    for i, spread in enumerate((40, 5, 20)):
        path = tmp_path / f'{i}.png'
        pixels = random.normal(128, spread, (6, 6)).clip(0, 255)
        Image.fromarray(pixels.astype('uint8')).save(path)
        truth = torch.from_numpy(random.integers(0, 2, (1, 6, 6)))
        guess = torch.from_numpy(random.integers(0, 2, (1, 6, 6)))
        if i == 2:  # neither has the class
            truth, guess = truth * 0, guess * 0
        samples.append(
            dict(
                img_path=str(path),
                pred_sem_seg=dict(data=guess),
                gt_sem_seg=dict(data=truth),
            )
        )
        ious = [
            ((guess == c) & (truth == c)).sum()
            / ((guess == c) | (truth == c)).sum()
            for c in (0, 1)
        ]
        ious = [iou.item() for iou in ious if not math.isnan(iou)]
        expected.append(100 * sum(ious) / len(ious))
    metric.process({}, samples)
    found = metric.evaluate(3)
    thirds = [found[f'contrast/{name}'] for name in contrast.THIRDS]
    assert thirds == pytest.approx([expected[1], expected[2], expected[0]])
    assert expected[2] == 100
    assert found['mIoU'] > 0


def test_standardized_images_have_what_the_network_expects():
    image = np.random.default_rng(0).normal(20, 3, (8, 9, 3)).astype('uint8')
    out = contrast.StandardizeImage()(dict(img=image.copy()))['img']
    z = (image - image.mean()) / image.std()
    for bgr, rgb in ((0, 2), (1, 1), (2, 0)):
        expected = z[..., bgr] * contrast.SPREAD[rgb] + contrast.LEVELS[rgb]
        np.testing.assert_allclose(out[..., bgr], expected, rtol=1e-5)
    flat = contrast.StandardizeImage()(dict(img=np.full((4, 4, 3), 7)))
    assert np.isfinite(flat['img']).all()


def test_standardized_classification_sees_no_brightness():
    torch.manual_seed(0)
    model = classification.CifarResNet(
        width=4, norm_cfg=dict(type='GN', num_groups=2), standardize=True
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    labels = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(
        model(x, labels), model(0.1 * x + 3, labels), rtol=1e-2, atol=1e-3
    )
    sample = model(x, labels, 'predict')[1]
    assert sample['contrast'] == pytest.approx(x[1].std().item())
    model.standardize = False
    assert (model(x, labels) - model(0.1 * x + 3, labels)).abs().max() > 0.05
