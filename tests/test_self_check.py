"""Kernels that compute something else are found out at their first use."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import ws_mm.kernels
from ws_mm import BCN, WSConv2d, standardize_weight

pytest.importorskip('triton', '3.0', reason='no Triton 3 on this platform')
from ws_mm.kernels import plans, self_check, triton_kernels

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# A fault's kernel, and what it changes: which of the arguments, from where on.
# Of the shared buffers, two numbers for each of 16 rows are other kernels'.
FAULTS = [
    ('standardize', 1, 0),
    ('standardize_backward', 3, 0),
    ('moments', 1, 0),
    ('coefficients', 0, 2 * 16),
    ('coefficients', 1, 0),
    ('affine', 2, 0),
    ('sums', 3, 0),
    ('slopes', 1, 2 * 16),
    ('slopes', 2, 0),
    ('affine_backward', 4, 0),
]


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    """Check all calls, without what earlier tests have left."""
    monkeypatch.setenv('WS_MM_KERNELS', 'check')
    monkeypatch.setattr(ws_mm.kernels, '_failed', [])
    found: list[str] = []
    monkeypatch.setattr(
        ws_mm.kernels, 'print_log', lambda message, **_: found.append(message)
    )
    forget()
    yield found
    forget()


def forget() -> None:
    plans.filter_plan.cache_clear()
    plans.norm_plan.cache_clear()
    self_check.check_of.cache_clear()


def step(model, x, cotangent) -> list[torch.Tensor]:
    """Output, gradients and buffers of one step, on copies of the state."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    leaf = x.detach().requires_grad_()
    output = model(leaf)
    output.backward(cotangent)
    found = [output.detach(), leaf.grad]
    found += [p.grad.clone() for p in model.parameters()]
    found += [b.clone() for b in model.buffers()]
    model.load_state_dict(state)
    return found


def random_norm(channels: int, groups: int, **how: object) -> BCN:
    norm = BCN(channels, groups, momentum=0.3, **how).to(DEVICE)
    with torch.no_grad():
        for values in (*norm.parameters(), norm.running_var):
            values.uniform_(0.5, 1.5)
        norm.running_mean.normal_()
    return norm


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize('layout', ['NCHW', 'channels_last'])
def test_right_kernels_pass(said, mode, dtype, layout):
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter cuts digits off where a GPU rounds.
        pytest.skip('bfloat16 is not rounded here')
    x = (torch.randn(2, 12, 9, 7, device=DEVICE) * 2 + 1).to(dtype)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    for how in ({'outer_affine': 'channel'}, {'affine': False}, {}):
        norm = random_norm(12, 4, mode=mode, **how)
        step(norm, x, torch.randn_like(x))
        norm.eval()
        step(norm, x, torch.randn_like(x))
    for eps_mode in ('outside', 'inside'):
        conv = WSConv2d(6, 5, 3, eps_mode=eps_mode).to(DEVICE)
        weight = conv.standardized_weight(dtype)
        weight.backward(torch.randn_like(weight))
    assert not said


