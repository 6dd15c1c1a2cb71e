r"""Use the tools on configs of mmdet and mmseg as their users do.

    python tools/proofs/try_configs.py work_dirs/trial

Each config is converted (apply_norm.py); one on a tiny odd data set inherits
from the result (odd_data.py, fit_config.py). That is checked (check_model.py),
trained for 3 iterations of one image (train.py), tested (test.py), baked
(bake.py) and exported (export.py), each by its own process. With BCN a model
is exported, with GN baked, since a baked config has no layer for BCN. Where
training or testing fails, the original config is tried, too.

One line per step goes to OUT_DIR/records.jsonl at once, the output of each
process to OUT_DIR/CONFIG/NORM/STEP.log. Started again, it continues there.
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs import odd_data
from proofs.fit_config import write_user_config
from proofs.long_runs import Records, versions
from proofs.trial_report import (
    GOALS,
    NOT_FINITE,
    OK,
    REFUSED,
    TIMEOUT,
    TRACEBACK,
    latest,
    page,
    summarize,
    table,
)
from support import launch
from support.checks import check_writable

TOOLS = Path(__file__).resolve().parents[1]
CONFIGS = (
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py',
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py',
    'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'mmdet::solov2/solov2_r50_fpn_1x_coco.py',
    'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    'mmseg::point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',
    'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
    'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py',
    'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mmseg::ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
    'mmdet::htc/htc_r50_fpn_1x_coco.py',
    'mmseg::erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'mmseg::deeplabv3plus/'
    'deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
    'mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py',
    'mmdet::tood/tood_r50_fpn_1x_coco.py',
    'mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py',
    'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py',
    'mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py',
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    'mmseg::danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::solo/solo_r50_fpn_1x_coco.py',
    'mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'mmseg::mobilenet_v2/'
    'mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py',
    'mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'mmseg::cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680.py',
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py',
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_aspp_4xb2-80k_cityscapes-512x1024.py',
    'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'mmseg::emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    'mmdet::paa/paa_r50_fpn_1x_coco.py',
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_'
    'ade20k-512x512.py',
)
# What takes most of the time that an import of the hosts takes.
PRELOADED = (
    *('torch', 'torchvision', 'mmengine.runner', 'mmcv.ops', 'timm'),
    *('imgaug.augmenters', 'scipy.optimize', 'matplotlib.pyplot'),
    *('pycocotools.coco', 'pandas', 'sklearn', 'onnx', 'onnxruntime'),
)


def parse_args() -> argparse.Namespace:
    """Command line of the trial."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('out_dir', help='folder of the records and the runs')
    parser.add_argument(
        '--configs',
        nargs='+',
        default=CONFIGS,
        metavar='CONFIG',
        help='config files, or PACKAGE::FOLDER/NAME.py '
        f'(default: {len(CONFIGS)} of different families)',
    )
    parser.add_argument(
        '--again',
        action='store_true',
        help='repeat what has a record, such as after a change of the code',
    )
    parser.add_argument(
        '--publish',
        metavar='DIR',
        help='write the result as trial.md and trial.json there',
    )
    return parser.parse_args()


def norms_of(config: Path) -> dict[str, Any]:
    """Count the norms of a config's model; name the batch norms."""
    from ws_mm.shapes import batch_norms, build_without_memory

    cfg = launch.read_config(config)
    model = build_without_memory(cfg.model, cfg.default_scope)
    kinds = Counter(
        type(layer).__name__
        for layer in model.modules()
        if 'Norm' in type(layer).__name__ or type(layer).__name__ == 'BCN'
    )
    return dict(norms=dict(kinds), batch_norms=batch_norms(model))


def command_of(step: str, config: str, goal: str, folder: Path) -> list[str]:
    """The command of a step, as a user types it."""
    user, baked = folder / 'user.py', folder / 'baked'
    last = folder / 'run' / 'last_checkpoint'
    checkpoint = last.read_text() if last.is_file() else ''
    work = ['--work-dir', str(folder / 'run')]
    arguments = {
        'apply': [
            *('model_converters/apply_norm.py', config),
            *(str(folder / 'converted.py'), '--norm', goal, '--overwrite'),
            *('--backbone', 'convert'),
            *(['--remaining'] if goal == 'BCN' else []),
        ],
        'check': ['analysis_tools/check_model.py', str(user), *work],
        'train': ['train.py', str(user), *work],
        'test': ['test.py', str(user), checkpoint, *work],
        'bake': ['deployment/bake.py', str(user), checkpoint, str(baked)],
        'baked test': [
            *('test.py', str(baked / 'user.py'), str(baked / 'user.pth')),
            *work,
        ],
        'export': [
            *('deployment/export.py', str(user), checkpoint),
            str(folder / 'model.onnx'),
        ],
    }[step]
    return [str(TOOLS / arguments[0]), *arguments[1:]]


