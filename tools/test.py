"""Evaluate a checkpoint of a detector, a segmentor or a classifier."""

import argparse
import os
import sys
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner
from support import checkpoints, checks, failures, launch
from support.checks import SetupError
from torch import nn

HOOKS = {
    'mmdet': 'DetVisualizationHook',
    'mmseg': 'SegVisualizationHook',
    'mmpretrain': 'VisualizationHook',
}
VISUALIZERS = {
    'mmdet': 'DetLocalVisualizer',
    'mmseg': 'SegLocalVisualizer',
    'mmpretrain': 'UniversalVisualizer',
}


def parse_args() -> argparse.Namespace:
    """Command line of testing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='write the predictions to this file'
    )
    parser.add_argument(
        '--show', action='store_true', help='show the predictions in a window'
    )
    parser.add_argument(
        '--show-dir', help='write pictures of the predictions to this folder'
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show stays on a picture (default: 2)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the '
        'config, or horizontal flips',
    )
    parser.add_argument(
        '--allow-missing',
        action='store_true',
        help='evaluate although the checkpoint lacks weights of the model',
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help='exit with 1 if a metric falls short of what the config expects',
    )
    launch.add_common_options(parser)
    return parser.parse_args()


def check_out(path: str) -> None:
    """See that the predictions can be written in the end."""
    if not path.endswith(('.pkl', '.pickle')):
        raise SetupError(
            f'--out {path}: the name must end with .pkl or .pickle.'
        )
    checks.check_writable(os.path.dirname(os.path.abspath(path)), '--out')


def apply_show(cfg: Config, args: argparse.Namespace) -> None:
    """Switch the drawing hook of the host on."""
    scope = cfg.get('default_scope')
    if scope not in HOOKS:
        raise SetupError(
            f'--show and --show-dir know default_scope {", ".join(HOOKS)}, '
            f'not {scope!r}.'
        )
    windows = ('DISPLAY', 'WAYLAND_DISPLAY')
    if (
        args.show
        and sys.platform == 'linux'
        and not any(os.environ.get(name) for name in windows)
    ):
        raise SetupError(
            '--show needs a screen and DISPLAY is not set. Write the pictures '
            'to a folder with --show-dir.'
        )
    if scope == 'mmpretrain' and args.tta:
        raise SetupError(
            "--show and --show-dir do not go with --tta: mmpretrain's "
            'VisualizationHook draws one view of an image. Leave out one.'
        )
    hooks = cfg.get('default_hooks') or {}
    hook = hooks.get('visualization') or ConfigDict(type=HOOKS[scope])
    # That of mmengine draws no predictions.
    visualizer = cfg.get('visualizer') or ConfigDict(type=VISUALIZERS[scope])
    if scope == 'mmpretrain':
        hook.update(enable=True, interval=1)
    else:
        hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        folder = os.path.abspath(args.show_dir)
        checks.check_writable(folder, '--show-dir')
        if scope == 'mmdet':
            hook.test_out_dir = folder
        elif scope == 'mmpretrain':
            hook.out_dir = folder
        else:
            hook.interval = 1  # the official one draws every 50th
            visualizer.save_dir = folder
            visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.default_hooks = {**hooks, 'visualization': hook}
    cfg.visualizer = visualizer


def apply_tta(cfg: Config) -> None:
    """Wrap the model and its test pipeline for augmentation."""
    scope = cfg.get('default_scope')
    datasets = launch.innermost_datasets(cfg, 'test_dataloader')
    if 'tta_pipeline' not in cfg:
        pipeline = deepcopy(datasets[0].pipeline)
        pack = pipeline.pop()
        if scope == 'mmdet':
            # Undoing a flip needs to know about it.
            pack.meta_keys = (
                'img_id',
                'img_path',
                'ori_shape',
                'img_shape',
                'scale_factor',
                'flip',
                'flip_direction',
            )
        # Unflipped first: mmseg takes the ground truth of the first view.
        flips = [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)]
        pipeline.append(dict(type='TestTimeAug', transforms=[flips, [pack]]))
        cfg.tta_pipeline = pipeline
    if 'tta_model' not in cfg:
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        cfg.tta_model = {
            'mmdet': dict(type='DetTTAModel', tta_cfg=nms),
            'mmpretrain': dict(type='AverageClsScoreTTA'),
        }.get(scope, dict(type='SegTTAModel'))
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline
    # Not from its items, which would be classes where mmengine dumps names.
    wrapped = deepcopy(cfg.tta_model)
    wrapped.module = cfg.model
    cfg.model = wrapped


def check_tta(cfg: Config, model: nn.Module) -> None:
    """Reject what mmdet cannot merge.

    Args:
        cfg: the config, with its ``tta_model``.
        model: the network alone.

    Raises:
        SetupError: it predicts masks.
    """
    if checks.short_name(cfg.tta_model) != 'DetTTAModel':
        return
    heads = [
        name
        for name, _ in model.named_modules()
        if name.rpartition('.')[2] in ('mask_head', 'panoptic_head')
    ]
    if not heads:
        return
    message = (
        f"--tta: mmdet's DetTTAModel merges boxes, not masks, and this "
        f'{type(model).__name__} predicts masks (model.{heads[0]}). '
    )
    if heads[0] != 'roi_head.mask_head':
        raise SetupError(f'{message}Leave --tta out.')
    raise SetupError(
        f'{message}Evaluate the boxes alone: --cfg-options '
        'model.roi_head.mask_head=None model.roi_head.mask_roi_extractor=None '
        'test_evaluator.metric=bbox'
    )


def dump_predictions(runner: Runner, path: str) -> None:
    """Add the metric that writes the predictions instead of scoring them."""
    metric = DumpResults
    if runner.cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults as metric
    runner.test_evaluator.metrics.append(metric(out_file_path=path))


def check_expected(cfg: Config) -> None:
    """See that there is something to verify.

    Raises:
        SetupError: the config expects nothing, or not in the right form.
    """
    expected = cfg.get('expected')
    example = (
        "expected = dict(source='our run of ...', metrics={'mIoU': 78.1}, "
        'tolerance=1.0)'
    )
    if not expected:
        raise SetupError(
            f'--verify: {cfg.filename} expects no figure: nobody published '
            f'that row. To verify against one of yours, add to the config: '
            f'{example}'
        )
    numbers = [
        expected.get('tolerance'),
        *expected.get('metrics', {}).values(),
    ]
    if (
        set(expected) != {'source', 'metrics', 'tolerance'}
        or not expected.metrics
        or not all(type(number) in (int, float) for number in numbers)
    ):
        raise SetupError(f'expected={expected}: write {example}')


def verify(cfg: Config, found: dict[str, float]) -> None:
    """Compare the metrics with those of the config.

    Raises:
        SetupError: one is missing, or falls short by more than the
            tolerance.
    """
    expected, short = cfg.expected, []
    for name, value in expected.metrics.items():
        if name not in found:
            raise SetupError(
                f'expected.metrics.{name} is not among the metrics '
                f'{", ".join(sorted(found))}: fix that name or '
                'test_evaluator.'
            )
        line = (
            f'{name} {found[name]:.4g}, expected {value:.4g} within '
            f'{expected.tolerance:g}'
        )
        launch.say(f'{line} ({expected.source})')
        # NaN falls short as well.
        if not found[name] >= value - expected.tolerance:
            short.append(line)
    if short:
        raise SetupError(f'--verify: missed: {"; ".join(short)}.')


def main() -> None:
    """Check everything, then evaluate."""
    args = parse_args()
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    cfg = launch.load_config(args, needed)
    if args.verify:
        check_expected(cfg)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    checks.check_data(cfg, ('test_dataloader',))
    if checks.is_local(args.checkpoint):
        checkpoints.read_checkpoint(args.checkpoint)
    if args.tta:
        apply_tta(cfg)
    checks.check_writable(cfg.work_dir, '--work-dir')
    if args.out:
        check_out(args.out)
    if args.show or args.show_dir:
        apply_show(cfg, args)
    launch.set_up_processes(cfg)

    runner = launch.build_runner(cfg)
    model = launch.model_of(runner)
    if args.tta:
        check_tta(cfg, checkpoints.unwrapped(model))
    checkpoints.check_weights_fit(args.checkpoint, model)
    if not args.allow_missing:
        checkpoints.check_weights_complete(args.checkpoint, model)
    if isinstance(runner, Runner):
        launch.build_loops(runner, ('test',))
    if args.out:
        dump_predictions(runner, args.out)
    launch.gather_in_work_dir(runner, 'test')
    try:
        metrics = runner.test()
    except (AssertionError, RuntimeError) as error:
        if reason := failures.known_cause(error, runner, 'Testing'):
            raise reason from error
        raise
    if args.verify and is_main_process():
        verify(cfg, metrics)


if __name__ == '__main__':
    launch.run(main)
