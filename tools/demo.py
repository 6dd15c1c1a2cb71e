"""Train Mask R-CNN and DeepLab with WS and BCN on real images, in minutes.

Every step is an ordinary command of this repository, and is printed. Stop it
at any time: the same command continues where it was.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TextIO

import demo_figures
import launch
import torch
from checks import ROOT, SetupError, check_writable, newest_checkpoint
from demo_progress import START_SECONDS, Progress, run_child
from mmengine.config import Config
from tqdm import tqdm

TOOLS = ROOT / 'tools'
CONFIGS = ROOT / 'configs/demo'
CONVERTER = TOOLS / 'dataset_converters/nuclei_tiles.py'
NO_DOWNLOAD = 3  # of the converter
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
# Without --compare only the first.
NORMS = ('bcn-ws', 'gn-ws', 'gn', 'bn')
# Bytes of one run: three checkpoints while the newest is being written.
RUN_SIZE = 400e6
STEP = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?\bloss: ([\d.na]+)')
# Expected on two cores, as Model.step_seconds; they only weigh the progress.
TEST_SECONDS = 20


@dataclass(frozen=True)
class Model:
    """One of the two networks of the demo."""

    title: str
    configs: dict[str, str]  # norm to config
    step_seconds: float
    metrics: dict[str, str]  # name in the host's file to name for people
    predictions: str  # option of the host's metric that keeps predictions


MODELS = {
    'det': Model(
        'Mask R-CNN',
        {
            norm: f'mask-rcnn_r18_fpn64_{norm}-all_1xb1-400i_stardist.py'
            for norm in NORMS
        },
        0.75,
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
        0.5,
        {'mIoU': 'mIoU', 'mDice': 'mDice'},
        'test_evaluator.output_dir',
    ),
}


def fail(what: str, status: int, log: Path) -> NoReturn:
    """End the demo with the last words of a child."""
    last = log.read_text(errors='replace').splitlines()[-12:]
    raise SetupError(
        f'{what} failed (exit status {status}). Its last lines:\n  '
        + '\n  '.join(last)
        + f'\nAll of them: {log}\nThe same command tries again from here.'
    )


class Demo:
    """The stages, and what they leave behind."""

    def __init__(self, args: argparse.Namespace, lock: TextIO) -> None:
        self.work_dir: Path = args.work_dir
        self.data_root: Path = args.data_root
        self.offline: bool = args.offline
        self.iters = {'det': args.iters_det, 'seg': args.iters_seg}
        self.lock = lock
        norms = NORMS if args.compare else NORMS[:1]
        self.runs = [(kind, norm) for norm in norms for kind in MODELS]
        self.plan = {run: self._plan(*run) for run in self.runs}
        self.versions = versions()
        self.data, self.source = Path(), {}
        self.fallback: str | None = None

    def _plan(self, kind: str, norm: str) -> Config:
        """The config of a run, with the number of steps asked for."""
        config = Config.fromfile(CONFIGS / MODELS[kind].configs[norm])
        if self.iters[kind]:
            config.train_cfg.max_iters = self.iters[kind]
        return config

    def run_dir(self, kind: str, norm: str) -> Path:
        """Work dir of a run."""
        return self.work_dir / Path(MODELS[kind].configs[norm]).stem

    def untrained(self) -> int:
        """Trainings still to do."""
        marks = [self.run_dir(*run) / 'trained.json' for run in self.runs]
        return sum(not mark.exists() for mark in marks)

    def train_seconds(self, run: tuple[str, str]) -> float:
        """Expected duration of a training."""
        steps = self.plan[run].train_cfg.max_iters
        return START_SECONDS + steps * MODELS[run[0]].step_seconds

    def __call__(self) -> None:
        """Go through all stages that are not done."""
        begin = time.time()
        self.progress = Progress(
            START_SECONDS
            + sum(self.train_seconds(run) + TEST_SECONDS for run in self.runs)
        )
        with self.progress.bar:
            self.prepare_data()
            rows = [self.run(*run) for run in self.runs]
            pictures = self.draw(rows)
        summary = {
            'data': {**self.source, 'fallback_because': self.fallback},
            'versions': self.versions,
            'device': device(),
            'runs': rows,
            'pictures': [str(picture) for picture in pictures],
            'seconds_this_time': round(time.time() - begin, 1),
        }
        write_json(summary, self.work_dir / 'summary.json')
        self.print_summary(summary)

    def prepare_data(self) -> None:
        """Write the tiles: of the real image, or else of generated shapes."""
        self.progress.begin('preparing the data', START_SECONDS)
        log = self.work_dir / 'data.log'
        status = NO_DOWNLOAD
        reason = '--offline'
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
        self.progress.end()

    def _convert(self, name: str, log: Path, *options: str) -> int:
        self.data = self.data_root / name
        command = [
            *(sys.executable, relative(CONVERTER)),
            *('--out', relative(self.data), *options),
        ]
        return run_child(
            command, log, self.lock, lambda line: None, self.progress.tick
        )

    def run(self, kind: str, norm: str) -> dict[str, Any]:
        """Train and evaluate one network, or find that done before."""
        model, config = MODELS[kind], self.plan[kind, norm]
        run_dir = self.run_dir(kind, norm)
        key = {
            'config': config.pretty_text,
            'data': self.source['sha256'],
            'layout': self.source['layout'],
            'versions': self.versions,
            'device': torch.cuda.is_available(),
        }
        claim(run_dir, key)
        trained = self.train(kind, norm, run_dir)
        tested = self.test(kind, norm, run_dir, trained['checkpoint'])
        return {
            'model': model.title,
            'norm': norm,
            'config': relative(CONFIGS / model.configs[norm]),
            'seed': config.randomness.seed,
            **trained,
            **tested,
        }

    def train(self, kind: str, norm: str, run_dir: Path) -> dict[str, Any]:
        """Train one network, or continue with it."""
        model, steps = MODELS[kind], self.plan[kind, norm].train_cfg.max_iters
        mark, checkpoint = run_dir / 'trained.json', f'iter_{steps}.pth'
        seconds = self.train_seconds((kind, norm))
        if mark.exists() and (run_dir / checkpoint).exists():
            self.progress.skip(seconds)
            return json.loads(mark.read_text())
        for stale in (mark, run_dir / 'tested.json'):
            stale.unlink(missing_ok=True)
        title = f'training {model.title}, {norm}'
        options = self.data_options(kind)
        if self.iters[kind]:
            options.append(f'train_cfg.max_iters={steps}')
        command = [
            *(sys.executable, relative(TOOLS / 'train.py')),
            relative(CONFIGS / model.configs[norm]),
            *('--work-dir', relative(run_dir)),
        ]
        resumed = 0
        newest, _ = newest_checkpoint(str(run_dir))
        if newest:
            resumed = int(Path(newest).stem.removeprefix('iter_'))
            command.append('--resume')
            self.progress.skip(resumed * model.step_seconds)
            seconds -= resumed * model.step_seconds
        if options:
            command += ['--cfg-options', *options]
        interval = self.plan[kind, norm].default_hooks.logger.interval

        def each(line: str) -> None:
            found = STEP.search(line)
            if found:
                step, total, loss = found.groups()
                self.progress.report(
                    f'{title}, step {step} of {total}, loss {loss}',
                    START_SECONDS + (int(step) - resumed) * model.step_seconds,
                    interval * model.step_seconds,
                )

        self.progress.begin(title, seconds)
        begin = time.time()
        log = run_dir / ('train_resumed.log' if newest else 'train.log')
        status = run_child(command, log, self.lock, each, self.progress.tick)
        if status or not (run_dir / checkpoint).exists():
            fail(f'Training {model.title} with {norm}', status, log)
        self.progress.end()
        done = {
            'steps': steps,
            'resumed_at_step': resumed,
            'train_seconds': round(time.time() - begin, 1),
            'checkpoint': checkpoint,
        }
        write_json(done, mark)
        return done

    def test(
        self, kind: str, norm: str, run_dir: Path, checkpoint: str
    ) -> dict[str, Any]:
        """Evaluate one network on the held-out tiles."""
        model = MODELS[kind]
        mark = run_dir / 'tested.json'
        if mark.exists():
            self.progress.skip(TEST_SECONDS)
            return json.loads(mark.read_text())
        folder = run_dir / 'test'
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            *(sys.executable, relative(TOOLS / 'test.py')),
            relative(CONFIGS / model.configs[norm]),
            relative(run_dir / checkpoint),
            *('--work-dir', relative(folder)),
            '--cfg-options',
            *self.data_options(kind),
            f'{model.predictions}={relative(folder / "predictions")}',
        ]
        self.progress.begin(f'evaluating {model.title}, {norm}', TEST_SECONDS)
        begin = time.time()
        log = run_dir / 'test.log'
        status = run_child(
            command, log, self.lock, lambda line: None, self.progress.tick
        )
        found = list(folder.glob('*/*.json'))
        if status or not found:
            fail(f'Evaluating {model.title} with {norm}', status, log)
        self.progress.end()
        values = json.loads(found[0].read_text())
        done = {
            'test_seconds': round(time.time() - begin, 1),
            'metrics': {
                # The host gives no AP where nothing at all was found.
                name: values.get(key, 0.0)
                for key, name in model.metrics.items()
            },
        }
        write_json(done, mark)
        tqdm.write(f'{model.title}, {norm}: {metrics_line(done["metrics"])}')
        return done

    def data_options(self, kind: str) -> list[str]:
        """Settings that lead a config to the data, where it is elsewhere."""
        root = relative(self.data) + '/'
        config = self.plan[kind, 'bcn-ws']
        if os.path.normpath(config.data_root) == os.path.normpath(root):
            return []
        loaders = ('train', 'val', 'test')
        options = [f'{x}_dataloader.dataset.data_root={root}' for x in loaders]
        if kind == 'det':
            file = root + 'annotations/instances_val.json'
            options += [f'{x}_evaluator.ann_file={file}' for x in loaders[1:]]
        return options

    def draw(self, rows: list[dict[str, Any]]) -> list[Path]:
        """Draw predictions of the BCN runs, and the curves of all."""
        origin = self.source['origin']
        curves = {model.title: {} for model in MODELS.values()}
        metrics = {model.title: {} for model in MODELS.values()}
        pictures = []
        for row in rows:
            run_dir = self.work_dir / Path(row['config']).stem
            curve = demo_figures.read_curve(run_dir)
            curves[row['model']][row['norm']] = curve
            metrics[row['model']][row['norm']] = row['metrics']
            if row['norm'] != 'bcn-ws':
                continue
            title = (
                f'{row["model"]}, WS + BCN, {row["steps"]} steps of one image:'
                f' {metrics_line(row["metrics"])}\n{origin}'
            )
            predictions = run_dir / 'test/predictions'
            if row['model'] == MODELS['det'].title:
                pictures.append(self.work_dir / 'instances.png')
                demo_figures.draw_instances(
                    self.data,
                    predictions.with_suffix('.segm.json'),
                    title,
                    pictures[-1],
                )
            else:
                pictures.append(self.work_dir / 'semantic.png')
                demo_figures.draw_semantic(
                    self.data, predictions, title, pictures[-1]
                )
        pictures.append(self.work_dir / 'losses.png')
        demo_figures.draw_curves(curves, origin, pictures[-1])
        if len(rows) > len(MODELS):
            pictures.append(self.work_dir / 'comparison.png')
            title = f'{origin}\nbn of DeepLabV3: gn in the head'
            demo_figures.draw_comparison(curves, metrics, title, pictures[-1])
        return pictures

    def print_summary(self, summary: dict[str, Any]) -> None:
        """Say what came out, and where it lies."""
        print(f'\nData: {self.source["origin"]}')
        if self.fallback:
            announce_fallback(self.fallback)
        for row in summary['runs']:
            print(
                f'  {row["model"]:<11}{row["norm"]:<7}{row["steps"]:>5} steps '
                f'in {row["train_seconds"]:.0f} s   '
                f'{metrics_line(row["metrics"])}'
            )
        for picture in summary['pictures']:
            print(f'  {picture}')
        print(
            f'  {self.work_dir / "summary.json"}\n'
            f'{summary["seconds_this_time"]:.0f} s this time.'
        )


def announce_fallback(reason: str) -> None:
    """Say loudly that the images are not real."""
    tqdm.write(
        '*** The images of this demo are GENERATED SHAPES, not the real '
        f'microscopy image.\n*** Reason: {reason}'
    )


def claim(run_dir: Path, key: dict[str, Any]) -> None:
    """Keep what ``run_dir`` holds if it was made the same way, else remove.

    Args:
        run_dir: of one network.
        key: everything that decides the result.

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
        tqdm.write(
            f'{run_dir} was made from other {", ".join(changed)}: starting '
            'it again.'
        )
        # The mark goes last: what a kill leaves is still known as ours.
        for path in run_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
    write_json(key, mark)