def judge(code: int, output: str) -> tuple[str, str]:
    """Return the outcome of a process and its last message."""
    lines = [line for line in output.splitlines() if line.strip()] or ['']
    _, traceback, after = output.rpartition('Traceback (most recent call')
    if code and traceback:
        # Frames are indented, the exception is not.
        found = re.findall(r'^\S.*', after, re.MULTILINE)
        return TRACEBACK, (found or lines)[0][:1000]
    errors = list(re.finditer('^error: ', output, re.MULTILINE))
    if code and errors:
        message = output[errors[-1].start() :]
        return REFUSED, ' '.join(message.split())[:1000]
    mistakes = [line for line in lines if line.startswith('mistake: ')]
    if code and mistakes:
        return REFUSED, f'{mistakes[0]} ({len(mistakes)} in all)'
    if code:
        return TRACEBACK, f'exit code {code}: {lines[-1][:1000]}'
    losses = re.findall(r'\bloss: (\S+)', output)
    if any(loss in ('nan', 'inf', '-inf') for loss in losses):
        return NOT_FINITE, f'loss: {", ".join(losses)}'
    return OK, lines[-1].strip()[:200]


def run_command(
    command: list[str], folder: Path, log: Path, timeout: int
) -> int | None:
    """Run a tool in a process of its own.

    It is a fork of one that has imported torch and what else the tools and
    the hosts need of others, but nothing of the hosts or of ws_mm.

    Returns:
        The exit code; None after a timeout.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_as_script, args=(command, folder, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _as_script(command: list[str], folder: Path, log: Path) -> None:
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    # As in a process that Python itself started.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    os.chdir(folder)
    runpy.run_path(command[0], run_name='__main__')


def run_step(
    step: str,
    config: str,
    goal: str,
    folder: Path,
    data: Path,
    timeout: int = 600,
) -> dict[str, Any]:
    """Run one step; return its record."""
    command = command_of(step, config, goal, folder)
    log = folder / f'{step}.log'
    start = time.monotonic()
    code = run_command(command, folder, log, timeout)
    if code is None:
        outcome, message = TIMEOUT, f'killed after {timeout} seconds'
    else:
        output = log.read_text(encoding='utf-8', errors='replace')
        outcome, message = judge(code, output)
    record = dict(
        kind='step',
        id=f'{config} {goal} {step}',
        config=config,
        goal=goal,
        step=step,
        outcome=outcome,
        message=message,
        seconds=round(time.monotonic() - start, 1),
    )
    if step == 'apply' and outcome == OK:
        try:
            write_user_config('converted.py', folder / 'user.py', data)
            record.update(norms_of(folder / 'user.py'))
        # Whatever a model may raise: the trial goes on with the next one.
        except Exception as error:
            what = f'{type(error).__name__}: {error}'
            record.update(outcome=TRACEBACK, message=f'converted, but {what}')
    return record


def needed(step: str, folder: Path) -> bool:
    """Return whether the input files of a step exist."""
    wants = {
        'apply': [],
        'check': ['user.py'],
        'train': ['user.py'],
        'baked test': ['baked/user.pth'],
    }.get(step, ['run/last_checkpoint'])
    if not all((folder / name).is_file() for name in wants):
        return False
    # Panoptic predictions cannot be scored on these data.
    return 'test' not in step or 'test_evaluator = None' not in (
        (folder / 'user.py').read_text()
    )


def try_config(
    config: str, args: argparse.Namespace, data: Path, records: Records
) -> None:
    """Run the steps of one config that have no record yet."""
    name = re.sub(r'\W+', '-', config.removesuffix('.py'))
    for goal, steps in GOALS.items():
        done = latest(records)
        folder = Path(args.out_dir).resolve() / name / goal
        if goal == 'original':
            failed = {
                record['step']
                for record in done.values()
                if record['config'] == config
                and record['goal'] != goal
                and record['outcome'] != OK
            }
            if not failed & {'train', 'test', 'baked test'}:
                continue
        folder.mkdir(parents=True, exist_ok=True)
        if goal == 'original' and not (folder / 'user.py').is_file():
            write_user_config(config, folder / 'user.py', data)
        for step in steps:
            if f'{config} {goal} {step}' in done and not args.again:
                continue
            # Nothing of an earlier try takes part.
            if step == 'train':
                shutil.rmtree(folder / 'run', ignore_errors=True)
            if step == 'apply':
                shutil.rmtree(folder)
                folder.mkdir()
            if not needed(step, folder):
                print(f'{goal} {step}: nothing to start from', flush=True)
                continue
            record = run_step(step, config, goal, folder, data)
            records.add(record)
            print(
                f'{goal} {step}: {record["outcome"]} '
                f'({record["seconds"]} s) {record["message"][:300]}',
                flush=True,
            )
        # Some 500 MB a config.
        for path in folder.rglob('*'):
            if path.suffix in ('.pth', '.onnx'):
                path.unlink()


def main() -> None:
    """Try the configs, print the result, publish it if asked."""
    args = parse_args()
    check_writable(args.out_dir, 'OUT_DIR')
    if args.publish:
        check_writable(args.publish, '--publish')
    os.environ.update(CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
    out = Path(args.out_dir).resolve()
    records = Records(
        out / 'records.jsonl', dict(kind='trial', versions=versions())
    )
    data = out / 'data'
    if not (data / 'instances.json').is_file():
        odd_data.write(data)
    for index, config in enumerate(args.configs, 1):
        print(f'[{index}/{len(args.configs)}] {config}', flush=True)
        try_config(config, args, data, records)
    summary = summarize(records)
    texts = {
        'trial.md': page(summary),
        'trial.json': json.dumps(summary, indent=1) + '\n',
    }
    for folder in filter(None, (args.out_dir, args.publish)):
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding='utf-8')
    print(table(summary))


if __name__ == '__main__':
    launch.run(main)
