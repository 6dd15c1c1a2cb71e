"""export.py and test_onnx.py on tiny models, onnxruntime as the judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import shipped
import torch
from in_process import load, tools  # noqa: F401
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from shipped import write_shipped
from tiny_runs import DET, ROOT, SEG, write_config, write_data
from torch import nn

import ws_mm

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

# A corner-aligned head asks the host for a hint about sizes, and an
# auxiliary head must stay out of the file.
ALIGNED = """
model['decode_head']['align_corners'] = True
model['auxiliary_head'] = dict(
    type='FCNHead', in_channels=8, in_index=0, channels=8, num_classes=2
)
model['data_preprocessor']['mean'] = [1.0, 2.0, 3.0]
model['data_preprocessor']['std'] = [4.0, 5.0, 6.0]
"""
SHALLOW = """
model['backbone'] |= dict(
    num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)
)
model['decode_head'] |= dict(in_channels=16, in_index=1)
"""


def randomize(model):
    """Weights, affines and estimates that no default hides behind."""
    generator = torch.Generator().manual_seed(0)
    for name, values in model.state_dict().items():
        if name.endswith('var'):
            values.uniform_(0.5, 2, generator=generator)
        elif values.dim() > 1:
            values.normal_(0.1, 0.5, generator=generator)
        elif values.is_floating_point():
            values.uniform_(-1, 1, generator=generator)
    return model.eval()


def write(folder: Path, text: str):
    """A config and a random checkpoint of it; also the model."""
    config, weights = folder / 'tiny.py', folder / 'tiny.pth'
    config.write_text(text)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = randomize(MODELS.build(cfg.model))
    torch.save(dict(state_dict=model.state_dict()), weights)
    return config, weights, model


def outputs_of(model, image):
    with torch.no_grad():
        if hasattr(model, 'encode_decode'):
            meta = dict(img_shape=image.shape[2:])
            return [model.encode_decode(image, [meta])]
        return list(model.extract_feat(image))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, two in zip(actual, expected, strict=True):
        assert one.shape == two.shape
        error = (torch.as_tensor(one) - two).abs().max() / two.abs().max()
        assert error < 1e-5


KINDS = {
    'mmdet': DET,
    'mmseg': SEG + SHALLOW + ALIGNED,
    'gray': DET + "\nmodel['backbone']['in_channels'] = 1\n",
}
GN = SEG.replace("type='ws_mm.BCN', num_groups=4", "type='GN', num_groups=4")
# None of them is a size that the tool itself has looked at.
OTHER_SIZES = [(1, 64, 64), (4, 50, 81), (2, 33, 200)]


@pytest.mark.parametrize('kind', KINDS)
def test_onnx_computes_what_the_model_does(kind, script, tmp_path, capsys):
    config, weights, model = write(tmp_path, KINDS[kind])
    out = tmp_path / 'new.onnx'
    script('export', config, weights, out)
    told = capsys.readouterr().out
    assert 'at most' in told
    assert '3 x 65 x 97: ' in told
    session = onnxruntime.InferenceSession(str(out))
    channels = session.get_inputs()[0].shape[1]
    assert channels == (1 if kind == 'gray' else 3)
    names = [output.name for output in session.get_outputs()]
    features = [f'feature{index}' for index in range(5)]
    assert names == (['logits'] if kind == 'mmseg' else features)
    for size in OTHER_SIZES:
        image = torch.randn(size[0], channels, *size[1:])
        actual = session.run(None, {'image': image.numpy()})
        assert_same(actual, outputs_of(model, image))
    content = onnx.load(out)
    assert not {node.domain for node in content.graph.node} - {''}
    kept = ' '.join(tensor.name for tensor in content.graph.initializer)
    assert 'rpn' not in kept
    notes = {prop.key: prop.value for prop in content.metadata_props}
    assert notes['config'] == 'tiny.py'
    settings = json.loads(notes['preprocessing'])
    if kind == 'mmdet':
        assert settings['pad_size_divisor'] == 32
    if kind == 'mmseg':
        assert settings['mean'] == [1.0, 2.0, 3.0]


@pytest.mark.usefixtures('tools')
def test_the_order_of_channels_of_a_classifier_is_noted():
    name = 'resnet18-w32_bcn-ws-all_1xb16-10e_cifar10subset.py'
    cfg = Config.fromfile(ROOT / 'configs/demo' / name)
    notes = json.loads(load('export').notes_of(cfg, name)['preprocessing'])
    assert notes['to_rgb'] is cfg.model.data_preprocessor.to_rgb is True


WITHOUT_WS_MM = """
import sys, torch
for name in ('ws_mm', 'mmdet', 'mmseg', 'mmcv', 'mmengine'):
    sys.modules[name] = None
