"""Bad input to train.py and test.py: said clearly, before anything runs."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_runs import ROOT, SEG, write_config, write_data

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

Script = Callable[..., None]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts import each other; undo what they do to the process."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    for name in ('LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'SLURM_LOCALID'):
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)


def load(name: str) -> ModuleType:
    """A module of tools/; Python has another one that is called test."""
    path = ROOT / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'tools_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Run a script's main with arguments and require its error."""

    def run(match: str, script: str, *args: object) -> None:
        monkeypatch.setattr('sys.argv', [script, *map(str, args)])
        module = load(script)
        with pytest.raises(module.SetupError, match=match):
            module.main()

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A detection config with its data."""
    return write_config(write_data(tmp_path / 'data'))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A well-formed checkpoint, of no model in particular."""
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': {'some.weight': torch.ones(2)}}, path)
    return path


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
    ],
)
def test_unknown_key(
    refuses: Script, config: Path, option: str, match: str
) -> None:
    refuses(match, 'train', config, '--cfg-options', option)


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


def test_host_package_that_is_not_installed(
    refuses: Script, config: Path
) -> None:
    refuses(
        'needs mmnothing .*pip install',
        *('train', config, '--cfg-options', 'default_scope=mmnothing'),
    )


def test_mmcv_without_operators(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'mmcv._ext' else find(name),
    )
    refuses('pip install --no-build-isolation', 'train', config)


def test_data_that_is_not_there(refuses: Script, config: Path) -> None:
    nested = (
        'wrapped = dict(type="RepeatDataset", times=2, dataset=dict('
        'type="ConcatDataset", datasets=[dataset, dict(type="CocoDataset", '
        'data_root="no/coco")]))\n'
        'train_dataloader = dict(dataset=wrapped)\n'
        'test_dataloader["dataset"].update(ann_file="other.json")\n'
        'test_evaluator.update(ann_file="no/eval.json")\n'
    )
    config.write_text(config.read_text() + nested)
    folder = os.path.abspath('no/coco')
    refuses(
        r'train_dataloader\.dataset\.dataset\.datasets\.1\.data_root = '
        rf"'no/coco': no folder {folder}\n(.*\n)*.*"
        r'python tools/dataset_converters/coco\.py -h$',
        *('train', config),
    )
    weights = config.parent / 'w.pth'
    torch.save({'state_dict': {'a': torch.ones(1)}}, weights)
    refuses(
        r"test_dataloader\.dataset\.ann_file = 'other\.json': nothing at "
        rf'{config.parent}/other\.json\n  test_evaluator\.ann_file = '
        r"'no/eval\.json'",
        *('test', config, weights),
    )


