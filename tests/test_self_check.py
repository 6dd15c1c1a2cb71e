"""Kernels that compute something else are found out at their first use."""

import os

import pytest
import torch

import ws_mm.kernels
from ws_mm import BCN, WSConv2d

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
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(
        torch.cuda, 'is_current_stream_capturing', lambda: True
    )
    assert not check.is_due('forward')
    monkeypatch.setattr(
        torch.cuda, 'is_current_stream_capturing', lambda: False
    )
    assert check.is_due('forward')


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