def versions() -> dict[str, str]:
    """Versions of everything that decides a result, ours by content."""
    names = metadata.packages_distributions()
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        if package not in names:
            raise SetupError(
                f'The demo needs {package}, which is not installed. The '
                'README has the one command that sets everything up.'
            )
        dist = names[package][0]
        found[dist] = metadata.version(dist)
    digest = hashlib.sha256()
    for path in sorted((ROOT / 'ws_mm').rglob('*.py')):
        digest.update(path.read_bytes())
    found['ws_mm'] = f'sources {digest.hexdigest()[:12]}'
    return found


def device() -> str:
    """What the children train on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'CPU, {torch.get_num_threads()} threads'


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics for people."""
    return ', '.join(f'{name} {value:.3g}' for name, value in metrics.items())


def relative(path: Path) -> str:
    """The path as one would type it here."""
    path = path.resolve()
    here = Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def check_space(folder: Path, runs: int) -> None:
    """See that the checkpoints of all runs will fit.

    Raises:
        SetupError: they will not.
    """
    free = shutil.disk_usage(folder).free
    if free < runs * RUN_SIZE:
        raise SetupError(
            f'{folder} has {free / 1e9:.1f} GB free, {runs} trainings need '
            f'{runs * RUN_SIZE / 1e9:.1f} GB. Free some, or name another '
            'folder with --work-dir.'
        )


def take_lock(folder: Path) -> TextIO:
    """Keep a second demo out of the work dir.

    Raises:
        SetupError: one, or a training that it started, is still running.
    """
    lock = (folder / '.lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SetupError(
            f'Another demo, or a training it started, is running in {folder}. '
            'Wait for it, or name another folder with --work-dir.'
        ) from error
    return lock


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
    lock = take_lock(args.work_dir)
    demo = Demo(args, lock)
    check_space(args.work_dir, demo.untrained())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        demo()
    except KeyboardInterrupt:
        print('Interrupted. The same command continues from here.')
        sys.exit(130)
    except OSError as error:
        raise SetupError(
            f'{error}. Mend it; the same command continues from here.'
        ) from error


if __name__ == '__main__':
    launch.run(main)
