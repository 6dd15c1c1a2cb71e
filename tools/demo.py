"""Train Mask R-CNN and DeepLab with WS and BCN on real images, in minutes.

Every step is an ordinary command of this repository, and is printed. Stop it
at any time: the same command continues where it was.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config
from support import ROOT, demo_figures, launch
from support.checks import SetupError, check_writable
from support.environment import distribution
from support.files import write_text

TOOLS = ROOT / 'tools'
CONFIGS = ROOT / 'configs/demo'
CONVERTER = TOOLS / 'dataset_converters/nuclei_tiles.py'
NO_DOWNLOAD = 3  # of the converter
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
# Without --compare only the first.
NORMS = ('bcn-ws', 'gn-ws', 'gn', 'bn')
STEP = re.compile(
    r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?\beta: (\S+).*?\bloss: (\S+)'
)


@dataclass(frozen=True)
class Model:
    """One of the two networks of the demo."""

    title: str
    configs: dict[str, str]  # norm to config
    metrics: dict[str, str]  # name in the host's file to name for people
    predictions: str  # option of the host's metric that keeps predictions


MODELS = {
    'det': Model(
        'Mask R-CNN',
        {
            norm: f'mask-rcnn_r18_fpn64_{norm}-all_1xb1-400i_stardist.py'
            for norm in NORMS
        },
        {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'segm AP'},
        'test_evaluator.outfile_prefix',
    ),
    'seg': Model(
        'DeepLabV3',
        {
            'bcn-ws': 'deeplabv3_r18-d16_bcn-ws-all_1xb1-300i_stardist.py',
            'gn-ws': 'deeplabv3_r18-d16_gn-ws-all_1xb1-300i_stardist.py',
            'gn': 'deeplabv3_r18-d16_gn-all_1xb1-300i_stardist.py',
            'bn': 'deeplabv3_r18-d16_bn_1xb1-300i_stardist.py',
        },
        {'mIoU': 'mIoU', 'mDice': 'mDice'},
        'test_evaluator.output_dir',
    ),
}


def fail(what: str, status: int, log: Path) -> NoReturn:
    """End the demo with the last lines of a command."""
    last = log.read_text(errors='replace').splitlines()[-12:]
    raise SetupError(
        f'{what} failed (exit status {status}). Its last lines:\n  '
        + '\n  '.join(last)
        + f'\nAll of them: {log}\nThe same command tries again from here.'
    )


def run_child(
    command: list[str], log: Path, each: Callable[[str], None] = str
) -> int:
    """Print and run a command; its output goes to a file.

    Args:
        command: Program and arguments.
        log: File for the output.
        each: Function to call with each line of it.

    Returns:
        The exit status.
    """
    print(f'$ {shlex.join(command)}', flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        text=True,
        errors='replace',
    )
    try:
        with log.open('w') as output:
            for line in child.stdout:
                output.write(line)
                each(line)
        return child.wait()
    finally:
        child.kill()
        child.wait()


def call(
    what: str,
    script: str,
    config: Path,
    folder: Path,
    *arguments: str,
    each: Callable[[str], None] = str,
) -> None:
    """Run train.py or test.py in a work dir; end the demo if it fails."""
    log = folder / f'{Path(script).stem}.log'
    command = [
        *(sys.executable, relative(TOOLS / script), relative(config)),
        *(*arguments, '--work-dir', relative(folder)),
    ]
    status = run_child(command, log, each)
    if status:
        fail(what, status, log)


def report_step(line: str) -> None:
    """Print a training step of the host's log."""
    found = STEP.search(line)
    if found:
        step, total, eta, loss = found.groups()
        print(f'  step {step} of {total}, loss {loss}, {eta} to go')


