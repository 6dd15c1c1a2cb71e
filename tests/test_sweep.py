"""The sweep over shipped configs counts, goes on, and prints its page."""

import json

import pytest
from in_process import load, tools  # noqa: F401
from proofs import sweep_configs
from tiny_runs import ROOT, SEG, without_ws

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


@pytest.fixture
def package(monkeypatch, tmp_path):
    """An installed package of three configs, one of which is broken."""
    root = tmp_path / 'tiny_package' / '.mim' / 'configs' / 'tiny'
    root.mkdir(parents=True)
    (root.parents[2] / '__init__.py').write_text('')
    text = without_ws(SEG)
    (root / 'a.py').write_text(text)
    # The same layers.
    (root / 'b.py').write_text(
        text + "model['decode_head']['num_classes'] = 5\n"
    )
    (root / 'c.py').write_text(
        "custom_imports = dict(imports=['no_such_package.models'])\n"
    )
    (root / 'd.py').write_text('max_epochs = 3\n')
    (root / 'metafile.yml').write_text('')
    monkeypatch.syspath_prepend(str(tmp_path))
    return 'tiny_package'


def test_the_sweep_counts_and_continues(package, tmp_path, script, capsys):
    out = tmp_path / 'records'
    arguments = [out, '--packages', package, '--processes', 1]
    publish = ['--publish', tmp_path / 'docs']
    assert script('sweep_configs', *arguments) == 0
    printed = capsys.readouterr().out
    assert '1 distinct models, 1 to convert' in printed
    path = out / 'records.jsonl'
    whole = path.read_text()
    # A kill in the middle of the last line.
    path.write_text(whole[:-30])
    assert script('sweep_configs', *arguments, *publish) == 0
    printed = capsys.readouterr().out
    assert '4 configs, 0 to load' in printed
    assert '1 distinct models, 1 to convert' in printed
    summary = json.loads((tmp_path / 'docs' / 'sweep.json').read_text())
    assert summary['packages'][package]['by_outcome'] == {
        'converted': 2,
        'failed': 1,
        'no model': 1,
    }
    page = (tmp_path / 'docs' / 'sweep.md').read_text()
    assert '66.7 %' in page
    # The broken line did not spoil what was written after it.
    assert script('sweep_configs', *arguments) == 0
    assert '1 distinct models, 0 to convert' in capsys.readouterr().out
    assert 'needs no_such_package, which is not installed | 1 |' in page


def test_mistakes_from_before_are_not_the_converters(
    package, tmp_path, script, capsys
):
    folder = tmp_path / package / '.mim' / 'configs' / 'tiny'
    for path in folder.iterdir():
        path.unlink()
    bare = "model['decode_head'] |= dict(norm_cfg=None, conv_cfg=dict("
    (folder / 'a.py').write_text(without_ws(SEG) + bare + "type='ConvWS'))\n")
    arguments = ['--packages', package, '--processes', 1, '--norm', 'keep']
    assert script('sweep_configs', tmp_path / 'records', *arguments) == 0
    assert '| models: converted | 1 |' in capsys.readouterr().out


def test_another_sweep_is_not_mixed_in(package, tmp_path, script, refuses):
    out = tmp_path / 'records'
    arguments = [out, '--packages', package, '--processes', 1]
    assert script('sweep_configs', *arguments) == 0
    refuses('another sweep', 'sweep_configs', *arguments, '--norm', 'GN')
    refuses('not installed', 'sweep_configs', out, '--packages', 'no_such')
    refuses('at least 1', 'sweep_configs', out, '--processes', 0)


def test_the_published_page_shows_its_numbers():
    summary = json.loads((ROOT / 'docs' / 'sweep.json').read_text())
    report = load('sweep_report')
    page = (ROOT / 'docs' / 'sweep.md').read_text()
    assert page == report.page(summary)
    good, able = report.share(summary)
    assert good >= 0.95 * able


def test_a_failed_build_leaves_classes_of_the_host_as_they_were():
    """RegNet with DCN refuses a conv_cfg in the middle of its build."""
    from mmdet.models.backbones.resnext import Bottleneck

    config = 'regnet/mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco.py'
    record = sweep_configs.convert('mmdet', config, '', 'WSConv2d', 'BCN')
    assert 'DCN' in str(record['left'])
    assert Bottleneck.expansion == 4
