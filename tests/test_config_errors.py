"""Errors in configs and their layers: one clear message, before a run."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import Script, load, tools  # noqa: F401
from mmengine.config import Config
from tiny_runs import ROOT, SEG, write_config

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


@pytest.mark.parametrize(
    ('typo', 'meant'),
    [
        ('data/tinny.py', 'Did you mean data/tiny.py?'),
        ('dta/tiny.py', 'Did you mean data/tiny.py?'),
        ('data/tiny', 'Did you mean data/tiny.py?'),
        ('dat/other.py', 'See what is in data'),
        ('data', 'It is a folder'),
    ],
)
def test_config_typo(
    refuses: Script,
    config: Path,
    typo: str,
    meant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(config.parents[1])
    refuses(rf'No config file {typo}\. {meant}', 'train', typo)


def test_config_in_the_wrong_folder_is_found_in_the_checkout(
    refuses: Script, tmp_path: Path
) -> None:
    shipped = next(
        path
        for path in sorted((ROOT / 'configs').rglob('*coco.py'))
        if '_base_' not in path.parts
    )
    wrong = tmp_path / shipped.name.replace('coco', 'cocoo')
    refuses(f'Did you mean .*{shipped.name}', 'train', wrong)


@pytest.mark.parametrize(
    ('option', 'match'),
    [
        ('train_dataloader.batch_sise=2', "mean 'train_dataloader.batch_size"),
        ('trian_dataloader.batch_size=2', "did you mean 'train_dataloader'"),
        ('train_dataloader.dataset.pipeline.0.tpe=x', r"pipeline\.0\.type'"),
        ('train_dataloader.dataset.pipeline.7.type=x', '--cfg-options: '),
        (
            'optim_wrapper.optimizer.betas.0=0.8',
            "'optim_wrapper.optimizer.betas.0' is an entry of a list. Set the "
            r'whole list, as in optim_wrapper.optimizer.betas=\[1,2\]',
        ),
        (
            'optim_wrapper.dtype=bfloat16',
            "mean 'optim_wrapper.type'. OptimWrapper takes no 'dtype'",
        ),
        ('model.backbone.normeval=x', "mean 'model.backbone.norm_eval'. Res"),
        ('randomness.sed=1', "mean 'randomness.seed'. set_randomness takes"),
    ],
)
def test_unknown_key(
    refuses: Script, config: Path, option: str, match: str
) -> None:
    with config.open('a') as file:
        file.write("optim_wrapper['optimizer']['betas'] = [0.9, 0.99]\n")
    refuses(match, 'train', config, '--cfg-options', option)


# Names that the options below would be typos of.
NEAR = """
optim_wrapper.update(clip_grads=None)
train_dataloader.update(pin_memorys=True)
train_dataloader['dataset'].update(lazy_inits=False)
custom_hooks = [dict(type='EMAHook', update_buffer=True)]
log_processor = dict(windows_size=1)
syncbn = True
"""


AMP = 'optim_wrapper.type=AmpOptimWrapper'


@pytest.mark.parametrize(
    'options',
    [
        (AMP, 'optim_wrapper.dtype=bfloat16'),
        # Not of AmpOptimWrapper, but of the class that its **kwargs go to.
        (AMP, 'optim_wrapper.clip_grad=None'),
        ('optim_wrapper.clip_grad=None',),
        ('train_dataloader.dataset.lazy_init=False',),
        # Goes on to a class that the hook names.
        ('custom_hooks.0.update_buffers=True',),
        ('train_dataloader.pin_memory=True',),
        ('log_processor.window_size=5',),
        ('sync_bn=torch',),
    ],
)
def test_key_that_a_class_takes(
    reaches: Callable[..., Config], config: Path, options: tuple[str, ...]
) -> None:
    with config.open('a') as file:
        file.write(NEAR)
    work = ('--work-dir', config.parent / 'work', '--cfg-options')
    cfg = reaches('train', config, *work, *options)
    key, value = options[-1].split('=')
    node = cfg
    for part in key.split('.'):
        node = node[int(part) if part.isdecimal() else part]
    assert str(node) == value


def test_key_of_the_class_that_another_option_sets(
    reaches: Callable[..., Config],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    work = ('--work-dir', config.parent / 'work', '--amp', '--cfg-options')
    cfg = reaches('train', config, *work, 'optim_wrapper.dtype=bfloat16')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.dtype == 'bfloat16'


def test_option_without_value(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    command = ['train.py', str(config), '--cfg-options', 'lr']
    monkeypatch.setattr('sys.argv', command)
    with pytest.raises(SystemExit, match='2'):
        load('train').main()
    assert "'lr' is not of the form KEY=VALUE" in capsys.readouterr().err


def test_a_base_file_is_not_a_config(refuses: Script, tmp_path: Path) -> None:
    path = tmp_path / 'base.py'
    path.write_text('model = dict(type="MaskRCNN")')
    refuses('has no train_dataloader, train_cfg, optim_wr', 'train', path)


def test_missing_base(refuses: Script, tmp_path: Path) -> None:
    path = tmp_path / 'leaf.py'
    path.write_text('_base_ = "./gone.py"')
    refuses(r'leaf\.py: .*gone\.py', 'train', path)


@pytest.mark.parametrize('script', ['train', 'test', 'bake', 'export'])
@pytest.mark.parametrize(
    ('text', 'match'),
    [
        (
            "custom_imports = dict(imports=['no_such_module'], "
            'allow_failed_imports=False)',
            r'leaf\.py: its custom_imports do not import \(.*no_such_module',
        ),
        ('model = 1 / 0', r'leaf\.py cannot be loaded .*: ZeroDivisionError'),
    ],
)
def test_a_config_whose_code_fails(
    text: str, match: str, script: str, refuses: Script, tmp_path: Path
) -> None:
    if script == 'export':
        pytest.importorskip('onnx')
    path = tmp_path / 'leaf.py'
    path.write_text(text)
    files = dict(test=1, bake=2, export=2).get(script, 0)
    refuses(match, script, path, *['w.pth', tmp_path / 'o.onnx'][:files])
    assert [one.name for one in tmp_path.iterdir()] == ['leaf.py']


def test_host_package_that_is_not_installed(
    refuses: Script, config: Path
) -> None:
    refuses(
        'needs mmnothing .*pip install',
        *('train', config, '--cfg-options', 'default_scope=mmnothing'),
    )


def test_mmcv_without_operators(
    refuses: Script,
    reaches: Callable[..., Config],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'mmcv._ext' else find(name),
    )
    refuses('pip install --no-build-isolation', 'train', config)
    # MMSegmentation needs none.
    config = write_config(config.parent, SEG)
    reaches('train', config, '--work-dir', config.parent / 'work')


def test_an_error_is_one_line_and_exit_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr('sys.argv', ['train.py', '/nowhere/at/all'])
    train = load('train')
    with pytest.raises(SystemExit, match='1'):
        train.launch.run(train.main)
    assert (
        capsys.readouterr().err == 'error: No config file /nowhere/at/all.\n'
    )


def bake_and_train_refuse(
    refuses: Script, config: Path, text: str, match: str
) -> None:
    """Add a text to the config; both tools must refuse it."""
    with config.open('a') as file:
        file.write(text)
    refuses(match, 'bake', config, 'w.pth', 'out')
    refuses(match, 'train', config, '--work-dir', config.parent / 'work')


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (
            'norm_cfg=dict(type="ws_mm.BNC")',
            r"model\.backbone\.norm_cfg\.type = 'ws_mm\.BNC'; did you mean "
            r"'ws_mm\.BCN'",
        ),
        # By its short name it would need custom_imports.
        (
            'norm_cfg=dict(type="WSBCN")',
            r"norm_cfg\.type = 'WSBCN'; did you mean 'ws_mm\.BCN'",
        ),
        (
            'norm_cfg=dict(type="ws_mm.BCN", num_gruops=4)',
            r"mean 'num_groups'.*model\.backbone\.norm_cfg\.num_gruops = 4",
        ),
        (
            'norm_cfg=dict(type="BN", num_groups=4)',
            r'In the config: model\.backbone\.norm_cfg\.num_groups = 4 \(if a '
            r'parent config sets it, add _delete_=True to '
            r'model\.backbone\.norm_cfg\)$',
        ),
        (
            'norm_cfg=dict(type="GN", num_groups=4, mode="estimate")',
            r"model\.backbone\.norm_cfg\.mode = 'estimate'",
        ),
        (
            'norm_cfg=dict(type="ws_mm.BCN", momentum=2)',
            r'model\.backbone\.norm_cfg\.momentum = 2$',
        ),
        (
            'conv_cfg=dict(type="ws_mm.WSConv2d", eps="1e-5")',
            r"model\.backbone\.conv_cfg\.eps = '1e-5'",
        ),
        (
            'depth=50, dcn=dict(type="DCNv2", deform_groups=1), '
            'stage_with_dcn=(False, True, True, True)',
            r'model\.backbone\.conv_cfg and model\.backbone\.dcn exclude',
        ),
        ('norm_cfg="BCN"', r"model\.backbone\.norm_cfg = 'BCN': give a dict"),
        # Of two keys with the argument, only that of the layer it is about.
        (
            'conv_cfg=dict(type="ws_mm.WSConv2d", eps=1e-5), '
            'norm_cfg=dict(type="ws_mm.BCN", eps="1e-5")',
            r"In the config: model\.backbone\.norm_cfg\.eps = '1e-5'$",
        ),
    ],
)
def test_layer_that_cannot_be_built_names_its_key(
    refuses: Script, config: Path, change: str, match: str
) -> None:
    text = f'model["backbone"].update({change})\n'
    bake_and_train_refuse(refuses, config, text, match)


GN = "model['backbone'].update(norm_cfg=dict(type='GN', {}))\n"


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (
            '',
            r'model\.backbone\.norm_cfg is a GN without num_groups: set '
            r'model\.backbone\.norm_cfg\.num_groups=32',
        ),
        (
            'num_groups=3',
            r'norm_cfg\.num_groups = 3, where a layer has 8 channels: set one '
            r'of 1, 2, 4, 8, or',
        ),
    ],
)
def test_norm_of_the_host_that_cannot_run(
    refuses: Script, config: Path, arguments: str, match: str
) -> None:
    bake_and_train_refuse(refuses, config, GN.format(arguments), match)


def test_an_error_without_a_text_is_placed(
    refuses: Script, config: Path
) -> None:
    text = "model['backbone'].update(strides=(1, 2))\n"
    match = r'cannot be built: AssertionError at .*resnet\.py:\d+: assert len'
    bake_and_train_refuse(refuses, config, text, match)


def test_training_checks_the_model_first(
    reaches: Callable[..., Config], config: Path, tmp_path: Path
) -> None:
    own = 'custom_hooks=[{"type":"ws_mm.CheckModelHook"}]'
    work = ('--work-dir', tmp_path / 'work')
    default = dict(type='ws_mm.CheckModelHook', on_mistake='print')
    assert default in reaches('train', config, *work).custom_hooks
    with config.open('a') as file:
        file.write(own)
    hooks = reaches('train', config, *work).custom_hooks
    assert dict(type='ws_mm.CheckModelHook') in hooks
    assert default not in hooks


def test_only_the_first_keys_of_many_are_listed() -> None:
    parts = {f'part{i}': dict(norm_cfg=dict(typo=1)) for i in range(6)}
    error = TypeError("got an unexpected keyword argument 'typo'")
    said = load('layer_checks').explain(Config(dict(model=parts)), error)
    assert said.count('norm_cfg.typo = 1') == 4
    assert said.endswith('and 2 more')


def test_a_norm_that_takes_the_argument_is_not_named() -> None:
    parts = {
        kind: dict(norm_cfg=dict(type=kind, num_groups=4))
        for kind in ('BN', 'GN')
    }
    error = TypeError("got an unexpected keyword argument 'num_groups'")
    said = load('layer_checks').explain(Config(dict(model=parts)), error)
    assert 'model.BN.norm_cfg.num_groups = 4' in said
    assert 'model.GN' not in said