class Demo:
    """The stages of the demo and their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work_dir: Path = args.work_dir
        self.data_root: Path = args.data_root
        self.offline: bool = args.offline
        self.iters = {'det': args.iters_det, 'seg': args.iters_seg}
        norms = NORMS if args.compare else NORMS[:1]
        self.runs = [(kind, norm) for norm in norms for kind in MODELS]
        self.versions = versions()
        self.data, self.source = Path(), {}
        self.fallback: str | None = None

    def __call__(self) -> None:
        """Go through all stages that are not done."""
        begin = time.time()
        self.prepare_data()
        rows = [self.run(*run) for run in self.runs]
        pictures = demo_figures.draw_results(
            rows, self.work_dir, self.data, self.source['origin']
        )
        summary = {
            'data': {**self.source, 'fallback_because': self.fallback},
            'versions': self.versions,
            'device': device(),
            'runs': rows,
            'pictures': [str(picture) for picture in pictures],
            'seconds_this_time': round(time.time() - begin, 1),
        }
        write_text(
            self.work_dir / 'summary.json', json.dumps(summary, indent=1)
        )
        self.print_summary(summary)

    def prepare_data(self) -> None:
        """Write the tiles of the real image, or else of generated shapes."""
        log = self.work_dir / 'data.log'
        status, reason = NO_DOWNLOAD, '--offline'
        if not self.offline:
            status = self._convert('stardist', log)
            if status == NO_DOWNLOAD:
                reason = log.read_text().splitlines()[0]
        if status == NO_DOWNLOAD:
            self.fallback = reason
            announce_fallback(reason)
            status = self._convert('generated', log, '--generated')
        if status:
            fail('Preparing the data', status, log)
        self.source = json.loads((self.data / 'source.json').read_text())

    def _convert(self, name: str, log: Path, *options: str) -> int:
        self.data = self.data_root / name
        command = [
            *(sys.executable, relative(CONVERTER)),
            *('--out', relative(self.data), *options),
        ]
        return run_child(command, log)

    def run(self, kind: str, norm: str) -> dict[str, Any]:
        """Train and evaluate one network, or read what that gave before."""
        path = CONFIGS / MODELS[kind].configs[norm]
        config = Config.fromfile(path)
        steps = self.iters[kind] or config.train_cfg.max_iters
        run_dir = self.work_dir / path.stem
        key = {
            'config': config.pretty_text,
            'steps': steps,
            'data': self.source['sha256'],
            'layout': self.source['layout'],
            'versions': self.versions,
            'device': torch.cuda.is_available(),
        }
        claim(run_dir, key)
        mark = run_dir / 'done.json'
        if mark.exists():
            return json.loads(mark.read_text())
        options = self.data_options(config, kind)
        changed = [f'train_cfg.max_iters={steps}'] if self.iters[kind] else []
        changed += options
        begin = time.time()
        call(
            f'Training {MODELS[kind].title} with {norm}',
            *('train.py', path, run_dir, '--resume'),
            *(['--cfg-options', *changed] if changed else []),
            each=report_step,
        )
        row = {
            'model': MODELS[kind].title,
            'norm': norm,
            'config': relative(path),
            'seed': config.randomness.seed,
            'steps': steps,
            'train_seconds': round(time.time() - begin, 1),
            'metrics': self.test(kind, norm, run_dir, steps, options),
        }
        write_text(mark, json.dumps(row, indent=1))
        line = demo_figures.metrics_line(row['metrics'])
        print(f'{row["model"]}, {norm}: {line}')
        return row

    def test(
        self, kind: str, norm: str, run_dir: Path, steps: int, options: list
    ) -> dict[str, float]:
        """Evaluate one network on the held-out tiles."""
        model, folder = MODELS[kind], run_dir / 'test'
        shutil.rmtree(folder, ignore_errors=True)
        what = f'Evaluating {model.title} with {norm}'
        call(
            *(what, 'test.py', CONFIGS / model.configs[norm], folder),
            *(relative(run_dir / f'iter_{steps}.pth'), '--cfg-options'),
            *options,
            f'{model.predictions}={relative(folder / "predictions")}',
        )
        found = list(folder.glob('*/*.json'))
        if not found:
            fail(what, 0, folder / 'test.log')
        values = json.loads(found[0].read_text())
        # The host gives no AP where nothing at all was found.
        return {
            name: values.get(key, 0.0) for key, name in model.metrics.items()
        }

    def data_options(self, config: Config, kind: str) -> list[str]:
        """Return options that lead a config to data in another folder."""
        root = relative(self.data) + '/'
        if os.path.normpath(config.data_root) == os.path.normpath(root):
            return []
        loaders = ('train', 'val', 'test')
        options = [f'{x}_dataloader.dataset.data_root={root}' for x in loaders]
        if kind == 'det':
            file = root + 'annotations/instances_val.json'
            options += [f'{x}_evaluator.ann_file={file}' for x in loaders[1:]]
        return options

    def print_summary(self, summary: dict[str, Any]) -> None:
        """Say what came out, and where it lies."""
        print(f'\nData: {self.source["origin"]}')
        if self.fallback:
            announce_fallback(self.fallback)
        for row in summary['runs']:
            print(
                f'  {row["model"]:<11}{row["norm"]:<7}{row["steps"]:>5} steps '
                f'in {row["train_seconds"]:.0f} s   '
                f'{demo_figures.metrics_line(row["metrics"])}'
            )
        for picture in summary['pictures']:
            print(f'  {picture}')
        print(
            f'  {self.work_dir / "summary.json"}\n'
            f'{summary["seconds_this_time"]:.0f} s this time.'
        )


def announce_fallback(reason: str) -> None:
    """Say loudly that the images are not real."""
    print(
        '*** The images of this demo are GENERATED SHAPES, not the real '
        f'microscopy image.\n*** Reason: {reason}'
    )


def claim(run_dir: Path, key: dict[str, Any]) -> None:
    """Keep what ``run_dir`` holds if it was made the same way, else remove.

    Args:
        run_dir: Folder of one network.
        key: Everything that decides the result.

    Raises:
        SetupError: the folder is not the demo's.
    """
    mark = run_dir / 'made_from.json'
    if run_dir.exists() and any(run_dir.iterdir()):
        if not mark.exists():
            raise SetupError(
                f'{run_dir} was not made by the demo and is left alone; '
                'name another folder with --work-dir.'
            )
        before = json.loads(mark.read_text())
        if before == key:
            return
        changed = [name for name in key if before.get(name) != key[name]]
        print(
            f'{run_dir} was made from other {", ".join(changed)}: starting '
            'it again.'
        )
        # The mark goes last: what a kill leaves is still known as ours.
        for path in run_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
    write_text(mark, json.dumps(key, indent=1))


def versions() -> dict[str, str]:
    """Versions of everything that decides a result, ours by content."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        installed = distribution(package)
        if installed is None:
            raise SetupError(
                f'The demo needs {package}, which is not installed. The '
                'README has the one command that sets everything up.'
            )
        name, version = installed
        found[name] = version
    digest = hashlib.sha256()
    for path in sorted((ROOT / 'ws_mm').rglob('*.py')):
        digest.update(path.read_bytes())
    found['ws_mm'] = f'sources {digest.hexdigest()[:12]}'
    return found


