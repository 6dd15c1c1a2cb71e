"""The real scripts, run on tiny data: train, kill, resume, test, draw."""

import os
import pickle
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Forks
from tiny_runs import (
    DET,
    ROOT,
    SEG,
    call,
    fake_commands,
    free_port,
    write_config,
    write_data,
)

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

BOXES_ONLY = (
    'model.roi_head.mask_head=None',
    'model.roi_head.mask_roi_extractor=None',
    'test_evaluator.metric=bbox',
)


@pytest.fixture(scope='module')
def det(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a detection config."""
    folder = write_data(tmp_path_factory.mktemp('det') / 'data of squares')
    write_config(folder, DET)
    return folder


@pytest.fixture(scope='module')
def trained(det: Path) -> Path:
    """Checkpoint of two iterations in two processes."""
    work_dir = det / 'two processes'
    done = call(
        'dist_train.sh',
        det / 'tiny.py',
        2,
        '--work-dir',
        work_dir,
        '--cfg-options',
        'train_cfg.max_epochs=2',
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('2 processes run on the CPU') == 1
    # Two images in two processes are one iteration an epoch.
    assert 'Epoch(train) [2][1/1]' in done.stdout
    return work_dir / 'epoch_2.pth'


def predictions(path: Path) -> dict[int, dict]:
    """Dumped predictions by image id."""
    samples = pickle.loads(path.read_bytes())
    return {s['img_id']: s['pred_instances'] for s in samples}


def test_two_processes_predict_what_one_does(
    forks: Forks, det: Path, trained: Path, tmp_path: Path
) -> None:
    one = forks.run(
        'test',
        det / 'tiny.py',
        trained,
        *('--work-dir', tmp_path / 'one', '--out', tmp_path / 'one.pkl'),
        *('--show-dir', tmp_path / 'pictures'),
    )
    assert one.returncode == 0, one.stdout
    assert 'coco/segm_mAP' in one.stdout
    drawn = {path.name for path in (tmp_path / 'pictures').iterdir()}
    assert drawn == {'0.png', '1.png'}
    two = call(
        'dist_test.sh',
        det / 'tiny.py',
        trained,
        2,
        *('--work-dir', tmp_path / 'two', '--out', tmp_path / 'two.pkl'),
    )
    assert two.returncode == 0, two.stdout
    ours = predictions(tmp_path / 'one.pkl')
    theirs = predictions(tmp_path / 'two.pkl')
    assert set(ours) == set(theirs) == {0, 1}
    for index in ours:
        assert len(ours[index]['scores']) > 0
        torch.testing.assert_close(
            ours[index]['bboxes'], theirs[index]['bboxes']
        )
        assert len(ours[index]['masks']) == len(ours[index]['scores'])
        # mmdet's dump holds run lengths, mmengine's would be whole masks.
        assert all('counts' in mask for mask in ours[index]['masks'])
    # Nothing is left where the scripts were called from.
    assert not (Path.cwd() / '.dist_test').exists()


def test_augmentation_merges_boxes_of_the_flipped_image(
    forks: Forks, det: Path, trained: Path, tmp_path: Path
) -> None:
    done = forks.run(
        'test',
        det / 'tiny.py',
        trained,
        *('--tta', '--work-dir', tmp_path, '--out', tmp_path / 'tta.pkl'),
        *('--cfg-options', *BOXES_ONLY),
    )
    assert done.returncode == 0, done.stdout
    assert 'coco/bbox_mAP' in done.stdout
    # Two views of at most 5 boxes each.
    merged = predictions(tmp_path / 'tta.pkl')
    assert all(0 < len(boxes['scores']) <= 10 for boxes in merged.values())
    assert any(len(boxes['scores']) > 5 for boxes in merged.values())


def test_a_killed_training_resumes_from_its_last_whole_checkpoint(
    forks: Forks, det: Path, tmp_path: Path
) -> None:
    process = forks.start(
        'train',
        det / 'tiny.py',
        *('--work-dir', tmp_path, '--cfg-options'),
        'train_cfg.max_epochs=1000',
        log=tmp_path / 'log',
    )
    while len(list(tmp_path.glob('*.pth'))) <= 10:
        assert forks.poll(process) is None
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert forks.wait(process) == -signal.SIGKILL
    numbers = sorted(
        int(path.stem.removeprefix('epoch_'))
        for path in tmp_path.glob('epoch_*.pth')
    )
    # Older versions of the host write in place: half a file, too, happens.
    newest = tmp_path / f'epoch_{numbers[-1]}.pth'
    os.truncate(newest, newest.stat().st_size // 2)
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    (tmp_path / 'epoch_999.pth.part').write_bytes(b'PK')

    last = numbers[-2]
    done = forks.run(
        'train',
        det / 'tiny.py',
        *('--work-dir', tmp_path, '--resume'),
        *('--cfg-options', f'train_cfg.max_epochs={last + 1}'),
    )
    assert done.returncode == 0, done.stdout
    assert re.search(
        f'passed over while resuming: .*{newest.name} is truncated',
        done.stdout,
    )
    assert f'resumed epoch: {last}, iter: {2 * last}' in done.stdout
    assert f'Epoch(train) [{last + 1}][2/2]' in done.stdout
    # The truncated one was written anew.
    whole = torch.load(newest, weights_only=False)
    assert whole['meta']['epoch'] == last + 1
    assert whole['optimizer']['state']
    assert not list(tmp_path.glob('*.part'))


def test_a_base_of_a_renamed_distribution_is_found_by_the_host(
    tmp_path: Path,
) -> None:
    # What MMDetection's and MMSegmentation's own train.py begin with.
    code = (
        'import sys\n'
        'from mmengine.config import Config\n'
        'for path in sys.argv[1:]:\n'
        '    print(Config.fromfile(path).default_scope)\n'
        'from mmengine.config.utils import MODULE2PACKAGE\n'
        'from mmengine.utils import is_installed\n'
        "assert is_installed(MODULE2PACKAGE['mmseg'])\n"
        "assert is_installed(MODULE2PACKAGE['mmdet'])\n"
        # Its messages say pip install and this name: it stays where it is
        # right.
        "if is_installed('mmsegmentation'):\n"
        "    assert MODULE2PACKAGE['mmseg'] == 'mmsegmentation'"
    )
    configs = []
    for scope in ('mmseg', 'mmdet'):
        configs.append(tmp_path / f'{scope}.py')
        runtime = f'{scope}::_base_/default_runtime.py'
        configs[-1].write_text(f"_base_ = __import__('ws_mm') and '{runtime}'")
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, configs)],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['mmseg', 'mmdet']


def fake_slurm(folder: Path) -> Path:
    """Commands of Slurm's names that run one task here."""
    (folder / 'srun').write_text(
        '#!/usr/bin/env bash\n'
        'echo "srun got: $*"\n'
        'while [[ $1 != python ]]; do shift; done\n'
        'export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0\n'
        'export SLURM_NODELIST=localhost\n'
        'exec "$@"\n'
    )
    (folder / 'scontrol').write_text('#!/bin/sh\necho 127.0.0.1\n')
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def test_segmentation_trains_under_slurm_and_is_tested_augmented(
    forks: Forks, tmp_path: Path
) -> None:
    config = write_config(write_data(tmp_path / 'data'), SEG)
    (tmp_path / 'bin').mkdir()
    slurm = fake_slurm(tmp_path / 'bin')
    done = call(
        *('slurm_train.sh', 'gpu', 'a job', config, tmp_path / 'work dir'),
        *('--cfg-options', 'train_cfg.max_iters=1'),
        PATH=f'{slurm}:{Path(sys.executable).parent}:{os.environ["PATH"]}',
        GPUS='4',
        SRUN_ARGS='--quotatype auto',
        MASTER_PORT=free_port(),
    )
    assert done.returncode == 0, done.stdout
    assert re.search(
        'srun got: --partition gpu --job-name a job --gres gpu:4 --ntasks 4 '
        '--ntasks-per-node 4 .*--quotatype auto python',
        done.stdout,
    )
    assert '1 processes run on the CPU' in done.stdout

    out = tmp_path / 'out.pkl'
    done = forks.run(
        *('test', config, tmp_path / 'work dir' / 'iter_1.pth', '--tta'),
        *('--work-dir', tmp_path / 'test', '--out', out),
        *('--show-dir', tmp_path / 'pictures'),
        *('--verify', '--cfg-options', 'expected.source=nobody'),
        *('expected.metrics.mIoU=101.0', 'expected.tolerance=0.5'),
    )
    assert done.returncode == 1, done.stdout
    assert re.search(
        r'error: --verify: missed: mIoU [\d.]+, expected 101 within 0.5',
        done.stdout,
    )
    samples = pickle.loads(out.read_bytes())
    assert len(samples) == 2
    assert all(
        sample['pred_sem_seg']['data'].shape == (1, 64, 64)
        for sample in samples
    )
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 2


def test_sync_bn_without_gpu_is_refused_once_for_all_processes(
    forks: Forks, tmp_path: Path
) -> None:
    norm = "model['backbone'].update(norm_cfg=dict(type='SyncBN'))\n"
    config = write_config(write_data(tmp_path / 'data'), DET, norm)
    ranks = forks.start_ranks(
        *('train', config, '--work-dir', tmp_path / 'work'), logs=tmp_path
    )
    assert forks.wait(ranks[0]) == 1
    # The second one waits until the launcher ends it.
    assert forks.poll(ranks[1]) is None
    os.kill(ranks[1], signal.SIGKILL)
    first, second = ((tmp_path / f'log {r}').read_text() for r in range(2))
    assert len(re.findall(r'^error: SyncBN', first, re.MULTILINE)) == 1
    assert "Set the type in norm_cfg to 'BN', 'GN' or" in first
    assert 'error' not in second


@pytest.mark.parametrize(
    ('command', 'usage'),
    [
        (('dist_train.sh', 'a.py'), 'CONFIG GPUS'),
        (('dist_train.sh', 'a.py', '--resume'), 'CONFIG GPUS'),
        (('dist_train.sh', 'a.py', '0'), 'CONFIG GPUS'),
        (('dist_test.sh', 'a.py', '2'), 'CONFIG CHECKPOINT GPUS'),
        (('dist_test.sh', 'a.py', 'b.pth', 'x'), 'CONFIG CHECKPOINT GPUS'),
        (('slurm_train.sh', 'p', 'j'), 'JOB_NAME CONFIG [WORK_DIR]'),
        (('slurm_test.sh', 'p', 'j', 'a.py'), 'JOB_NAME CONFIG CHECKPOINT'),
    ],
)
def test_missing_arguments_print_the_usage(
    command: tuple[str, ...], usage: str
) -> None:
    done = call(*command)
    assert done.returncode == 2
    assert done.stdout.startswith('usage: ')
    assert usage in done.stdout
    assert done.stdout.count('\n') == 1


DIST = [
    *('python', '-m', 'torch.distributed.run'),
    *('--nnodes', '1', '--node-rank', '0'),
    *('--master-addr', '127.0.0.1', '--master-port', 'FREE'),
    *('--nproc-per-node', '3'),
]
SRUN = [
    *('srun', '--partition', 'gpu', '--job-name', 'a job'),
    *('--gres', 'gpu:8', '--ntasks', '8', '--ntasks-per-node', '8'),
    *('--cpus-per-task', '5', '--kill-on-bad-exit=1', 'python', '-u'),
]


@pytest.mark.parametrize(
    ('command', 'started', 'passed'),
    [
        ('dist_train.sh|a b.py|3', DIST, 'train.py|a b.py|--launcher|pytorch'),
        (
            'dist_train.sh|a b.py|3|--resume|c d|--amp',
            DIST,
            'train.py|a b.py|--resume|c d|--amp|--launcher|pytorch',
        ),
        (
            'dist_test.sh|a b.py|c d.pth|3|--tta|--out|e f.pkl',
            DIST,
            'test.py|a b.py|c d.pth|--tta|--out|e f.pkl|--launcher|pytorch',
        ),
        (
            'slurm_train.sh|gpu|a job|a b.py',
            SRUN,
            'train.py|a b.py|--launcher|slurm',
        ),
        (
            'slurm_train.sh|gpu|a job|a b.py|--resume|c d',
            SRUN,
            'train.py|a b.py|--resume|c d|--launcher|slurm',
        ),
        (
            'slurm_train.sh|gpu|a job|a b.py|work dir|--amp',
            SRUN,
            'train.py|a b.py|--work-dir|work dir|--amp|--launcher|slurm',
        ),
        (
            'slurm_test.sh|gpu|a job|a b.py|c d.pth|--out|e f.pkl',
            SRUN,
            'test.py|a b.py|c d.pth|--out|e f.pkl|--launcher|slurm',
        ),
    ],
)
def test_scripts_pass_their_arguments_on(
    command: str, started: list[str], passed: str, tmp_path: Path
) -> None:
    path = fake_commands(tmp_path / 'bin')
    done = call(*command.split('|'), PATH=path, PYTHONPATH='before')
    assert done.returncode == 0, done.stdout
    python_path, *got = done.stdout.splitlines()
    assert python_path == f'{ROOT}:before'
    if 'FREE' in started:
        # Not the port that every other run on this machine would take.
        at = started.index('FREE') - 1
        assert got[at] not in ('', '0', '29500')
        got[at] = 'FREE'
    script, *arguments = passed.split('|')
    assert got == [*started[1:], str(ROOT / 'tools' / script), *arguments]


def test_several_nodes_share_address_and_port(tmp_path: Path) -> None:
    path = fake_commands(tmp_path / 'bin')
    node = dict(PATH=path, NNODES='2', NODE_RANK='1', MASTER_ADDR='10.9.8.7')
    done = call('dist_train.sh', 'a.py', 4, **node)
    assert (
        '--nnodes 2 --node-rank 1 --master-addr 10.9.8.7 --master-port 29500 '
        '--nproc-per-node 4'
    ) in ' '.join(done.stdout.splitlines())
    # The first node listens: to the others its port is not a taken one.
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
        node |= dict(MASTER_ADDR='127.0.0.1', PORT=port)
        done = call('dist_test.sh', 'a.py', 'b.pth', 4, **node)
    assert done.returncode == 0, done.stdout
    assert f'--master-port\n{port}\n' in done.stdout


def test_slurm_asks_for_what_the_environment_says(tmp_path: Path) -> None:
    path = fake_commands(tmp_path / 'bin')
    job = dict(PATH=path, GPUS='12', GPUS_PER_NODE='4', CPUS_PER_TASK='2')
    done = call('slurm_train.sh', 'gpu', 'job', 'a.py', **job)
    assert (
        '--gres gpu:4 --ntasks 12 --ntasks-per-node 4 --cpus-per-task 2 '
        '--kill-on-bad-exit=1 python'
    ) in ' '.join(done.stdout.splitlines())
    # No more tasks on a node than there are in all.
    job = dict(PATH=path, GPUS='2', SRUN_ARGS='--quotatype auto')
    done = call('slurm_test.sh', 'gpu', 'job', 'a.py', 'b.pth', **job)
    assert (
        '--gres gpu:2 --ntasks 2 --ntasks-per-node 2 --cpus-per-task 5 '
        '--kill-on-bad-exit=1 --quotatype auto python'
    ) in ' '.join(done.stdout.splitlines())


def test_a_taken_port_and_a_missing_srun_are_named() -> None:
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
        done = call('dist_train.sh', 'a.py', 2, PORT=port)
    assert done.returncode == 1
    assert done.stdout.startswith(f'error: PORT={port} is in use on 127.0.0.1')
    assert done.stdout.count('\n') == 1
    done = call('slurm_test.sh', 'p', 'j', 'a.py', 'b.pth', PATH='/usr/bin')
    assert done.returncode == 1
    assert done.stdout.startswith('error: srun is not in PATH')
