"""test.py --verify: what a config expects, and what falls short of it."""

import pytest
from in_process import load, tools  # noqa: F401
from mmengine.config import Config


def config(**expected) -> Config:
    given = dict(source='us', metrics={'mIoU': 78.0}, tolerance=1.0)
    return Config(dict(expected={**given, **expected}))


@pytest.fixture
def script(tools):  # noqa: F811
    return load('test')


@pytest.mark.parametrize('found', [77.0, 78.0, 99.0])
def test_what_is_within_the_tolerance_or_above_passes(script, found, capsys):
    script.verify(config(), {'mIoU': found, 'aAcc': 1.0})
    assert f'mIoU {found:.4g}, expected 78 within 1 (us)' in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize('found', [76.99, -1.0, float('nan')])
def test_what_falls_short_is_an_error(script, found):
    with pytest.raises(script.SetupError, match='missed: mIoU .*expected 78'):
        script.verify(config(), {'mIoU': found})


def test_every_metric_counts_and_a_missing_one_is_named(script):
    both = config(metrics={'box': 0.4, 'mask': 0.3}, tolerance=0.005)
    with pytest.raises(script.SetupError, match=r'missed: mask 0\.29, .*0\.3'):
        script.verify(both, {'box': 0.4, 'mask': 0.29})
    with pytest.raises(
        script.SetupError, match='metrics.mask is not among the metrics box:'
    ):
        script.verify(both, {'box': 0.4})


@pytest.mark.parametrize(
    ('expected', 'message'),
    [
        (None, 'expects no figure: nobody published'),
        ({'metrics': {}}, 'write expected = dict'),
        ({'metrics': {'mIoU': '78'}}, 'write expected = dict'),
        ({'tolerance': None}, 'write expected = dict'),
        ({'tolerances': 1}, 'write expected = dict'),
    ],
)
def test_what_cannot_be_verified_is_refused(script, expected, message):
    cfg = (
        Config(dict(expected=None)) if expected is None else config(**expected)
    )
    with pytest.raises(script.SetupError, match=message):
        script.check_expected(cfg)
    script.check_expected(config())
