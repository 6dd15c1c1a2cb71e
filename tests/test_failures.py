"""Errors of MMDetection and MMSegmentation that the tools explain."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import Script, load
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from proofs import odd_data
from proofs.fit_config import write_user_config
from tiny_runs import SEG, write_config, write_data

pytest.importorskip('mmseg')

UNET = 'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'
PAA = 'mmdet::paa/paa_r50_fpn_1x_coco.py'
BISENET = (
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py'
)
SIZES = 'model.data_preprocessor.test_cfg.size_divisor=32'


def shipped_on_odd_data(name: str, folder: Path) -> Path:
    """Write a config that inherits from a shipped one."""
    config = folder / 'user.py'
    write_user_config(name, config, odd_data.write(folder / 'data'))
    return config


class CtrlC(Hook):
    """Somebody stops the training in its third iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ('interval', 'saved'),
    [
        (1, r'/iter_2\.pth is whole: add --resume to the command'),
        (9, 'There is no checkpoint yet'),
    ],
)
def test_ctrl_c_says_what_is_saved(
    interval: int,
    saved: str,
    script: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(HOOKS.module_dict, 'CtrlC', CtrlC)
    extra = (
        "custom_hooks = [dict(type='CtrlC')]\n"
        "train_cfg['max_iters'] = 4\n"
        f"default_hooks['checkpoint']['interval'] = {interval}\n"
    )
    config = write_config(write_data(tmp_path / 'data'), SEG, extra)
    assert script('train', config, '--work-dir', tmp_path / 'run') == 130
    said = capsys.readouterr().err
    assert re.search(rf'Stopped at iteration 2\. .*{saved}', said)


def test_testing_names_the_option_that_pads_images(
    refuses: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 96 x 130 pixels, and UNet halves its maps four times.
    config = shipped_on_odd_data(UNET, tmp_path)
    models = load('test').launch
    cfg = models.read_config(config)
    from ws_mm.shapes import build_without_memory

    model = build_without_memory(cfg.model, 'mmseg').to_empty(device='cpu')
    for values in model.state_dict().values():
        values.zero_()
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=model.state_dict()), weights)
    args = (config, weights, '--work-dir', tmp_path / 'work')
    refuses(f'Testing stopped .*multiples.*{SIZES}', 'test', *args)
    test = ['test', *args, '--cfg-options', SIZES]
    monkeypatch.setattr('sys.argv', [*map(str, test)])
    load('test').main()


def test_training_names_the_batch_norm_on_one_value(
    refuses: Script, tmp_path: Path
) -> None:
    config = shipped_on_odd_data(BISENET, tmp_path)
    refuses(
        r'Training stopped .*a batch norm \(backbone\.context_path\.gap_conv'
        r'\.1\.bn\) had one value per channel.*--remaining',
        *('train', config, '--work-dir', tmp_path / 'work'),
    )


def test_training_names_the_package_of_a_head(
    refuses: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mmdet.models.dense_heads import paa_head

    monkeypatch.setattr(paa_head, 'skm', None)
    config = shipped_on_odd_data(PAA, tmp_path)
    refuses(
        r'Training stopped \(Please .*sklearn first\.\): the package is '
        'called scikit-learn',
        *('train', config, '--work-dir', tmp_path / 'work', '--cfg-options'),
        *('model.backbone.depth=18', 'model.backbone.base_channels=8'),
        'model.neck.in_channels=[8,16,32,64]',
    )
