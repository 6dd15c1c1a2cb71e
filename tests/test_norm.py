"""BCN as a layer: state, modes, equalities and errors."""

import copy
import io
import logging
import pickle
import re

import pytest
import reference
import torch
from comparison import TOLERANCE, disagreements
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from ws_mm import BCN, norm, running_statistics
from ws_mm.norm import fit_num_groups

pytestmark = pytest.mark.usefixtures('kernels')


def randomized(*args, **kwargs) -> BCN:
    layer = BCN(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(mean=0.5)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.2, 3)
    return layer


def make_input(channels: int = 12, samples: int = 2) -> Tensor:
    x = torch.randn(samples, channels, 5, 4, dtype=torch.float64)
    return x * torch.linspace(0.2, 3, channels).view(-1, 1, 1) + 1


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('outer_affine', ['group', 'channel'])
def test_sequence_of_steps_equals_formula(mode, outer_affine):
    layer = randomized(
        12, 4, momentum=0.3, mode=mode, outer_affine=outer_affine
    )
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    for step in range(6):
        layer.train(step != 4)
        x = make_input(samples=1 + step % 3)
        expected, running = reference.batch_channel_norm(
            x, state, 4, training=step != 4, momentum=0.3, mode=mode
        )
        state.update(running)
        actual = {'output': layer(x), **dict(layer.named_buffers())}
        assert not disagreements(
            actual, {'output': expected, **running}, TOLERANCE[torch.float64]
        )


class Doubled(nn.Module):
    """A parametrization: the value that is used, and back."""

    def forward(self, values: Tensor) -> Tensor:
        return 2 * values

    def right_inverse(self, values: Tensor) -> Tensor:
        return values / 2


@pytest.mark.parametrize('name', norm.ARGUMENTS)
def test_a_parametrized_tensor_equals_formula(name: str) -> None:
    """torch takes it out of the parameters or buffers of the layer."""
    training = not name.startswith('running')  # what is computed cannot move
    layer = randomized(12, 4, momentum=0.3).train(training)
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    register_parametrization(layer, name, Doubled())
    with torch.no_grad():
        layer.parametrizations[name].original.mul_(1.5)
    state[name] *= 1.5
    x = make_input()
    expected, _ = reference.batch_channel_norm(
        x, state, 4, training=training, momentum=0.3, mode='estimate'
    )
    actual = {'output': layer(x)}
    assert not disagreements(
        actual, {'output': expected}, TOLERANCE[torch.float64]
    )


def test_is_its_group_norm_until_the_estimates_move():
    layer = BCN(12, 4, outer_affine='channel', dtype=torch.float64).eval()
    group_norm = nn.GroupNorm(4, 12, dtype=torch.float64)
    nn.init.normal_(group_norm.weight)
    nn.init.normal_(group_norm.bias)
    layer.load_state_dict(group_norm.state_dict(), strict=True)
    x = make_input()
    # The inner eps scales all channels alike; the outer eps then weighs more.
    torch.testing.assert_close(layer(x), group_norm(x), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        layer.running_mean[0] += 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(x), group_norm(x), rtol=1e-3, atol=0)


def test_eval_does_not_depend_on_the_batch():
    layer = randomized(12, 4).eval()
    x = make_input(samples=3)
    before = {k: v.clone() for k, v in layer.named_buffers()}
    alone = torch.cat([layer(one) for one in x.split(1)])
    torch.testing.assert_close(layer(x), alone)
    for name, values in layer.named_buffers():
        assert torch.equal(values, before[name])


def test_estimate_works_on_one_value_per_channel():
    layer = randomized(12, 4)
    x = torch.randn(1, 12, 1, 1, dtype=torch.float64)
    assert layer(x).isfinite().all()
    assert layer.running_var.isfinite().all()


def test_called_twice_before_backward():
    layer = randomized(12, 4)
    first, second = make_input(), make_input().requires_grad_()
    loss = (layer(second) * torch.randn_like(second)).sum()
    loss = loss + (layer(first) * torch.randn_like(first)).sum()
    layer.eval()
    loss = loss + (layer(second) * torch.randn_like(second)).sum()
    layer.train()
    layer(first)
    loss.backward()
    assert second.grad.isfinite().all()


