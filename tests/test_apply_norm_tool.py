"""apply_norm.py: the files that it writes, and what it rejects."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from shipped import name_of, read
from tiny_runs import (
    DET,
    SEG,
    without_ws,
    write_config,
    write_data,
)

import ws_mm

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

WS = dict(type='ws_mm.WSConv2d')
HOOK = dict(type='ws_mm.SyncEstimatesHook')
STEP, BASE = ['--images-per-step'], ['--base-batch-size']


@pytest.mark.parametrize(
    ('pattern', 'named'),
    [
        ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
        ('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', True),
        # Keys that are None in the base, with which no dict merges.
        ('mmseg::unet/unet-s5-d16_deeplabv3_4xb4-40k_drive-64x64.py', False),
        ('mmdet::detr/detr_r50_8xb2-150e_coco.py', False),
        # A list of heads, and a folder that mmengine cannot name.
        ('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py', False),
        ('mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py', True),
        ('mmdet::seesaw_loss/cascade-*-loss_sample1e-3-ms-2x_*', True),
        ('mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py', False),
    ],
)
def test_the_file_written_is_what_python_makes(
    pattern, named, script, tmp_path, capsys
):
    name = name_of(pattern)
    out = tmp_path / 'new.py'
    options = '--images-per-step', 4, '--backbone', 'convert'
    assert script('apply_norm', name, out, *options) == 0
    printed = capsys.readouterr().out
    assert 'model.backbone' in printed
    assert 'conv_cfg: not set -> ' in printed or 'gn' in name
    assert f'written: {out}' in printed
    cfg = read(name)
    ws_mm.apply_norm(cfg, images_per_step=4, backbone='convert')
    found = loaded(out).to_dict()
    for key in ('model', 'optim_wrapper'):
        assert unscoped(found[key]) == unscoped(cfg.to_dict()[key])
    source = out.read_text()
    if named:
        assert f'{name!r}\n' in source
    assert len(source.splitlines()) < 80
    assert [path.name for path in tmp_path.iterdir()] == ['new.py']


def unscoped(value):
    """Without the ``_scope_`` that ``package::`` adds."""
    if isinstance(value, dict):
        return {k: unscoped(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [unscoped(item) for item in value]
    return value


def loaded(path: Path) -> Config:
    load('launch')
    return Config.fromfile(path)


@pytest.mark.parametrize(
    ('text', 'weights'), [(DET, 'epoch_1.pth'), (SEG, 'iter_2.pth')]
)
def test_a_converted_model_trains(text, weights, forks, script, tmp_path):
    config = write_config(write_data(tmp_path / 'data'), without_ws(text))
    out = tmp_path / 'child.py'
    options = ('--norm', 'BCN', '--norm-options', 'num_groups=4')
    assert script('apply_norm', config, out, *options) == 0
    cfg = Config.fromfile(out)
    norm = dict(type='ws_mm.BCN', num_groups=4)
    assert cfg.model.backbone.norm_cfg == norm
    assert "_base_ = 'data/tiny.py'" in out.read_text()
    run = forks.run('train', out, '--work-dir', tmp_path / 'run')
    assert run.returncode == 0, run.stdout
    content = torch.load(tmp_path / 'run' / weights, weights_only=False)
    state = content['state_dict']
    parts = {key.partition('.')[0] for key in state if 'bn_weight' in key}
    assert parts >= {'backbone'} | ({'neck'} if text is DET else set())
    means = [v for k, v in state.items() if k.endswith('running_mean')]
    assert sum(bool(mean.any()) for mean in means) > 0.9 * len(means)
    assert all(torch.isfinite(value).all() for value in state.values())


# A backbone of the user's own, with norms that no key reaches.
USERS = """
from mmseg.registry import MODELS
from torch import nn


