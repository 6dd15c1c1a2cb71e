"""Data preparation on small trees of the official layout."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT

scipy_io = pytest.importorskip('scipy.io')

CONVERTERS = ROOT / 'tools' / 'dataset_converters'


def prepare(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a preparation script; output and errors as one text."""
    return subprocess.run(
        [sys.executable, str(CONVERTERS / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, Path]:
    """A devkit with one photo in train, one in val, and two more in SBD."""
    devkit = tmp_path / 'VOCdevkit'
    root = devkit / 'VOC2012'
    sets = root / 'ImageSets' / 'Segmentation'
    sbd = devkit / 'VOCaug' / 'dataset'
    for folder in (root / 'JPEGImages', root / 'SegmentationClass', sets):
        folder.mkdir(parents=True)
    (sbd / 'cls').mkdir(parents=True)
    for index, name in enumerate(('train1', 'val1', 'more1', 'more2')):
        labels = np.full((5, 7), index + 1, np.uint8)
        labels[0] = 255
        photo = Image.fromarray(np.zeros((5, 7, 3), np.uint8))
        photo.save(root / 'JPEGImages' / f'{name}.jpg')
        if index < 2:
            # Indices are the labels; the colours are for people.
            image = Image.fromarray(labels)
            image.putpalette([9, 0, 200] + 255 * [40, 250, 5])
            image.save(root / 'SegmentationClass' / f'{name}.png')
        # SBD labels VOC's photos, too, differently: 20 there.
        sbd_labels = labels if index > 1 else np.full_like(labels, 20)
        truth = dict(
            Boundaries=np.zeros((1, 1)),
            Segmentation=sbd_labels,
            CategoriesPresent=np.array([index + 1]),
        )
        scipy_io.savemat(sbd / 'cls' / f'{name}.mat', {'GTcls': truth})
    (sets / 'train.txt').write_text('train1\n')
    (sets / 'val.txt').write_text('val1\n')
    (sbd / 'train.txt').write_text('train1\nmore2\n')
    (sbd / 'val.txt').write_text('val1\nmore1\n')
    return devkit, devkit / 'VOCaug'


def test_voc_takes_each_label_from_where_it_belongs(
    voc: tuple[Path, Path],
) -> None:
    done = prepare('voc12_aug.py', *voc, '--nproc', 2)
    assert done.returncode == 0, done.stdout
    root = voc[0] / 'VOC2012'
    sets = root / 'ImageSets' / 'Segmentation'
    assert (sets / 'aug.txt').read_text() == 'more1\nmore2\n'
    assert (sets / 'trainaug.txt').read_text() == 'more1\nmore2\ntrain1\n'
    written = root / 'SegmentationClassAug'
    for name, value in (('train1', 1), ('more1', 3), ('more2', 4)):
        labels = np.array(Image.open(written / f'{name}.png'))
        assert labels.shape == (5, 7)
        assert set(labels[0]) == {255}
        assert set(labels[1:].ravel()) == {value}
    # An image of val must not be trained on.
    assert {path.name for path in written.iterdir()} == {
        'train1.png',
        'more1.png',
        'more2.png',
    }
    assert 'note: the official list has 10582' in done.stdout


def test_voc_continues_an_interrupted_conversion(
    voc: tuple[Path, Path],
) -> None:
    assert prepare('voc12_aug.py', *voc, '--nproc', 1).returncode == 0
    written = voc[0] / 'VOC2012' / 'SegmentationClassAug'
    kept, cut = written / 'more1.png', written / 'more2.png'
    other = written / 'train1.png'
    whole, right = cut.read_bytes(), other.read_bytes()
    os.utime(kept, (1, 1))
    # The header stays, so that only decoding shows what is missing.
    cut.write_bytes(whole[:-30])
    Image.new('L', (6, 5)).save(other)
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 0, done.stdout
    assert kept.stat().st_mtime == 1
    assert cut.read_bytes() == whole
    assert other.read_bytes() == right


def test_voc_files_get_their_names_when_they_are_whole(
    voc: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataset_converters import voc12_aug

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    root, sbd = voc[0] / 'VOC2012', voc[1]
    (root / 'SegmentationClassAug').mkdir()
    monkeypatch.setattr('os.replace', killed)
    with pytest.raises(KeyboardInterrupt):
        voc12_aug.convert('more1', root, sbd, frozenset())
    assert not (root / 'SegmentationClassAug' / 'more1.png').exists()
    with pytest.raises(KeyboardInterrupt):
        voc12_aug.write_text(root / 'list.txt', 'more1')
    assert not (root / 'list.txt').exists()


def hears_interrupts(name: str, **_: object) -> str | None:
    """Stands in for a conversion; names a worker that Ctrl-C would end."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return None if ignored else name


def test_voc_interrupt_is_the_business_of_the_parent(
    voc: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from dataset_converters import voc12_aug

    monkeypatch.setattr(voc12_aug, 'convert', hears_interrupts)
    assert voc12_aug.prepare(voc[0] / 'VOC2012', voc[1], 1) == []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(voc12_aug, 'prepare', interrupted)
    monkeypatch.setattr('sys.argv', ['voc12_aug.py'])
    assert voc12_aug.main() == 130
    assert 'start it again to continue' in capsys.readouterr().out


def test_voc_names_what_is_missing(
    voc: tuple[Path, Path], tmp_path: Path
) -> None:
    nothing = tmp_path / 'nothing'
    done = prepare('voc12_aug.py', nothing, nothing / 'VOCaug')
    assert done.returncode == 1
    assert f'missing {nothing}/VOC2012/JPEGImages: from http' in done.stdout
    assert f'missing {nothing}/VOCaug/dataset/cls: from http' in done.stdout
    assert not nothing.exists()

    devkit, sbd = voc
    photos = devkit / 'VOC2012' / 'JPEGImages'
    (photos / 'val1.jpg').unlink()
    (photos / 'more1.jpg').unlink()
    (sbd / 'dataset' / 'cls' / 'more2.mat').write_bytes(b'broken')
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(f'missing {photos}/val1.jpg: ' in line for line in lines)
    assert any(f'missing {photos}/more1.jpg: ' in line for line in lines)
    assert any('more2.mat (' in line for line in lines)
    # Lists would promise labels that are not there.
    sets = devkit / 'VOC2012' / 'ImageSets' / 'Segmentation'
    assert not (sets / 'aug.txt').exists()

    (photos / 'more1.jpg').touch()
    (sbd / 'dataset' / 'cls' / 'more1.mat').unlink()
    (devkit / 'VOC2012' / 'SegmentationClass' / 'train1.png').unlink()
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    lines = ''.join(done.stdout.splitlines())
    assert (
        f'missing {sbd}/dataset/cls/more1.mat: from http://www.eecs' in lines
    )
    assert 'SegmentationClass/train1.png: from http://host.robots' in lines


def test_voc_names_some_and_counts_all_that_is_missing(
    voc: tuple[Path, Path],
) -> None:
    names = [f'z{i}' for i in range(12)]
    (voc[1] / 'dataset' / 'val.txt').write_text('\n'.join(names))
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    assert done.stdout.count('missing ') == 10
    assert '... 12 problems in all' in done.stdout


def test_voc_labels_of_another_size_are_refused(
    voc: tuple[Path, Path],
) -> None:
    photo = voc[0] / 'VOC2012' / 'JPEGImages' / 'more1.jpg'
    Image.new('RGB', (6, 5)).save(photo)
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    assert f'more1.mat is 7x5, but {photo} is 6x5' in done.stdout


@pytest.mark.parametrize(
    ('mode', 'match'),
    [
        ('RGB', 'train1.png is of mode RGB: labels are one channel of class'),
        ('I;16', 'train1.png is of mode I;16: labels are one channel'),
        ('L', 'train1.png holds the label 200: those of VOC are 0 to 20, and'),
    ],
)
def test_voc_labels_of_another_kind_are_refused(
    voc: tuple[Path, Path], mode: str, match: str
) -> None:
    path = voc[0] / 'VOC2012' / 'SegmentationClass' / 'train1.png'
    shape = (5, 7, 3) if mode == 'RGB' else (5, 7)
    dtype = np.uint16 if mode == 'I;16' else np.uint8
    Image.fromarray(np.full(shape, 200, dtype)).save(path)
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    assert match in done.stdout.replace('\n', ' ')
    written = voc[0] / 'VOC2012' / 'SegmentationClassAug'
    assert not (written / 'train1.png').exists()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A tree of the layout of COCO 2017, with two images a split."""
    root = tmp_path / 'coco'
    (root / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        images = []
        for index in range(2):
            name = f'{index:012}.jpg'
            Image.new('RGB', (8, 6)).save(root / split / name)
            images.append(dict(id=index, file_name=name, width=8, height=6))
        content = dict(images=images, annotations=[], categories=[])
        path = root / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(content))
    return root


def test_coco_complete_tree(coco: Path) -> None:
    done = prepare('coco.py', coco, '--decode', '--nproc', 1)
    assert done.returncode == 0, done.stdout
    assert 'val2017: 2 images listed, 2 there, 0 objects' in done.stdout
    assert 'note: the official file lists 5000 images' in done.stdout
    assert f'{coco} is complete' in done.stdout


def test_coco_names_what_is_missing(coco: Path) -> None:
    train, val = coco / 'train2017', coco / 'val2017'
    first, second = (f'{index:012}.jpg' for index in range(2))
    (train / first).unlink()
    (train / second).write_bytes(b'')
    (coco / 'annotations' / 'instances_val2017.json').write_text('{"images')
    (coco / 'train2017.zip').touch()
    done = prepare('coco.py', coco, '--decode', '--nproc', 1)
    assert done.returncode == 1
    assert f'missing {train / first}' in done.stdout
    # Once is enough.
    assert 'does not decode' not in done.stdout
    assert f'empty file {train / second}' in done.stdout
    assert f'unzip -q {coco}/train2017.zip -d {coco}' in done.stdout
    assert 'instances_val2017.json is not readable JSON' in done.stdout
    assert 'annotations_trainval2017.zip, unpacked in' in done.stdout
    assert 'complete' not in done.stdout

    for path in (val / first, val / second):
        path.unlink()
    val.rmdir()
    annotations = coco / 'annotations' / 'instances_val2017.json'
    annotations.unlink()
    done = prepare('coco.py', coco, '--splits', 'val2017')
    assert f'missing {val}/: from http' in done.stdout
    assert f'missing {annotations}: from http' in done.stdout
    assert str(train) not in done.stdout


def test_coco_counts_what_it_does_not_list(coco: Path) -> None:
    size = dict(width=8, height=6)
    images = [dict(file_name=f'{i:012}.jpg', id=i, **size) for i in range(14)]
    content = dict(images=images, annotations=[], categories=[])
    path = coco / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(content))
    done = prepare('coco.py', coco, '--splits', 'val2017')
    assert done.returncode == 1
    assert done.stdout.count(f'missing {coco}/val2017/') == 10
    assert f'... 12 images of {coco}/val2017 in all' in done.stdout


def test_coco_finds_damaged_images(coco: Path) -> None:
    broken = coco / 'val2017' / f'{0:012}.jpg'
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(noise).save(broken, quality=95)
    whole = broken.read_bytes()
    # The header stays, so that only decoding shows what is missing.
    broken.write_bytes(whole[:-60])
    Image.new('RGB', (8, 7)).save(coco / 'val2017' / f'{1:012}.jpg')
    assert prepare('coco.py', coco).returncode == 0
    done = prepare('coco.py', coco, '--decode', '--nproc', 1)
    assert done.returncode == 1
    text = done.stdout.replace('\n', '')
    assert f'{broken} does not decode' in text
    assert 'is 8x7, annotated 8x6' in text


def test_coco_file_without_images(coco: Path) -> None:
    path = coco / 'annotations' / 'instances_train2017.json'
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    done = prepare('coco.py', coco)
    assert done.returncode == 1
    assert f'{path} lists no images; get it from http' in done.stdout


@pytest.mark.parametrize('text', ['[]', '{"images": [], "annotations": []}'])
def test_coco_file_of_another_kind(coco: Path, text: str) -> None:
    path = coco / 'annotations' / 'instances_train2017.json'
    path.write_text(text)
    done = prepare('coco.py', coco, '--splits', 'train2017')
    assert done.returncode == 1
    assert (
        f'{path} has no images, annotations, categories: not an instance '
        'file; get it from http'
    ) in done.stdout


IMAGE = dict(id=1, file_name='a.jpg', width=8, height=6)


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (dict(images=[dict(id=1)]), 'one of images has no file_name'),
        (dict(images={'a': IMAGE}), 'images is no list'),
        (dict(annotations=None), 'annotations is no list'),
        (dict(annotations=[{}]), 'one of annotations has no image_id'),
        (
            dict(annotations=[dict(image_id=77, category_id=1)]),
            'annotations of no image (id 77)',
        ),
    ],
)
def test_coco_file_that_is_not_whole(
    coco: Path, change: dict, match: str
) -> None:
    content = dict(images=[IMAGE], annotations=[], categories=[])
    path = coco / 'annotations' / 'instances_val2017.json'
    path.write_text(json.dumps(content | change))
    done = prepare('coco.py', coco, '--splits', 'val2017')
    assert done.returncode == 1
    assert f'{path}: {match}' in done.stdout
    assert 'Traceback' not in done.stdout


def test_processes_are_one_or_more(coco: Path, voc: tuple[Path, Path]) -> None:
    for done in (
        prepare('coco.py', coco, '--decode', '--nproc', 0),
        prepare('voc12_aug.py', *voc, '--nproc', 0),
    ):
        assert done.returncode == 2
        assert '--nproc=0: give 1 or more' in done.stdout


def test_voc_label_beyond_a_byte_is_refused(voc: tuple[Path, Path]) -> None:
    labels = np.full((5, 7), 256, np.uint16)
    path = voc[1] / 'dataset/cls/more1.mat'
    scipy_io.savemat(path, {'GTcls': dict(Segmentation=labels)})
    folder = voc[0] / 'VOC2012' / 'SegmentationClassAug'
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    assert 'holds the label 256' in done.stdout.replace('\n', ' ')
    assert not (folder / 'more1.png').exists()
    shutil.rmtree(folder)
    folder.touch()
    done = prepare('voc12_aug.py', *voc, '--nproc', 1)
    assert done.returncode == 1
    assert f'{folder} is a file' in done.stdout.replace('\n', '')