@pytest.mark.parametrize('mode', ['estimate', 'batch', 'sync_batch'])
@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing_moves_the_estimates_once(
    mode, use_reentrant
):
    layer, twin = (randomized(12, 4, mode=mode) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    x, cotangent = make_input(), make_input()
    gradients = []
    for one, recompute in ((layer, False), (twin, True)):
        leaf = x.clone().requires_grad_()
        if recompute:
            y = checkpoint(one, leaf, use_reentrant=use_reentrant)
        else:
            y = one(leaf)
        y.backward(cotangent)
        gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    for name, values in layer.named_buffers():
        assert torch.equal(values, twin.get_buffer(name))


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_several_calls_in_one_checkpointed_backward_warn(
    mode, use_reentrant, monkeypatch
):
    monkeypatch.setattr(running_statistics, '_reported', [])
    layer = randomized(12, 4, mode=mode)
    for calls in (1, 1, 2):
        assert not running_statistics._reported
        outputs = [
            checkpoint(
                layer,
                make_input().requires_grad_(),
                use_reentrant=use_reentrant,
            )
            for _ in range(calls)
        ]
        sum(outputs).backward(make_input())
    told = ''.join(running_statistics._reported)
    assert ('with_cp=False' in told) == (mode == 'estimate')


def test_an_eps_of_zero_is_refused():
    with pytest.raises(ValueError, match=r'eps=0.* \(0, inf\).*norm_cfg'):
        BCN(8, 4, eps=0)


def test_half_keeps_the_estimates_in_float32():
    layer = BCN(12, 4)
    layer.running_mean.uniform_()
    before = layer.running_mean.clone()
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.running_mean, before)
    assert layer(torch.randn(1, 12, 4, 4).half()).dtype == torch.float16
    assert BCN(12, 4, dtype=torch.bfloat16).running_var.dtype == torch.float32
    assert layer.double().running_mean.dtype == torch.float64


def test_half_on_another_device_takes_the_estimates_along() -> None:
    layer = BCN(8, 4).to('meta', torch.half)
    assert all(values.is_meta for values in layer.state_dict().values())
    assert all(p.dtype == torch.half for p in layer.parameters())
    assert all(b.dtype == torch.float32 for b in layer.buffers())


def test_survives_copy_pickle_and_state_dict():
    layer = randomized(12, 4, mode='batch', outer_affine='channel')
    file = io.BytesIO()
    pickle.dump(layer, file)
    file.seek(0)
    fresh = randomized(12, 4, mode='batch', outer_affine='channel')
    fresh.load_state_dict(layer.state_dict())
    x = make_input()
    twins = copy.deepcopy(layer), pickle.load(file), fresh
    expected = layer(x)
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.running_mean, layer.running_mean)


def test_repr_names_the_arguments():
    assert repr(BCN(48, mode='batch')) == (
        'BCN(48, num_groups=24, eps=1e-05, momentum=0.01, affine=True, '
        "mode='batch', outer_affine='group')"
    )


def test_without_affine_has_no_parameters():
    layer = BCN(12, 4, affine=False, dtype=torch.float64)
    assert not list(layer.parameters())
    state = dict(layer.named_buffers())
    for name in ('weight', 'bn_weight'):
        state[name] = torch.ones(12)
        state[name.replace('weight', 'bias')] = torch.zeros(12)
    x = make_input()
    expected, _ = reference.batch_channel_norm(
        x, state, 4, training=True, momentum=layer.momentum
    )
    torch.testing.assert_close(layer(x), expected)


def test_meta_device():
    layer = BCN(64, device='meta')
    assert {t.device.type for t in layer.state_dict().values()} == {'meta'}
    layer = layer.to_empty(device='cpu')
    for values in layer.state_dict().values():
        values.fill_(torch.nan)  # whatever was in memory
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), BCN(64).state_dict())


@pytest.mark.parametrize(
    ('channels', 'asked', 'fitting'),
    [
        (64, 32, 32),
        (48, 32, 24),
        (72, 32, 24),
        (432, 32, 27),
        (104, 32, 26),
        (7, 4, 1),
        # Two channels to a group, where there are two.
        (18, 32, 9),
        (16, 32, 8),
        (17, 32, 1),
        (2, 32, 1),
        (1, 32, 1),
        # Not asked for.
        (64, None, 32),
        (32, None, 16),
        (16, None, 8),
        (1, None, 1),
        # As many as channels, by name.
        (32, 32, 32),
        (4, 4, 4),
    ],
)
def test_group_count_falls_back_to_the_largest_that_fits(
    channels, asked, fitting
):
    assert fit_num_groups(channels, asked) == fitting
    layer = BCN(channels) if asked is None else BCN(channels, asked)
    assert layer.num_groups == fitting == layer.weight.numel()
    if asked not in (fitting, None):
        with pytest.raises(ValueError, match=f'{channels} .* is {fitting}'):
            BCN(channels, asked, strict_groups=True)