files = {'notes.json': ''}
program = torch.export.load(sys.argv[1], extra_files=files)
assert 'tiny.py' in files['notes.json']
assert not [name for name in program.state_dict if 'auxiliary' in name]
network = program.module()
images = torch.load(sys.argv[2])
torch.save([list(network(image)) for image in images], sys.argv[3])
"""


def test_program_needs_torch_only(script, tmp_path):
    config, weights, model = write(tmp_path, SEG + SHALLOW + ALIGNED)
    out = tmp_path / 'new.pt2'
    script('export', config, weights, out)
    sizes = [(1, 3, 65, 130), (3, 3, 70, 99)]
    images = [torch.randn(size) for size in sizes]
    torch.save(images, tmp_path / 'images.pt')
    command = [sys.executable, '-c', WITHOUT_WS_MM, out]
    command += [tmp_path / 'images.pt', tmp_path / 'outputs.pt']
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    subprocess.run([*map(str, command)], check=True, env=env, cwd=tmp_path)
    found = torch.load(tmp_path / 'outputs.pt')
    for image, actual in zip(images, found, strict=True):
        assert_same(actual, outputs_of(model, image))


class Shared(nn.Module):
    """One norm for two convolutions: no convolution can take its place."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            dict(
                one=ws_mm.WSConv2d(3, 8, 3, bias=False),
                two=ws_mm.WSConv2d(8, 8, 3, bias=False, eps_mode='inside'),
                norm=ws_mm.BCN(8, 8),
            )
        )
        self.backbone.forward = self.features

    def features(self, x):
        layers = self.backbone
        x = layers['norm'](layers['one'](x))
        return (x, layers['norm'](layers['two'](x)))


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize('ending', ['onnx', 'pt2'])
def test_what_does_not_fold_is_written_as_plain_operations(ending, tmp_path):
    export, formats = load('export'), load('formats')
    network = export.Features(randomize(Shared())).eval()
    image = torch.randn(2, 3, 96, 128)
    new, told = export.plain(network, image)
    assert 'shared by backbone.one and backbone.two' in told
    assert not any(isinstance(m, ws_mm.WSConv2d) for m in new.modules())
    path = str(tmp_path / f'new.{ending}')
    if ending == 'onnx':
        formats.write_onnx(new, image, ['one', 'two'], {}, path)
    else:
        formats.write_program(new, image, {}, path)
    sizes = [(1, 65, 130), (3, 70, 99)]
    found = dict(export.differences(network, path, sizes))
    assert list(found) == sizes
    assert max(found.values()) < 1e-5