def test_voc_data_names_the_voc_command(
    refuses: Script, tmp_path: Path
) -> None:
    config = write_config(
        write_data(tmp_path / 'VOC2012'),
        SEG,
        'dataset.update(data_prefix=dict(img_path="JPEGImages"))\n'
        'train_dataloader = dict(dataset=dataset)\n',
    )
    refuses(
        r'data_prefix\.img_path = .JPEGImages.: nothing at '
        r'(.*\n)*.*dataset_converters/voc12_aug\.py -h$',
        *('train', config),
    )


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        (
            dict(images=[], annotations=[], categories=[]),
            r'No images for train_dataloader: .*instances\.json',
        ),
        (
            dict(
                images=[dict(id=1, file_name='a', width=9, height=9)],
                annotations=[],
                categories=[dict(id=1, name='square')],
            ),
            'drops images without objects',
        ),
        (dict(categories=[]), 'Either the file lists none'),
        ('{"images": [', 'is not valid JSON'),
    ],
    ids=['no images', 'no objects', 'not COCO', 'truncated'],
)
def test_unusable_annotations(
    refuses: Script,
    config: Path,
    content: dict | str,
    match: str,
    tmp_path: Path,
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (config.parent / 'instances.json').write_text(text)
    refuses(match, 'train', config, '--work-dir', tmp_path / 'work')


class Payload:
    """Pickled, it runs a command when it is loaded the unsafe way."""

    def __init__(self, proof: Path) -> None:
        """Remember the file that the command would make."""
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def write_bad_checkpoint(kind: str, path: Path) -> None:
    """A file that is not a checkpoint, in one of the ways known."""
    weights = {'state_dict': {'a.weight': torch.ones(9)}}
    old = dict(_use_new_zipfile_serialization=False)
    if kind == 'text':
        path.write_text('<html>404</html>')
    elif kind == 'empty':
        path.touch()
    elif kind == 'list':
        torch.save([1, 2], path)
    elif kind == 'no state_dict':
        torch.save({'epoch': 3}, path)
    elif kind == 'code':
        torch.save(weights | {'x': Payload(path.with_name('ran'))}, path)
    elif kind == 'old code':
        payload = {'x': Payload(path.with_name('ran'))}
        torch.save(weights | payload, path, **old)
    else:
        torch.save(weights, path, **(old if 'old' in kind else {}))
        os.truncate(path, path.stat().st_size - 30)


@pytest.mark.parametrize(
    ('kind', 'match'),
    [
        ('text', r'w\.pth is not a checkpoint: torch\.save did not write'),
        ('empty', r'w\.pth is not a checkpoint: torch\.save did not write'),
        ('list', 'it holds a list'),
        ('no state_dict', "no state_dict; it holds 'epoch'"),
        ('code', r'holds a \w+\.mkdir, which only running code'),
        ('old code', r'holds a \w+\.mkdir, which only running code'),
        ('truncated', r'w\.pth is truncated'),
        ('old truncated', r'w\.pth is not a checkpoint'),
    ],
)
def test_checkpoint_that_is_none(
    refuses: Script, config: Path, tmp_path: Path, kind: str, match: str
) -> None:
    path = tmp_path / 'w.pth'
    write_bad_checkpoint(kind, path)
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'test', config, path, *work)
    refuses(match, 'train', config, *work, '--resume', path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    with config.open('a') as file:
        file.write(f'model["backbone"]["init_cfg"] = {init_cfg}\n')
    key = r'model\.backbone\.init_cfg\.checkpoint'
    refuses(f'{key}: .*{match}', 'train', config, *work)
    assert not (tmp_path / 'ran').exists()
    assert not (tmp_path / 'work').exists()


def test_checkpoint_with_a_typo(
    refuses: Script, config: Path, weights: Path
) -> None:
    wrong = weights.with_name('wieghts.pth')
    refuses(
        rf'No checkpoint file {wrong}\. Did you mean {weights}\?',
        *('test', config, wrong),
    )


def test_checkpoint_of_another_model(
    refuses: Script, config: Path, weights: Path, tmp_path: Path
) -> None:
    work = ('--work-dir', tmp_path / 'work')
    refuses(
        "shares no parameter with the model: it has 'some.weight'",
        *('test', config, weights, *work),
    )


def test_work_dir_that_cannot_be_written(
    refuses: Script, config: Path, weights: Path
) -> None:
    below_a_file = weights / 'work'
    match = rf'--work-dir {below_a_file} is not writable \(Not a directory\)'
    refuses(match, 'train', config, '--work-dir', below_a_file)
    refuses(match, 'test', config, weights, '--work-dir', below_a_file)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (('--out', 'a.json'), r'--out a\.json: the name must end with \.pkl'),
        (('--show',), '--show needs a screen'),
        (('--tta',), 'merges boxes, not masks.*mask_head=None'),
    ],
)
def test_options_of_testing(
    refuses: Script,
    config: Path,
    weights: Path,
    options: tuple[str, ...],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ('DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.delenv(name, raising=False)
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'test', config, weights, *work, *options)


def test_options_of_training(refuses: Script, config: Path) -> None:
    refuses('--amp needs a GPU', 'train', config, '--amp')
    refuses(
        r'needs auto_scale_lr\.base_batch_size',
        *('train', config, '--auto-scale-lr'),
    )


def test_processes(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ('--work-dir', config.parent / 'work', '--launcher', 'pytorch')
    refuses(
        r'RANK, WORLD_SIZE, LOCAL_RANK is not set.*dist_train\.sh',
        *('train', config, *work),
    )
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.setenv(name, '8')
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '0')
    refuses(
        '8 processes on this machine need 8 GPUs, but torch sees 1',
        *('train', config, *work),
    )


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


def save_run(path: Path, iteration: int, **more: object) -> None:
    """A checkpoint as training writes it."""
    content = dict(
        meta=dict(iter=iteration, epoch=0),
        state_dict={'a': torch.ones(1)},
        message_hub=dict(),
        optimizer=dict(state={}),
    )
    content |= more
    torch.save({k: v for k, v in content.items() if v is not None}, path)


def test_newest_checkpoint_goes_by_iteration_and_can_be_continued(
    tmp_path: Path,
) -> None:
    newest = load('checks').newest_checkpoint
    assert newest(str(tmp_path)) == (None, [])
    save_run(tmp_path / 'iter_10.pth', 10)
    save_run(tmp_path / 'iter_9.pth', 9)
    # save_best leaves out the optimizer; weights were put there by hand.
    save_run(tmp_path / 'best_iter_12.pth', 12, optimizer=None)
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'w.pth')
    assert newest(str(tmp_path)) == (str(tmp_path / 'iter_10.pth'), [])
    assert newest(str(tmp_path), with_optimizer=False) == (
        str(tmp_path / 'best_iter_12.pth'),
        [],
    )
    save_run(tmp_path / 'iter_11.pth', 11)
    os.truncate(tmp_path / 'iter_11.pth', 100)
    path, broken = newest(str(tmp_path))
    assert path == str(tmp_path / 'iter_10.pth')
    assert len(broken) == 1
    assert 'iter_11.pth is truncated' in broken[0]