@MODELS.register_module()
class Plain(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            nn.Conv2d(3, channels, 3, 4, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x):
        return [super().forward(x)] * 4
"""


def test_a_backbone_of_the_users_own_is_converted(forks, tmp_path):
    (tmp_path / 'users.py').write_text(USERS)
    text = without_ws(SEG).replace('in_channels=64', 'in_channels=8')
    extra = (
        "custom_imports = dict(imports=['users'])\n"
        "model['backbone'] = dict(type='Plain', channels=8)\n"
    )
    config = write_config(write_data(tmp_path / 'data'), text, extra)
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    path = str(tmp_path)
    groups = ('--norm', 'BCN', '--norm-options', 'num_groups=4')
    done = forks.run('apply_norm', config, first, *groups, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert '1 batch norms remain' in done.stdout
    done = forks.run('check_model', first, PYTHONPATH=path)
    assert '1 batch norms: backbone.1.' in done.stdout
    run = ('--work-dir', tmp_path / 'run')
    done = forks.run('train', first, *run, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert 'The model trains 1 batch norm (' in done.stdout
    assert ') on the statistics of 1 image. ' in done.stdout
    options = (*groups, '--remaining')
    done = forks.run('apply_norm', config, second, *options, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    done = forks.run('train', second, *run, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert 'batch norms' not in done.stdout
    saved = torch.load(tmp_path / 'run/iter_2.pth', weights_only=False)
    layer = ws_mm.BCN(8, 4)
    state = {
        name.removeprefix('backbone.1.'): value
        for name, value in saved['state_dict'].items()
        if name.startswith('backbone.1.')
    }
    layer.load_state_dict(state)
    assert layer.running_mean.any()


def test_a_batch_norm_of_one_value_is_named_with_the_fix(forks, tmp_path):
    extra = (
        "model['decode_head'] |= dict(type='PSPHead', pool_scales=(1,))\n"
        "model['decode_head'].pop('num_convs')\n"
    )
    data = write_data(tmp_path / 'data')
    config = write_config(data, without_ws(SEG), extra)
    done = forks.run('train', config, '--work-dir', tmp_path / 'run')
    assert done.returncode == 1
    said = done.stdout[done.stdout.index('error: ') :]
    assert 'decode_head.psp_modules.0.1.bn' in said
    assert '--remaining' in said
    assert 'train_dataloader.batch_size' in said
    assert 'Traceback' not in done.stdout


@pytest.mark.parametrize(
    'extra',
    ['auto_scale_lr = None\n', 'custom_hooks = None\nconv_cfg = None\n'],
)
def test_keys_that_are_none_in_the_base_are_replaced(extra, script, tmp_path):
    config = write_config(tmp_path, without_ws(SEG), extra)
    out = tmp_path / 'out.py'
    options = '--norm', 'BCN', '--images-per-step', 4
    options += '--base-batch-size', 16
    assert script('apply_norm', config, out, *options) == 0
    cfg = loaded(out)
    assert cfg.model.backbone.conv_cfg == WS
    assert cfg.custom_hooks == [HOOK]
    if 'auto' in extra:
        assert cfg.auto_scale_lr == dict(base_batch_size=4)


def test_nothing_to_change_writes_nothing(script, tmp_path, capsys):
    config = write_config(tmp_path, without_ws(SEG))
    first, second = tmp_path / 'first.py', tmp_path / 'second.py'
    assert script('apply_norm', config, first) == 0
    with first.open('a') as file:
        file.write("work_dir = 'old'\n")
    assert script('apply_norm', first, second) == 0
    assert 'Nothing to change' in capsys.readouterr().out
    assert not second.exists()


def test_a_dumped_config_passes_on_no_work_dir(script, tmp_path, capsys):
    path, out = tmp_path / 'dumped.py', tmp_path / 'new.py'
    run = "work_dir = 'old'\nresume = True\n"
    cfg = Config.fromstring(without_ws(DET) + run, '.py')
    cfg.dump(path)
    script('apply_norm', path, out)
    assert "work_dir: 'old' -> None" in capsys.readouterr().out
    assert Config.fromfile(out).work_dir is None
    assert Config.fromfile(out).resume is False


def test_a_name_may_stand_without_folder_and_ending(script, tmp_path):
    # The dot in it is no ending.
    name = 'mmdet::mask-rcnn_regnetx-3.2GF_fpn_1x_coco'
    out = tmp_path / 'new.py'
    for given in (name, f'{name}.py'):
        assert script('apply_norm', given, out, '--overwrite') == 0
        assert Config.fromfile(out).model.backbone.arch == 'regnetx_3.2gf'
    # How to make it again, where it is not there yet.
    assert '--overwrite' not in out.read_text()
    # Not the mode of a temporary file: others may read it.
    assert out.stat().st_mode & 0o777 == 0o644


def test_names_that_python_has_words_for_are_written(script, tmp_path):
    hook = {'type': 'EMAHook', 'lambda': (1,)}
    extra = f'custom_hooks = [{hook}]\n'
    config = write_config(tmp_path, without_ws(SEG), extra)
    out = tmp_path / 'out.py'
    assert script('apply_norm', config, out, '--norm', 'BCN') == 0
    assert Config.fromfile(out).custom_hooks == [hook, HOOK]


def test_what_has_no_source_is_named(refuses, tmp_path):
    extra = "custom_hooks = [dict(type='EMAHook', begin=float('inf'))]\n"
    config = write_config(tmp_path, without_ws(SEG), extra)
    match = "would not load .*'inf' is not defined.*nothing was written"
    refuses(match, 'apply_norm', config, tmp_path / 'o.py', '--norm', 'BCN')
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


def test_a_base_of_ws_mm_is_found_by_hosts(script, tmp_path):
    name = 'ws_mm::mask_rcnn/mask-rcnn_r50_fpn_gn-all_8xb2-2x_coco.py'
    out = tmp_path / 'new.py'
    script('apply_norm', name, out, '--backbone', 'convert')
    assert f"_base_ = __import__('ws_mm') and {name!r}" in out.read_text()


def test_layers_with_options_are_written_as_asked(script, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    out = tmp_path / 'out.py'
    options = ['--conv-options', 'eps_mode=inside', '--parts', 'heads']
    options += [
        '--norm',
        'BCN',
        '--norm-options',
        'num_groups=4',
        'outer_affine=channel',
    ]
    assert script('apply_norm', config, out, *options) == 0
    head = Config.fromfile(out).model.decode_head
    assert head.conv_cfg == dict(type='ws_mm.WSConv2d', eps_mode='inside')
    assert head.norm_cfg == dict(
        type='ws_mm.BCN', num_groups=4, outer_affine='channel'
    )


def test_a_norm_comes_with_its_filters(script, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    out = tmp_path / 'out.py'
    for options, conv in (
        ([], dict(type='ws_mm.CenteredConv2d')),
        (['--conv', 'auto'], dict(type='ws_mm.CenteredConv2d')),
        (
            ['--conv-options', 'eps_mode=inside', '--norm', 'BCN'],
            dict(type='ws_mm.WSConv2d', eps_mode='inside'),
        ),
        (['--conv', 'WSConv2d'], dict(type='ws_mm.WSConv2d')),
    ):
        words = [config, out, '--norm', 'MABN', '--overwrite', *options]
        assert script('apply_norm', *words) == 0
        head = Config.fromfile(out).model.decode_head
        assert head.conv_cfg == conv
    # The function does as the command.
    cfg = Config.fromfile(config)
    ws_mm.apply_norm(cfg, norm='MABN')
    assert cfg.model.decode_head.conv_cfg == dict(type='ws_mm.CenteredConv2d')
    assert cfg.model.decode_head.norm_cfg == dict(type='ws_mm.MABN')


def test_a_base_that_hosts_do_not_find_is_named(script, tmp_path, capsys):
    config = tmp_path / 'mine.py'
    base = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    config.write_text(f'_base_ = {base!r}\n')
    assert script('apply_norm', config, tmp_path / 'new.py') == 0
    note = f"write __import__('ws_mm') and {base!r} there" in (
        capsys.readouterr().out
    )
    try:
        metadata.distribution('mmsegmentation')
    except metadata.PackageNotFoundError:
        assert note
    else:
        assert not note


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.py', 'OUT'], r'No config file none\.py'),
        (
            ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coc.py', 'OUT'],
            r'Did you mean mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco\.py',
        ),
        # The folder is wrong.
        (
            ['mmdet::mask_rcn/mask-rcnn_r50_fpn_1x_coco.py', 'OUT'],
            r'Did you mean mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco\.py',
        ),
        (
            ['mmyolo::yolov5/yolov5_s.py', 'OUT'],
            'the package mmyolo is not installed',
        ),
        (
            ['CONFIG', 'OUT', '--conv', 'WSConv'],
            "conv='WSConv' must be one of 'WSConv2d', 'keep', 'auto', or the"
            '.*--conv',
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'bcn'],
            "norm='bcn' must be one of 'BCN', 'GN', 'BN', .*--norm.*"
            "Did you mean 'BCN'",
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'WSConv2d'],
            "norm='WSConv2d' must be one of",
        ),
        (['CONFIG', 'OUT', '--norm', 'BN1d'], "norm='BN1d' must be one of"),
        (
            ['CONFIG', 'OUT', '--conv', 'ws_mm.WSConv1d'],
            "conv='ws_mm.WSConv1d' must be one of",
        ),
        (
            ['CONFIG', 'OUT', '--norm-options', 'groups=4'],
            "argument 'groups'. It takes num_groups, .*--norm-options",
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'BCN', '--norm-options', 'momentum=3'],
            'momentum=3 .*--norm-options',
        ),
        (
            ['CONFIG', 'OUT', '--conv', 'keep', '--conv-options', 'eps=1'],
            'takes none',
        ),
        (
            ['CONFIG', 'OUT', '--parts', 'neck'],
            r"parts='neck' selects nothing: .* backbone, heads",
        ),
        (['CONFIG', 'OUT', '--parts', ''], "parts='' selects nothing: the m"),
        (
            ['mmdet:mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'OUT'],
            'Did you mean mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        ),
        (
            ['CONFIG', 'OUT', *STEP, '0'],
            'images_per_step=0 must be a whole number of at least 1',
        ),
        (
            ['CONFIG', 'OUT', *BASE, '16'],
            'images_per_step=None must be a whole number of at least 1',
        ),
        (
            ['CONFIG', 'OUT', *STEP, '1', *BASE, '0'],
            'base_batch_size=0 must be a whole number of at least 1',
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'GN', '--remaining'],
            '--remaining goes with --norm BCN',
        ),
        (
            ['CONFIG', 'OUT', '--norm-options', 'num_groups=7'],
            'fit no part.*num_groups=N',
        ),
        *(
            (
                ['CONFIG', 'OUT', '--norm-options', f'num_groups={groups}'],
                f'num_groups={groups} must be a whole number of at least 1 '
                '.*--norm-options',
            )
            for groups in (0, -4)
        ),
        (
            ['CONFIG', 'OUT', '--norm', 'OutputBN'],
            "the type 'ws_mm.WithOutputBN'",
        ),
        (['CONFIG', 'CONFIG'], 'exists. Give another name'),
        (['CONFIG', 'CONFIG', '--overwrite'], 'inherit from itself'),
        (['CONFIG', 'out.txt'], 'is called NAME.py'),
    ],
)
def test_bad_arguments_write_nothing(arguments, message, refuses, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    before = config.read_text()
    places = {'CONFIG': config, 'OUT': tmp_path / 'out.py'}
    arguments = [places.get(argument, argument) for argument in arguments]
    refuses(message, 'apply_norm', *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']
    assert config.read_text() == before


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (
            "custom_imports = dict(imports=['no_such_module'], "
            'allow_failed_imports=False)',
            'custom_imports do not import .*no_such_module.* on PYTHONPATH',
        ),
        ('model = 1 / 0', 'cannot be loaded as a config: ZeroDivisionError'),
        ('model = None', 'has no model'),
        ("model['type'] = 'Segmenter'", 'Segmenter'),
        ("model['backbone']['depth'] = 19", 'does not build as it is.*19'),
        *(
            (
                f"model['{part}']['{key}'] = '{kind}'",
                rf"model\.{part}\.{key}='{kind}' must be a dict, such as "
                rf"dict\(type='{kind}'\)",
            )
            for part, key, kind in (
                ('backbone', 'norm_cfg', 'BN'),
                ('decode_head', 'conv_cfg', 'Conv2d'),
            )
        ),
        ('if False:\n    read_base()', 'pure Python config'),
    ],
)
def test_bad_configs_write_nothing(extra, message, refuses, tmp_path):
    config = write_config(tmp_path, without_ws(SEG), extra + '\n')
    refuses(message, 'apply_norm', config, tmp_path / 'out.py')
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']


def test_paths_that_are_no_text_are_named(refuses, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    folder, binary = tmp_path / 'folder.py', tmp_path / 'binary.py'
    folder.mkdir()
    refuses('is a folder', 'apply_norm', config, folder, '--overwrite')
    binary.write_bytes(b'\xff\xfe')
    refuses('no text in UTF-8', 'apply_norm', binary, tmp_path / 'out.py')
    assert not [*folder.iterdir()]


def test_an_unwritten_config_leaves_no_traces(monkeypatch, tmp_path):
    config = write_config(tmp_path, without_ws(SEG))
    module = load('apply_norm')
    monkeypatch.setattr(
        module, 'child_source', lambda *_: f'_base_ = {str(config)!r}\n'
    )
    monkeypatch.setattr('sys.argv', ['x', str(config), str(tmp_path / 'o.py')])
    with pytest.raises(module.SetupError, match='another model than it shou'):
        module.main()
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.py']