def said(monkeypatch, channels: int, *asked: int) -> list[tuple[str, int]]:
    """Build and train two layers; return the log lines with their level."""
    lines = []
    monkeypatch.setattr(
        norm,
        'print_log',
        lambda message, logger, level=logging.INFO: lines.append(
            (message, level)
        ),
    )
    monkeypatch.setattr(running_statistics, 'print_log', norm.print_log)
    monkeypatch.setattr(running_statistics, '_reported', [])
    norm._report_fallback.cache_clear()
    for _ in range(2):
        layer = BCN(channels, *asked)
        built = len(lines)
        layer.eval()(torch.randn(1, channels, 4, 4))
        assert len(lines) == built  # training alone says something
        layer.train()(torch.randn(1, channels, 4, 4))
    return lines


def test_groups_of_one_channel_warn(monkeypatch):
    ((message, level),) = said(monkeypatch, 16, 16)
    assert level == logging.WARNING
    assert 'instance norm' in message
    assert 'num_groups=16 of 16 channels' in message
    assert 'norm_cfg=dict(num_groups=8)' in message
    ((message, level),) = said(monkeypatch, 32)
    assert level == logging.INFO
    assert 'one of 32 channels to each' in message
    assert message.endswith('use 16 groups')
    assert not said(monkeypatch, 1, 1)
    assert not said(monkeypatch, 64)


def test_groups_of_one_channel_compile_whole(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(running_statistics, '_reported', [])
    layer = BCN(4, 4)
    twin = copy.deepcopy(layer)
    run = torch.compile(layer, backend='eager', fullgraph=True)
    for _ in range(2):
        x = torch.randn(1, 4, 4, 4)
        torch.testing.assert_close(run(x), twin(x))
    assert len(running_statistics._reported) == 1


def test_one_channel_per_group_is_an_instance_norm():
    # Why it is said: nothing of the first step is left.
    layer = randomized(8, 8).eval()
    x = make_input(8)
    with torch.no_grad():
        layer.bn_weight.abs_().add_(1)  # its sign alone would be left
        layer.weight.fill_(1), layer.bias.fill_(0)
    expected = nn.functional.instance_norm(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    pairs = randomized(8, 4).eval()
    pairs.load_state_dict({**layer.state_dict(), **outer(pairs)})
    with pytest.raises(AssertionError):
        torch.testing.assert_close(pairs(x), expected, rtol=0.1, atol=0.1)


def outer(layer: BCN) -> dict[str, Tensor]:
    return {
        'weight': torch.ones_like(layer.weight),
        'bias': torch.zeros_like(layer.bias),
    }


@pytest.mark.parametrize('training', [True, False])
def test_one_value_per_group_is_rejected_with_a_fix(training):
    layer = BCN(12, 12).train(training)
    match = (
        r'BCN of 12 channels.*\(2, 12, 1, 1\).*num_groups=12.*'
        r'larger feature map.*norm_cfg=dict\(num_groups=6\)'
    )
    with pytest.raises(ValueError, match=match):
        layer(torch.randn(2, 12, 1, 1))
    with pytest.raises(ValueError, match=r'norm_cfg=None\)$'):
        BCN(1).train(training)(torch.randn(2, 1, 1, 1))
    assert BCN(12).train(training)(torch.randn(1, 12, 1, 1)).any()


def test_checkpoint_of_groups_of_one_channel_is_rejected():
    saved = randomized(16, 16).state_dict()
    match = (
        r'16 entries, this BCN of 16 channels one of 8.*'
        r"outer_affine='channel'.*num_groups=16"
    )
    with pytest.raises(ValueError, match=match):
        randomized(16).load_state_dict(saved)
    x = make_input(16)
    twin, layer = randomized(16, 16).eval(), randomized(16, 16).eval()
    twin.load_state_dict(saved)
    layer.load_state_dict(saved)
    assert torch.equal(twin(x), layer(x))


def test_wrong_arguments_are_rejected():
    for momentum in (0, -0.1, 1.5, float('nan'), None, '0.1', True):
        with pytest.raises(ValueError, match=r'momentum=.*\(0, 1\]'):
            BCN(32, momentum=momentum)
    with pytest.raises(ValueError, match="'layer'.*'group', 'channel'"):
        BCN(32, outer_affine='layer')
    with pytest.raises(ValueError, match="'est'.*'estimate', 'batch'"):
        BCN(32, mode='est')
    with pytest.raises(ValueError, match='num_groups=0'):
        BCN(32, 0)
    with pytest.raises(TypeError, match='num_groups=True'):
        BCN(32, True)
    for shape in ((1, 3, 4), (32,)):
        got = re.escape(f'(N, 32, *), got {shape}')
        with pytest.raises(ValueError, match=got):
            BCN(32)(torch.zeros(shape))