def test_resume_from_nothing_keeps_load_from(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = load('train')
    cfg = train.Config(dict(work_dir=str(tmp_path), load_from='start.pth'))
    train.apply_resume(cfg, 'auto')
    assert not cfg.resume
    assert cfg.load_from == 'start.pth'
    assert 'training starts from scratch' in capsys.readouterr().out


def test_resume_looks_where_the_hook_saves(tmp_path: Path) -> None:
    train = load('train')
    hook = dict(checkpoint=dict(out_dir=str(tmp_path / 'elsewhere')))
    cfg = train.Config(
        dict(work_dir=str(tmp_path / 'run/'), default_hooks=hook, resume=True)
    )
    (tmp_path / 'elsewhere' / 'run').mkdir(parents=True)
    saved = tmp_path / 'elsewhere' / 'run' / 'iter_3.pth'
    save_run(saved, 3)
    train.apply_resume(cfg, None)
    assert cfg.load_from == str(saved)


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    train = load('train')

    def save(
        out_dir: str, filename: str, *_: object, fail: bool, **__: object
    ) -> None:
        (Path(out_dir) / filename).write_bytes(b'half')
        if fail:
            raise KeyboardInterrupt

    runner = SimpleNamespace(save_checkpoint=save)
    train.save_atomically(runner)
    with pytest.raises(KeyboardInterrupt, match=r'^$'):
        runner.save_checkpoint(str(tmp_path), 'a.pth', None, fail=True)
    assert not (tmp_path / 'a.pth').exists()
    runner.save_checkpoint(str(tmp_path), 'a.pth', None, fail=False)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']
    # What only a backend can name is left to the backend.
    runner.save_checkpoint(
        str(tmp_path), filename='b.pth', backend_args={'b': 1}, fail=False
    )
    assert (tmp_path / 'b.pth').exists()


def test_the_only_checkpoint_outlives_the_next_save(
    capsys: pytest.CaptureFixture,
) -> None:
    train = load('train')
    hook = dict(checkpoint=dict(max_keep_ckpts=1))
    cfg = train.Config(dict(default_hooks=hook))
    train.keep_a_whole_checkpoint(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert 'raised from 1 to 2' in capsys.readouterr().out