@pytest.mark.parametrize(('kernel', 'place', 'start'), FAULTS)
def test_a_fault_in_a_kernel_is_caught_and_named(
    monkeypatch, said, kernel, place, start
):
    model = torch.nn.Sequential(WSConv2d(8, 8, 3), random_norm(8, 2))
    model.to(DEVICE)
    x = torch.randn(2, 8, 7, 6, device=DEVICE)
    cotangent = torch.randn(2, 8, 5, 4, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WS_MM_KERNELS', 'plain')
        expected = step(model, x, cotangent)
    right = getattr(triton_kernels, kernel)

    class Faulty:
        def __getitem__(self, grid):
            def launch(*args, **meta):
                right[grid](*args, **meta)
                args[place][start:].mul_(1.001)

            return launch

    monkeypatch.setattr(triton_kernels, kernel, Faulty())
    for _ in range(2):
        for one, other in zip(
            step(model, x, cotangent), expected, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(said) == 1
    assert f"the kernel '{kernel}' is off by" in said[0]
    assert 'eager operations' in said[0]


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_right_kernels_pass_far_from_zero(said: list[str], mode: str) -> None:
    # Rounding grows with the mean: here by 300 deviations.
    x = torch.randn(2, 8, 5, 4, device=DEVICE) + 300
    step(random_norm(8, 2, mode=mode), x, torch.randn_like(x))
    assert not said


# Kernel, place of an output among its arguments, slice of that output: for 16
# rows, 8 channels and 2 groups.
NUMBERS = [
    ('moments', 1, (0, 16)),
    ('moments', 1, (16, 32)),
    ('coefficients', 0, (32, 48)),
    ('coefficients', 0, (48, 64)),
    ('coefficients', 0, (64, 72)),
    ('coefficients', 0, (72, 80)),
    ('coefficients', 1, (0, 8)),
    ('coefficients', 2, (0, 8)),
    ('sums', 3, (0, 16)),
    ('sums', 3, (16, 32)),
    ('slopes', 1, (32, 48)),
    ('slopes', 1, (48, 64)),
    ('slopes', 2, (0, 8)),
    ('slopes', 3, (0, 8)),
    ('slopes', 4, (0, 2)),
    ('slopes', 5, (0, 2)),
]


@pytest.mark.parametrize(('kernel', 'place', 'which'), NUMBERS)
def test_each_number_of_a_kernel_is_compared(
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    kernel: str,
    place: int,
    which: tuple[int, int],
) -> None:
    norm = random_norm(8, 2)
    x = torch.randn(2, 8, 5, 4, device=DEVICE)
    right = getattr(triton_kernels, kernel)

    class Faulty:
        def __getitem__(self, grid):
            def launch(*args, **meta):
                right[grid](*args, **meta)
                args[place][slice(*which)].mul_(1.001)

            return launch

    monkeypatch.setattr(triton_kernels, kernel, Faulty())
    step(norm, x, torch.randn_like(x))
    assert len(said) == 1
    assert f"the kernel '{kernel}' is off by" in said[0]


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('kind', ['inf', 'nan', 'constant', 'far'])
def test_what_has_no_right_result_is_no_fault(
    said: list[str], kind: str, mode: str
) -> None:
    norm = random_norm(8, 2, mode=mode)
    x = torch.randn(2, 8, 5, 4, device=DEVICE)
    weight = torch.randn(3, 4, 2, 2, device=DEVICE)
    for values in (x, weight):
        if kind == 'constant':
            values.fill_(0.3)
        elif kind == 'far':
            values.mul_(1e-3).add_(1e3)
        else:
            values[-1, -1, 1, 1] = float(kind)
    step(norm, x, torch.randn_like(x))
    weight.requires_grad_()
    output = standardize_weight(weight)
    output.backward(torch.randn_like(output))
    assert not said


@pytest.fixture
def check(monkeypatch, tmp_path) -> self_check.Check:
    """That of a first use on a GPU, which need not be there."""
    monkeypatch.setenv('WS_MM_KERNELS', 'auto')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(self_check, '_machine', lambda device: 'this one')
    return self_check.Check(torch.device('cuda', 0), 'norm')


def right(value: float) -> dict[str, list]:
    values = torch.full((3,), value)
    return {'affine': [(values, values.double(), values)]}


def test_what_has_passed_is_remembered(monkeypatch, check):
    check.compare('forward', right(1.0), 1.0)
    again = self_check.Check(torch.device('cuda', 0), 'norm')
    assert again.pending == {'forward', 'backward'}
    check.compare('backward', right(1.0), 1.0)
    assert not check.pending
    assert not self_check.Check(torch.device('cuda', 0), 'norm').pending
    assert self_check.Check(torch.device('cuda', 0), 'filters').pending
    monkeypatch.setattr(self_check, '_machine', lambda device: 'another')
    assert self_check.Check(torch.device('cuda', 0), 'norm').pending


def test_a_cache_that_cannot_be_written_is_no_error(
    check: self_check.Check, tmp_path: Path
) -> None:
    (tmp_path / 'file').touch()
    check.marker = tmp_path / 'file/below/marker'
    for way in ('forward', 'backward'):
        check.compare(way, right(1.0), 1.0)
    assert not check.pending


@pytest.mark.parametrize(
    'part', ['driver', 'name', 'capability', 'triton', 'torch']
)
def test_what_has_passed_is_of_one_machine(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    places: dict[str, tuple[Any, str]] = {
        'driver': (self_check.compat, 'gpu_driver'),
        'name': (torch.cuda, 'get_device_name'),
        'capability': (torch.cuda, 'get_device_capability'),
        'triton': (self_check.triton, '__version__'),
        'torch': (torch, '__version__'),
    }

    def machine(changed: str) -> str:
        for name, (module, attribute) in places.items():
            value: Any = changed if name == part else 'this one'
            if callable(getattr(module, attribute)):
                value = mock.Mock(return_value=value)
            monkeypatch.setattr(module, attribute, value)
        return self_check._machine.__wrapped__(torch.device('cuda', 0))

    assert machine('this one') == machine('this one') != machine('another')


def test_what_says_nothing_does_not_pass(check):
    check.compare('forward', right(0.0), 1.0)
    assert check.is_due('forward')


@pytest.mark.parametrize('wrong', [2.0, float('nan')])
def test_what_is_off_is_wrong(check, wrong):
    results = right(1.0)
    results['affine'][0][0].fill_(wrong)
    with pytest.raises(self_check.WrongResult, match="'affine'"):
        check.compare('forward', results, 1.0)


def test_not_while_a_graph_is_captured(monkeypatch, check):
    asked: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device', on)
    for captures in (True, False):
        monkeypatch.setattr(
            torch.cuda, 'is_current_stream_capturing', lambda a=captures: a
        )
        assert check.is_due('forward') is not captures
    assert asked == [torch.device('cuda', 0)] * 2


def test_draws_no_random_number(said):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    norm = BCN(6, 3).to(DEVICE)
    norm(torch.ones(1, 6, 2, 2, device=DEVICE).cumsum(3))
    assert torch.equal(torch.randn(4), expected)


def test_a_cpu_is_not_checked_unless_asked(monkeypatch):
    monkeypatch.setenv('WS_MM_KERNELS', 'auto')
    assert not self_check.Check(torch.device('cpu'), 'norm').pending