FAMILIES = {
    # Convolutions and sums that fit at multiples only; no key says so.
    'RTMDET': ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 32),
    'UNET': (
        'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py',
        16,
    ),
    # Pooling to 2, 3 and 6 pixels a side.
    'PSPNET': (
        'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        1,
    ),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_families_at_sizes_that_they_take(family, script, tmp_path, capsys):
    name, divisor = FAMILIES[family]
    changes = getattr(shipped, family)
    config, weights, model = write_shipped(tmp_path, name, changes)
    out = tmp_path / 'new.onnx'
    script('export', config, weights, out)
    told = capsys.readouterr().out
    free = 'are free' if divisor == 1 else f'must be multiples of {divisor}'
    assert f'Height and width {free}.' in told
    notes = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert notes['divisor'] == str(divisor)
    session = onnxruntime.InferenceSession(str(out))
    for batch, high, wide in ((1, 7, 8), (2, 5, 10)):
        # 32 is the divisor of the coarsest map of all of them.
        step = 32 if divisor > 1 else 17
        image = torch.randn(batch, 3, step * high, step * wide)
        actual = session.run(None, {'image': image.numpy()})
        for one, two in zip(actual, outputs_of(model, image), strict=True):
            error = (torch.as_tensor(one) - two).abs().max()
            assert error < 1e-4 * two.abs().max()


def test_constants_are_said_and_a_size_mends_them(
    refuses,
    script,
    tmp_path,
):
    name = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    config, weights, model = write_shipped(tmp_path, name, shipped.SEGFORMER)
    out = tmp_path / 'out/new.onnx'
    match = 'became constants: .* right at 2 x 96 x 128 .*OUT.pt2.*--size'
    refuses(match, 'export', config, weights, out)
    assert not list(out.parent.iterdir())
    script('export', config, weights, out, '--size', 64, 96)
    image = torch.randn(4, 3, 64, 96)
    session = onnxruntime.InferenceSession(str(out))
    assert session.get_inputs()[0].shape[1:] == [3, 64, 96]
    actual = session.run(None, {'image': image.numpy()})
    assert_same(actual, outputs_of(model, image))


def test_a_model_that_draws_numbers_is_said(refuses, tmp_path):
    name = 'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'
    config, weights, _ = write_shipped(tmp_path, name, shipped.SEGNEXT)
    out = tmp_path / 'out/new.onnx'
    refuses('draws random numbers', 'export', config, weights, out)
    assert not list(out.parent.iterdir())


class NoForm(nn.Module):
    """An operation that the exporter has no form of."""

    def forward(self, image):
        return (torch.special.i0(image),)


@pytest.mark.usefixtures('tools')
def test_an_operation_without_a_form_is_named(tmp_path, capsys):
    formats = load('formats')
    image = torch.randn(1, 3, 8, 8)
    with pytest.raises(formats.SetupError, match='no form.*i0.*OUT.pt2'):
        formats.write_onnx(
            NoForm(), image, ['a'], {}, str(tmp_path / 'a.onnx')
        )
    assert capsys.readouterr().out == ''