def device() -> str:
    """Return the name of the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'CPU, {torch.get_num_threads()} threads'


def relative(path: Path) -> str:
    """The path as one would type it here."""
    path = path.resolve()
    here = Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def parse_args() -> argparse.Namespace:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--compare',
        action='store_true',
        help='also train with GN+WS, GN and BN: four times as long',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder for trainings, pictures and summary.json',
    )
    parser.add_argument(
        '--data-root',
        type=Path,
        default=Path('data/demo'),
        help='folder for the images (1 MB)',
    )
    parser.add_argument(
        '--offline',
        action='store_true',
        help='use generated shapes; nothing is fetched',
    )
    for kind, model in MODELS.items():
        parser.add_argument(
            f'--iters-{kind}',
            type=positive,
            metavar='STEPS',
            help=f'training steps of {model.title}; default: its config',
        )
    return parser.parse_args()


def positive(text: str) -> int:
    """A command line number above zero."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> None:
    """Check what can be checked, then run the demo."""
    args = parse_args()
    check_writable(str(args.work_dir), '--work-dir')
    check_writable(str(args.data_root), '--data-root')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Demo(args)()
    except KeyboardInterrupt:
        print('Interrupted. The same command continues from here.')
        sys.exit(130)
    except OSError as error:
        raise SetupError(
            f'{error}. Fix it; the same command continues from here.'
        ) from error


if __name__ == '__main__':
    launch.run(main)
