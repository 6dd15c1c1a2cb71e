"""Bad input to train.py and test.py: said clearly, before anything runs."""

import importlib.util
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from tiny_runs import DET, ROOT, SEG, write_config, write_data

import ws_mm

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

Script = Callable[..., None]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts import each other; undo what they do to the process."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    for name in (
        *('LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'),
        *('SLURM_PROCID', 'SLURM_LOCALID', 'MASTER_ADDR', 'MASTER_PORT'),
    ):
        monkeypatch.setenv(name, '0')
        monkeypatch.delenv(name)
    # Set by the scripts for their process; monkeypatch takes it back.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
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


class Reached(Exception):
    """A script has come to building the Runner, with this config."""


@pytest.fixture
def reaches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Run a script's main up to the Runner and return the Runner's config."""

    def stop(cfg: Config) -> None:
        raise Reached(cfg)

    def run(script: str, *args: object) -> Config:
        monkeypatch.setattr('sys.argv', [script, *map(str, args)])
        module = load(script)
        monkeypatch.setattr(module.launch, 'build_runner', stop)
        with pytest.raises(Reached) as reached:
            module.main()
        return reached.value.args[0]

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


def test_converter_is_known_by_capitals_too(
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


def test_data_elsewhere_is_not_looked_for(config: Path) -> None:
    remote = [
        dict(data_root='s3://bucket/coco', ann_file='a.json'),
        dict(data_root='/no/such', backend_args=dict(backend='petrel')),
        dict(ann_file='http://host/a.json', data_prefix=dict(img='s3://b/i')),
    ]
    cfg = Config(dict(train_dataloader=dict(dataset=dict(datasets=remote))))
    load('checks').check_data(cfg, ('train_dataloader', 'val_dataloader'))


def test_validation_data_is_looked_for(refuses: Script, config: Path) -> None:
    with config.open('a') as file:
        file.write(
            'val_cfg = dict(type="ValLoop")\n'
            'val_evaluator = dict(test_evaluator)\n'
            'val_dataloader = dict(test_dataloader, dataset=dict(\n'
            '    test_dataloader["dataset"], ann_file="val.json"))\n'
        )
    refuses(
        r"val_dataloader\.dataset\.ann_file = 'val\.json'", 'train', config
    )
    empty = dict(images=[], annotations=[], categories=[])
    (config.parent / 'val.json').write_text(json.dumps(empty))
    refuses(
        r'No images for val_dataloader: val_dataloader\.dataset\.ann_file = '
        rf'{config.parent}/val\.json\.',
        *('train', config, '--work-dir', config.parent / 'work'),
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
    work = ('--work-dir', tmp_path / 'work')
    refuses(match, 'train', config, *work)


def test_testing_without_images(
    refuses: Script, config: Path, tmp_path: Path
) -> None:
    empty = dict(images=[], annotations=[], categories=[])
    (config.parent / 'instances.json').write_text(json.dumps(empty))
    weights = {'state_dict': {'backbone.conv1.weight': torch.ones(1)}}
    torch.save(weights, tmp_path / 'w.pth')
    refuses(
        r'No images for test_dataloader: .*instances\.json',
        *('test', config, tmp_path / 'w.pth', '--work-dir', tmp_path / 'work'),
    )


def test_images_that_filter_cfg_left_none_of() -> None:
    launch = load('launch')
    cfg = Config(dict(test_dataloader=dict(dataset=dict(ann_file='a.json'))))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=[]))
    runner = SimpleNamespace(cfg=cfg, _test_loop={}, test_loop=loop)
    with pytest.raises(
        launch.SetupError, match=r'ann_file = a\.json\. Either'
    ):
        launch.build_loops(runner, ('val', 'test'))


def test_what_is_not_understood_stays_as_it_is() -> None:
    launch = load('launch')

    class Runner:
        cfg = Config(dict(test_dataloader=dict(dataset=dict())))
        _test_loop: dict = {}  # noqa: RUF012

        @property
        def test_loop(self) -> None:
            raise ValueError('of a data set')

    with pytest.raises(ValueError, match='^of a data set$'):
        launch.build_loops(Runner(), ('test',))


def test_invalid_json_is_found_below_the_error_of_a_registry() -> None:
    launch = load('launch')

    class Runner:
        cfg = Config(dict(test_dataloader=dict(dataset=dict(ann_file='a.j'))))
        _test_loop: dict = {}  # noqa: RUF012

        @property
        def test_loop(self) -> None:
            # Some registries raise the type again, with a text alone.
            try:
                json.loads('{"images')
            except ValueError as error:
                raise type(error)(f'CocoDataset: {error}')  # noqa: B904

    with pytest.raises(launch.SetupError, match=r'ann_file = a\.j is not val'):
        launch.build_loops(Runner(), ('test',))


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
    elif kind == 'state_dict of a list':
        torch.save({'state_dict': [torch.ones(1)]}, path)
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
        ('state_dict of a list', 'it has no state_dict'),
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
    refuses(
        f'^load_from: .*{match}',
        *('train', config, *work, '--cfg-options', f'load_from={path}'),
    )
    with config.open('a') as file:
        file.write(f'model["backbone"]["init_cfg"] = [{init_cfg}]\n')
    key = r'model\.backbone\.init_cfg\.0\.checkpoint'
    refuses(f'{key}: .*{match}', 'train', config, *work)
    assert not (tmp_path / 'ran').exists()
    assert not (tmp_path / 'work').exists()


def test_checkpoint_of_the_host_is_read(tmp_path: Path) -> None:
    hub = MessageHub('tools')
    hub.update_scalar('train/loss', 1.5)
    hub.update_info('seen', np.float32(0.5))
    content = dict(state_dict=dict(a=torch.ones(1)))
    content['message_hub'] = hub.state_dict()
    torch.save(content, tmp_path / 'w.pth')
    found = load('checks').read_checkpoint(tmp_path / 'w.pth')
    assert found['message_hub']['runtime_info']['seen'] == 0.5


def test_checkpoints_elsewhere_are_left_to_the_host() -> None:
    checks = load('checks')
    init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    url = 'https://host/w.pth'
    model = dict(backbone=dict(init_cfg=init_cfg))
    checks.check_checkpoints(Config(dict(model=model, load_from=url)))
    checks.check_weights_fit(url, torch.nn.Linear(1, 1))
    checks.check_weights_fit(None, torch.nn.Linear(1, 1))


def test_prefixes_of_wrappers_are_no_difference(tmp_path: Path) -> None:
    checks = load('checks')
    plain = torch.nn.Linear(1, 1)
    wrapped = torch.nn.ModuleDict({'module': plain})
    twice = torch.nn.ModuleDict({'module': wrapped})
    for index, saved in enumerate((plain, wrapped)):
        path = str(tmp_path / f'{index}.pth')
        torch.save(dict(state_dict=saved.state_dict()), path)
        for model in (plain, wrapped, twice):
            checks.check_weights_fit(path, model)


def test_half_a_checkpoint_is_not_evaluated(
    refuses: Script,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        state = MODELS.build(cfg.model).state_dict()
    half = {k: v for k, v in state.items() if 'mask_head' not in k}
    path = tmp_path / 'half.pth'
    torch.save(dict(state_dict=half), path)
    refuses(
        rf'lacks {len(state) - len(half)} of {len(state)} tensors of the '
        r'model, such as roi_head\.mask_head\..*--allow-missing',
        *('test', config, path, '--work-dir', tmp_path / 'work'),
    )

    def evaluate(runner: Runner) -> None:
        raise load('test').SetupError('evaluated')

    monkeypatch.setattr(Runner, 'test', evaluate)
    refuses(
        '^evaluated$',
        *('test', config, path, '--work-dir', tmp_path / 'work'),
        '--allow-missing',
    )


def test_what_is_missing_is_said_after_the_layers_have_mapped_it(
    tmp_path: Path,
) -> None:
    checks = load('test').checks
    norm = torch.nn.Sequential(ws_mm.BCN(64), torch.nn.BatchNorm2d(3))
    wrapped = torch.nn.ModuleDict({'module': norm})
    path = str(tmp_path / 'norm.pth')
    theirs = dict(torch.nn.BatchNorm2d(64).state_dict(prefix='0.pbn.'))
    theirs['0.weight'] = theirs['0.bias'] = torch.rand(1, 32, 1)
    theirs.update(norm[1].state_dict(prefix='1.'))
    del theirs['1.num_batches_tracked']
    for prefix in ('', 'module.'):
        state = {prefix + name: values for name, values in theirs.items()}
        torch.save(dict(state_dict=state), path)
        for model in (norm, wrapped):
            checks.check_weights_complete(path, model)
        del state[f'{prefix}1.running_mean']
        torch.save(state, path)
        for model in (norm, wrapped):
            with pytest.raises(checks.SetupError, match='lacks 1 of 11'):
                checks.check_weights_complete(path, model)
    # Wrong shapes are the host's to report, addresses its to read.
    torch.save({'1.weight': torch.ones(5)}, path)
    checks.check_weights_complete(path, norm)
    checks.check_weights_complete('https://host/weights.pth', norm)


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
    refuses(
        "shares no parameter with the model: it has 'some.weight'",
        *('train', config, *work, '--cfg-options', f'load_from={weights}'),
    )


@pytest.mark.skipif(
    not os.path.exists('/dev/full'), reason='this system has no /dev/full'
)
def test_work_dir_on_a_full_disk(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = load('train').checks
    monkeypatch.setattr(
        checks.tempfile, 'TemporaryFile', lambda dir: open('/dev/full', 'wb')
    )
    work = ('--work-dir', config.parent / 'work')
    refuses(r'not writable \(No space left on dev', 'train', config, *work)


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
        (('--out', '/dev/null/a.pkl'), '--out /dev/null is not writable'),
        (('--show-dir', '/dev/null/a'), '--show-dir /dev/null/a is not'),
        (
            ('--show-dir', 'a', '--cfg-options', 'default_scope=mmengine'),
            "know default_scope mmdet and mmseg, not 'mmengine'",
        ),
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


def test_masks_are_seen_in_heads_of_one_stage() -> None:
    test = load('test')
    head = dict(type='CondInstMaskHead')
    cfg = Config(dict(default_scope='mmdet', model=dict(mask_head=head)))
    with pytest.raises(test.SetupError, match='merges boxes, not masks'):
        test.apply_tta(cfg)


@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('text', [DET, SEG], ids=['det', 'seg'])
def test_augmentation_is_that_of_the_config_or_a_flip(
    reaches: Callable[..., Config],
    weights: Path,
    tmp_path: Path,
    text: str,
    own: bool,
) -> None:
    config = write_config(write_data(tmp_path / 'data'), text)
    with config.open('a') as file:
        if text is DET:
            file.write('model["roi_head"]["mask_head"] = None\n')
        if own:
            file.write('tta_pipeline = [dict(type="MyAugmentation")]\n')
            file.write('tta_model = dict(type="MyModel", weight=2)\n')
    cfg = reaches('test', config, weights, '--tta', '--work-dir', tmp_path)
    host = 'DetTTAModel' if text is DET else 'SegTTAModel'
    assert cfg.model.type == ('MyModel' if own else host)
    kind = 'MaskRCNN' if text is DET else 'EncoderDecoder'
    assert cfg.model.module.type == kind
    last = cfg.test_dataloader.dataset.pipeline[-1]
    if own:
        assert last.type == 'MyAugmentation'
        assert cfg.model.weight == 2
    else:
        flips, (pack,) = last.transforms
        assert [flip.prob for flip in flips] == [0, 1]
        # The last of the transforms that the config had.
        assert pack.type.startswith('Pack')
        steps = [step.type for step in cfg.test_dataloader.dataset.pipeline]
        assert steps[0] == 'LoadImageFromFile'
        assert pack.type not in steps


def test_options_of_testing_reach_the_config(
    reaches: Callable[..., Config],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('DISPLAY', ':0')
    monkeypatch.chdir(tmp_path)
    url = 'https://host/w.pth'
    cfg = reaches(
        *('test', config, url, '--show', '--wait-time', '7'),
        *('--show-dir', 'seen', '--cfg-options', 'resume=True'),
    )
    # Its counters and its optimizer are of no interest here.
    assert (cfg.load_from, cfg.resume) == (url, False)
    assert cfg.work_dir == 'work_dirs/tiny'
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time) == (True, True, 7)
    # An absolute path: mmdet would put it into the work dir.
    assert hook.test_out_dir == str(tmp_path / 'seen')
    hook = reaches(
        *('test', config, url, '--show-dir', 'seen'),
    ).default_hooks.visualization
    assert (hook.draw, hook.get('show')) == (True, None)


def test_options_of_training_reach_the_config(
    reaches: Callable[..., Config],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    options = ('auto_scale_lr.base_batch_size=16', 'work_dir=of_config')
    cfg = reaches(
        *('train', config, '--amp', '--auto-scale-lr', '--cfg-options'),
        *(*options, 'default_hooks.checkpoint.max_keep_ckpts=1'),
    )
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.auto_scale_lr == dict(base_batch_size=16, enable=True)
    assert cfg.work_dir == 'of_config'
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert not cfg.get('resume')
    # mmengine reads it, and without a launcher nothing else sets it.
    assert os.environ['LOCAL_RANK'] == '0'

    Path('mine').mkdir()
    save_run(Path('mine/iter_3.pth'), 3)
    work = ('--work-dir', 'mine')
    cfg = reaches('train', config, *work, '--cfg-options', *options)
    assert cfg.work_dir == 'mine'
    assert not cfg.get('resume')
    for resume in ((), ('mine/iter_3.pth',)):
        cfg = reaches('train', config, *work, '--resume', *resume)
        assert (cfg.load_from, cfg.resume) == ('mine/iter_3.pth', True)
        assert cfg.optim_wrapper.type == 'OptimWrapper'


def test_amp_replaces_no_wrapper_of_another_kind(
    refuses: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    refuses(
        "config has 'ApexOptimWrapper'",
        *('train', config, '--amp', '--cfg-options'),
        'optim_wrapper.type=ApexOptimWrapper',
    )


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


@pytest.mark.parametrize(
    ('launcher', 'environment', 'wanted'),
    [
        # Two nodes of eight; what Slurm writes for a single task, nothing.
        ('slurm', dict(SLURM_NTASKS_PER_NODE='8(x2)'), 8),
        ('slurm', dict(SLURM_LOCALID='3'), 4),
        ('mpi', dict(OMPI_COMM_WORLD_LOCAL_SIZE='5'), 5),
    ],
)
def test_processes_of_this_machine_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    environment: dict,
    wanted: int,
) -> None:
    launch = load('launch')
    monkeypatch.delenv('SLURM_NTASKS_PER_NODE', raising=False)
    for names in (launch.ENVIRONMENT['slurm'], launch.ENVIRONMENT['mpi']):
        for name, value in zip(names, '0G0', strict=True):
            monkeypatch.setenv(name, value.replace('G', '16'))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: wanted - 1)
    with pytest.raises(launch.SetupError, match=f'{wanted} processes on this'):
        launch.set_up_processes(Config(dict(launcher=launcher)))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: wanted)
    cfg = Config(dict(launcher=launcher))
    launch.set_up_processes(cfg)
    # With GPUs, the rest is mmengine's.
    assert not torch.distributed.is_initialized()
    assert 'model_wrapper_cfg' not in cfg


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list:
    """What init_process_group is called with, instead of calling it."""
    calls = []
    monkeypatch.setattr(
        torch.distributed,
        'init_process_group',
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    return calls


def test_without_gpu_the_processes_of_slurm_talk_over_gloo(
    monkeypatch: pytest.MonkeyPatch, groups: list
) -> None:
    launch = load('launch')
    for name, value in zip(launch.ENVIRONMENT['slurm'], '231', strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('SLURM_NODELIST', 'node[7-8]')

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command == ['scontrol', 'show', 'hostnames', 'node[7-8]']
        return SimpleNamespace(stdout='node7\nnode8\n')

    monkeypatch.setattr(launch.subprocess, 'run', run)
    cfg = Config(dict(launcher='slurm', find_unused_parameters=True))
    launch.set_up_processes(cfg)
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    found = [os.environ[name] for name in names]
    assert found == ['2', '3', '1', 'node7', '29500']
    assert groups == [(('gloo',), dict(timeout=timedelta(seconds=1800)))]
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    )


def test_wrapper_address_and_timeout_of_the_user_stay(
    monkeypatch: pytest.MonkeyPatch,
    groups: list,
    capsys: pytest.CaptureFixture,
) -> None:
    launch = load('launch')
    for name, value in zip(launch.ENVIRONMENT['pytorch'], '120', strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('MASTER_ADDR', '10.9.8.7')
    monkeypatch.setenv('MASTER_PORT', '1234')
    cfg = Config(
        dict(
            launcher='pytorch',
            model_wrapper_cfg=dict(type='Mine', device_ids=[3]),
            env_cfg=dict(dist_cfg=dict(timeout=9)),
        )
    )
    launch.set_up_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(type='Mine', device_ids=None)
    assert groups == [(('gloo',), dict(timeout=timedelta(seconds=9)))]
    assert os.environ['MASTER_ADDR'] == '10.9.8.7'
    assert os.environ['MASTER_PORT'] == '1234'
    # Only the first process speaks.
    assert not capsys.readouterr().out


def test_local_rank_as_older_launchers_pass_it(
    reaches: Callable[..., Config], config: Path
) -> None:
    work = ('--work-dir', config.parent / 'work')
    reaches('train', config, *work, '--local_rank=3')
    assert os.environ['LOCAL_RANK'] == '3'
    reaches('train', config, *work, '--local-rank', '4')
    assert os.environ['LOCAL_RANK'] == '3'


def test_a_runner_of_the_config_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = load('launch')
    builder = SimpleNamespace(build=lambda cfg: cfg.runner_type)
    monkeypatch.setattr(launch, 'RUNNERS', builder)
    assert launch.build_runner(Config(dict(runner_type='Mine'))) == 'Mine'


@pytest.mark.parametrize('local', ['LOCAL_RANK', 'SLURM_LOCALID'])
def test_other_processes_wait_for_the_message_of_the_first(
    monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    launch = load('launch')
    waited = []
    monkeypatch.setattr(launch.time, 'sleep', waited.append)

    def fail() -> None:
        raise launch.SetupError('of the test')

    for rank, expected in (('0', []), ('1', [30])):
        monkeypatch.setenv(local, rank)
        with pytest.raises(SystemExit, match='1'):
            launch.run(fail)
        assert waited == expected


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
    # Other tools leave out parts that continuing needs.
    save_run(tmp_path / 'no_hub.pth', 13, message_hub=None)
    save_run(tmp_path / 'no_iter.pth', 14, meta=dict(epoch=9))
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
    cfg = Config(dict(work_dir=str(tmp_path), load_from='start.pth'))
    train.apply_resume(cfg, 'auto')
    assert not cfg.resume
    assert cfg.load_from == 'start.pth'
    assert 'training starts from scratch' in capsys.readouterr().out


def test_resume_looks_where_the_hook_saves(tmp_path: Path) -> None:
    train = load('train')
    hook = dict(checkpoint=dict(out_dir=str(tmp_path / 'elsewhere')))
    cfg = Config(
        dict(work_dir=f'{tmp_path}/run/', default_hooks=hook, resume=True)
    )
    (tmp_path / 'elsewhere' / 'run').mkdir(parents=True)
    saved = tmp_path / 'elsewhere' / 'run' / 'iter_3.pth'
    save_run(saved, 3)
    train.apply_resume(cfg, None)
    assert cfg.load_from == str(saved)
    # The hook takes its own folder for one of many runs, the work dir not.
    cfg.default_hooks.checkpoint.out_dir = str(tmp_path / 'run')
    assert train.checkpoint_dir(cfg) == f'{tmp_path}/run/'


def test_resume_of_the_config_takes_its_load_from(tmp_path: Path) -> None:
    train = load('train')
    save_run(tmp_path / 'iter_3.pth', 3)
    settings = dict(work_dir=str(tmp_path), resume=True, load_from='a.pth')
    cfg = Config(settings)
    train.apply_resume(cfg, None)
    assert (cfg.load_from, cfg.resume) == ('a.pth', True)
    cfg = Config(settings | dict(resume=False))
    train.apply_resume(cfg, None)
    assert (cfg.load_from, cfg.resume) == ('a.pth', False)


def test_resume_where_no_optimizer_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = load('train')
    save_run(tmp_path / 'iter_3.pth', 3, optimizer=None)
    (tmp_path / 'iter_4.pth').touch()
    hook = dict(checkpoint=dict(save_optimizer=False))
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=hook))
    train.apply_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (str(tmp_path / 'iter_3.pth'), True)
    said = capsys.readouterr().out
    assert f'passed over while resuming: {tmp_path}/iter_4.pth is not' in said
    assert f'Resuming from {tmp_path}/iter_3.pth.' in said


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    train = load('train')
    written: list[str] = []

    def save(
        out_dir: str, filename: str, *_: object, fail: bool, **__: object
    ) -> None:
        written.append(filename)
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
    assert written == ['a.pth.part', 'a.pth.part', 'b.pth']


def test_only_the_first_process_renames_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load('train')
    # The others call the hook as well and write nothing.
    runner = SimpleNamespace(save_checkpoint=lambda *_, **__: None)
    train.save_atomically(runner)
    monkeypatch.setattr(train, 'is_main_process', lambda: False)
    runner.save_checkpoint(str(tmp_path), 'a.pth')
    assert not list(tmp_path.iterdir())


def test_the_only_checkpoint_outlives_the_next_save(
    capsys: pytest.CaptureFixture,
) -> None:
    train = load('train')
    hook = dict(checkpoint=dict(max_keep_ckpts=1))
    cfg = Config(dict(default_hooks=hook))
    train.keep_a_whole_checkpoint(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert 'raised from 1 to 2' in capsys.readouterr().out
    hook['checkpoint'].update(max_keep_ckpts=5)
    cfg = Config(dict(default_hooks=hook))
    train.keep_a_whole_checkpoint(cfg)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 5


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (
            'norm_cfg=dict(type="ws_mm.BNC")',
            r"model\.backbone\.norm_cfg\.type = 'ws_mm\.BNC'; did you mean "
            r"'ws_mm\.BCN'",
        ),
        (
            'norm_cfg=dict(type="ws_mm.BCN", num_gruops=4)',
            r"mean 'num_groups'.*model\.backbone\.norm_cfg\.num_gruops = 4",
        ),
        (
            'norm_cfg=dict(type="BN", num_groups=4)',
            r'In the config: model\.backbone\.norm_cfg\.num_groups = 4$',
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
    with config.open('a') as file:
        file.write(f'model["backbone"].update({change})\n')
    refuses(match, 'bake', config, 'w.pth', 'out')
    work = ('--work-dir', config.parent / 'work')
    refuses(match, 'train', config, *work)


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
    said = load('checks').explain(Config(dict(model=parts)), error)
    assert said.count('norm_cfg.typo = 1') == 4
    assert said.endswith('and 2 more')