@pytest.mark.usefixtures('tools')
@pytest.mark.parametrize('size', [1, 3, (2, 6), (None, 4), (5, None), (9, 9)])
def test_pooling_is_that_of_torch(size):
    x = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    expected = nn.functional.adaptive_avg_pool2d(x, size)
    actual = load('formats')._pool(x, size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures('tools')
def test_a_model_that_takes_no_size_is_said():
    export = load('export')
    with pytest.raises(export.SetupError, match='multiplied.*--size'):
        export.fitting_sizes(nn.Linear(5, 1))


def test_a_difference_is_refused(refuses, tmp_path, monkeypatch):
    def wrong(model, *args, **kwargs):
        baked = ws_mm.baking.bake(model, *args, **kwargs)
        one = dict(baked.named_parameters())
        name = next(n for n in one if n.endswith('layer2.0.conv1.weight'))
        one[name].data = one[name].data.flip(0)
        return baked

    monkeypatch.setattr(ws_mm, 'bake', wrong)
    config, weights, _ = write(tmp_path, SEG + SHALLOW)
    out = tmp_path / 'out'
    match = 'computes something else .*nothing was written'
    refuses(match, 'export', config, weights, out / 'new.onnx')
    assert not list(out.iterdir())


def test_bad_arguments(refuses, tmp_path):
    config, weights, _ = write(tmp_path, SEG)
    out = tmp_path / 'out'
    refuses('must end with .onnx', 'export', config, weights, out / 'a.pth')
    content = torch.load(weights)
    content['state_dict'].pop('backbone.layer1.0.conv1.weight')
    torch.save(content, weights)
    match = 'not of this config.*layer1'
    refuses(match, 'export', config, weights, out / 'a.onnx')
    config.write_text("default_scope = 'mmengine'\nmodel = dict(type='X')")
    match = 'cannot be built.*X'
    refuses(match, 'export', config, weights, out / 'a.onnx')
    assert not list(out.iterdir())
    refuses('segmentors .mmseg. only', 'test_onnx', *data(tmp_path, DET))
    slide = "model['test_cfg'] = dict(mode='slide')\n"
    match = 'model.test_cfg.mode=whole'
    refuses(match, 'test_onnx', *data(tmp_path, SEG, slide))
    refuses('No file', 'test_onnx', *data(tmp_path, SEG))
    (tmp_path / 'a.onnx').write_text('no ONNX')
    refuses('onnxruntime cannot read', 'test_onnx', *data(tmp_path, SEG))


def data(folder, text, extra=''):
    """Arguments of test_onnx."""
    if not (folder / 'data').exists():
        write_data(folder / 'data')
    options = ('--work-dir', folder / 'work')
    config = write_config(folder / 'data', text, extra + SETTINGS)
    return config, folder / 'a.onnx', *options


SETTINGS = "test_cfg = dict(type='TestLoop')\n"


def scores(work_dir):
    found = sorted(work_dir.glob('*/*.json'))
    return json.loads(found[-1].read_text())


def test_program_wants_a_torch_that_keeps_sizes_free(monkeypatch):
    """As torch 2.1, whose torch.export has no Dim."""
    export = load('export')
    monkeypatch.delattr(torch.export, 'Dim', raising=False)
    with pytest.raises(export.SetupError, match='torch 2.2 or newer'):
        export.check_out('model.pt2')


def test_the_metrics_of_the_host_come_out(script, tmp_path, monkeypatch):
    _, weights, model = write(tmp_path, GN + SHALLOW + ALIGNED)
    # Scores are taken at the size of the file, not that of the input.
    resize = "dataset['pipeline'].insert(1, RESIZE)\n"
    resize = resize.replace('RESIZE', "dict(type='Resize', scale=(41, 33))")
    config, out, *options = data(tmp_path, GN, SHALLOW + ALIGNED + resize)
    # Both classes in the picture, so that borders between them count.
    image = cv2.imread(str(tmp_path / 'data/images/0.png'))
    image = torch.from_numpy(image).permute(2, 0, 1)[None] / 5
    logits = outputs_of(model, image)[0]
    gap = (logits[:, 1] - logits[:, 0]).median()
    model.decode_head.conv_seg.bias.data[1] -= gap
    torch.save(dict(state_dict=model.state_dict()), weights)
    script('export', config, weights, out)
    with monkeypatch.context() as context:
        for name in [n for n in sys.modules if n.startswith('ws_mm')]:
            context.setitem(sys.modules, name, None)
        script('test_onnx', config, out, *options)
    actual = scores(tmp_path / 'work')
    options[1] = tmp_path / 'expected'
    script('test', config, weights, *options)
    expected = scores(tmp_path / 'expected')
    for name in ('aAcc', 'mIoU', 'mAcc'):
        assert actual[name] == expected[name]
    assert 5 < expected['mIoU'] < 95


@pytest.mark.usefixtures('tools')
def test_other_outputs_are_refused(refuses, tmp_path):
    image = torch.randn(1, 3, 8, 8)
    path = str(tmp_path / 'a.onnx')
    load('formats').write_onnx(
        nn.Conv2d(3, 1, 1), image, ['feature'], {}, path
    )
    match = 'outputs feature; .* has one, logits'
    refuses(match, 'test_onnx', *data(tmp_path, SEG))
