"""EasedBCN in the place of trained batch norms."""

import pytest
import torch
from torch import nn

import ws_mm
from ws_mm import hooks
from ws_mm.zoo import EasedBCN


def trained() -> nn.Sequential:
    """A network whose batch norms have statistics and affines."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()
    )
    for values in model[1].state_dict().values():
        if values.is_floating_point():
            values.uniform_(0.5, 2)
    return model.eval()


def eased() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), EasedBCN(8, eps=1e-3), nn.ReLU()
    ).eval()


def test_a_checkpoint_of_bn_loads_as_it_is() -> None:
    source, model = trained(), eased()
    missing, unexpected = model.load_state_dict(
        source.state_dict(), strict=False
    )
    assert missing == ['1.gn_weight', '1.gn_bias', '1.gate']
    assert unexpected == ['1.num_batches_tracked']
    x = torch.randn(2, 3, 9, 8) * 3 + 1
    torch.testing.assert_close(model(x), source(x))


def test_conversion_keeps_the_function() -> None:
    source = trained()
    model = ws_mm.convert(source, norm=dict(type='EasedBCN', num_groups=2))
    assert (type(model[1]), model[1].num_groups) == (EasedBCN, 2)
    x = torch.randn(2, 3, 9, 8) * 3 + 1
    torch.testing.assert_close(model.eval()(x), source(x))
    with pytest.raises(
        ValueError, match=r'this GroupNorm has no running.*BCN'
    ):
        ws_mm.convert(
            nn.Sequential(nn.GroupNorm(2, 8)), norm=dict(type='EasedBCN')
        )


@pytest.mark.parametrize('training', [True, False])
def test_an_open_gate_is_bcn(training: bool) -> None:
    layer, bcn = EasedBCN(8).double(), ws_mm.BCN(8).double()
    names = dict(weight='bn_weight', bias='bn_bias')
    names.update(gn_weight='weight', gn_bias='bias')
    state = {}
    for name, values in layer.state_dict().items():
        nn.init.uniform_(values, 0.5, 2)
        if name != 'gate':
            state[names.get(name, name)] = values
    nn.init.ones_(layer.gate)
    bcn.load_state_dict(state)
    x = torch.randn(2, 8, 5, 4, dtype=torch.double)
    found, expected = layer.train(training)(x), bcn.train(training)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.running_var, bcn.running_var)


def test_a_group_of_one_value_is_refused() -> None:
    layer = EasedBCN(8, num_groups=8)
    assert layer(torch.randn(2, 8, 1, 2)).isfinite().all()
    with pytest.raises(ValueError, match=r'EasedBCN of 8.*num_groups=4'):
        layer(torch.randn(2, 8, 1, 1))


def test_its_statistics_are_measured_as_those_of_bcn() -> None:
    batches = [torch.randn(n, 8, 5, 4) * (n + 1) + n for n in (2, 3, 1)]
    layers = EasedBCN(8).double(), ws_mm.BCN(8).double()
    for layer in layers:
        ws_mm.update_estimates(
            nn.Sequential(layer), [x.double() for x in batches]
        )
    for name in EasedBCN.statistics:
        found, expected = (layer.get_buffer(name) for layer in layers)
        torch.testing.assert_close(found, expected)


def test_called_twice_before_backward(kernels: str) -> None:
    layer = EasedBCN(8)
    x, other = torch.randn(2, 2, 8, 5, 4).requires_grad_()
    first = layer(x)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer(other)
    (found,) = torch.autograd.grad(first.square().sum(), x)
    z = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + layer.eps).sqrt()
    (expected,) = torch.autograd.grad(z.square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_training_from_initial_statistics_is_named() -> None:
    (problem,) = hooks.frozen_problems(eased().train())
    start = 'These EasedBCN layers train, and begin with the statistics'
    assert problem.startswith(start)
    assert problem.count(': 1 layer (1). ') == 1
    assert not hooks.frozen_problems(nn.Sequential(ws_mm.BCN(8)).train())
    model = eased().train()
    model.load_state_dict(trained().state_dict(), strict=False)
    assert not hooks.frozen_problems(model)
    (problem,) = hooks.frozen_problems(
        nn.Sequential(eased().eval(), nn.ReLU()).train(False)
    )
    assert 'in eval mode while the model trains' in problem
