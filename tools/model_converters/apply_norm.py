r"""Write a config that gives another config's model these layers.

    python tools/model_converters/apply_norm.py \
        mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py \
        mask-rcnn_r50_fpn_gn-ws.py --conv WSConv2d --norm GN

The new file inherits from the old one and holds what must change, nothing
else. What changed and what was left alone is printed.
"""

import argparse
import difflib
import importlib.util
import keyword
import os
import re
import sys
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import launch
from support.checks import SetupError, check_writable, did_you_mean

ABOUT = 'Written by tools/model_converters/apply_norm.py'
WIDTH = 79


def parse_args() -> argparse.Namespace:
    """Command line of the conversion."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'config',
        help='config file, or one that an installed package ships: '
        'mmdet::FOLDER/NAME.py, mmseg::..., mmpretrain::...',
    )
    parser.add_argument('out', help='config file to write, NAME.py')
    parser.add_argument(
        '--conv',
        default='auto',
        help='convolutions that the parts get: WSConv2d, keep, another '
        'registered class, or auto: those that the norm was published with, '
        'for most WSConv2d (default)',
    )
    parser.add_argument(
        '--norm',
        help='norms that the parts get: BCN, GN, BN, SyncBN, keep, or another '
        'registered class (default: GN; with --remaining BCN)',
    )
    parser.add_argument(
        '--conv-options',
        nargs='+',
        action=launch.KeyValues,
        default={},
        metavar='KEY=VALUE',
        help='arguments of the convolution, such as eps_mode=inside',
    )
    parser.add_argument(
        '--norm-options',
        nargs='+',
        action=launch.KeyValues,
        default={},
        metavar='KEY=VALUE',
        help='arguments of the norm, such as mode=sync_batch num_groups=16',
    )
    parser.add_argument(
        '--parts',
        nargs='+',
        metavar='PART',
        help='only these: backbone, neck, heads, or keys below model such as '
        'roi_head.mask_head (default: all)',
    )
    parser.add_argument(
        '--backbone',
        choices=('auto', 'convert', 'freeze', 'ease'),
        default='auto',
        help='freeze: it keeps its pretrained batch norms, in evaluation '
        'mode; ease: EasedBCN continues them; convert: as the other parts; '
        'auto: freeze if it loads a checkpoint, has batch norms and --parts '
        'is not given (default)',
    )
    parser.add_argument(
        '--images-per-step',
        type=int,
        metavar='N',
        help='images of all processes in one step of the optimizer; scales '
        'the learning rate by the linear rule (default: leave it)',
    )
    parser.add_argument(
        '--base-batch-size',
        type=int,
        metavar='N',
        help='images in one step that the learning rate of CONFIG is for '
        '(default: auto_scale_lr.base_batch_size, or the name of CONFIG, '
        'which must not say another)',
    )
    parser.add_argument(
        '--remaining',
        action='store_true',
        help='also replace, on the built model, batch norms that no norm_cfg '
        'reaches; with BCN or another norm with running statistics',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an existing OUT'
    )
    return parser.parse_args()


def find_config(name: str) -> Path:
    """The file of a config, given by path or as ``package::path``.

    Raises:
        SetupError: there is none.
    """
    if '::' not in name:
        if not os.path.isfile(name):
            meant = did_you_mean(name, '*.py')
            if name.partition(':')[0] in launch.HOSTS:
                meant = f' Did you mean {name.replace(":", "::", 1)}?'
            raise SetupError(f'No config file {name}.{meant}')
        return Path(name)
    package, _, inner = name.partition('::')
    spec = (
        importlib.util.find_spec(package) if package.isidentifier() else None
    )
    if spec is None or not spec.submodule_search_locations:
        from ws_mm.compat import install_command

        raise SetupError(
            f'{name}: the package {package} is not installed. '
            + (
                f'Install it with: {install_command(package)}'
                if package in launch.HOSTS
                else 'Packages that ship configs are mmdet, mmseg and '
                'mmpretrain.'
            )
        )
    root = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
    path = root / inner
    if not path.is_file():
        # Metafiles know configs by name, without the folder.
        file = f'{Path(inner).name.removesuffix(".py")}.py'
        found = sorted(root.rglob(file))
        if '/' not in inner and len(found) == 1:
            return found[0]
        shipped = {p.name: p for p in root.rglob('*.py') if p.parent != root}
        close = difflib.get_close_matches(file, shipped, 3)
        meant = ', '.join(
            f'{package}::{shipped[key].relative_to(root)}' for key in close
        )
        hint = f' Did you mean {meant}?' if meant else f' See {root}.'
        raise SetupError(f'{package} ships no config {inner}.{hint}')
    return path


def read_config(name: str) -> Config:
    """Load a config by path or as ``package::path``.

    Raises:
        SetupError: there is none, or it cannot be loaded.
    """
    path = find_config(name)
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise SetupError(
            f'{name} is no text in UTF-8 ({error}). Save it as UTF-8.'
        ) from error
    if 'read_base(' in text:
        raise SetupError(
            f'{name} is a pure Python config (read_base), from which no text '
            'config can inherit. Give the one with _base_ of the same model, '
            'or use ws_mm.apply_norm on the loaded config.'
        )
    return launch.read_config(path, name)


def base_name(name: str, out: Path) -> str:
    """Return the ``_base_`` of a config in ``out``."""
    path = find_config(name)
    # mmengine takes only word characters around the first slash.
    if re.match(r'\w+::\w+/', name) and path.as_posix().endswith(
        name.partition('::')[2]
    ):
        return name
    if '::' in name:
        return str(path)
    return Path(os.path.relpath(path, out.resolve().parent)).as_posix()


def render(value: Any, indent: int = 0, used: int = 0) -> str:
    """Python source of a value, as the configs here are written.

    Args:
        value: dicts, lists and what ``repr`` writes.
        indent: columns before the line that the value begins on.
        used: further columns taken on that line, on both sides.
    """
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict) and all(
        isinstance(key, str)
        and key.isidentifier()
        and not keyword.iskeyword(key)
        for key in value
    ):
        opening, closing = 'dict(', ')'
        items = [(f'{key}=', inner) for key, inner in value.items()]
    elif isinstance(value, dict):
        opening, closing = '{', '}'
        items = [(f'{key!r}: ', inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        opening, closing = '[]' if isinstance(value, list) else '()'
        items = [('', inner) for inner in value]
    else:
        return repr(value)
    flat = [prefix + render(inner, 0, -(10**6)) for prefix, inner in items]
    comma = ',' if isinstance(value, tuple) and len(flat) == 1 else ''
    line = opening + ', '.join(flat) + comma + closing
    if indent + used + len(line) <= WIDTH or not items:
        return line
    inner_indent = indent + 4
    rows = [
        ' ' * inner_indent
        + prefix
        + render(inner, inner_indent, len(prefix) + 1)
        + ',\n'
        for prefix, inner in items
    ]
    return opening + '\n' + ''.join(rows) + ' ' * indent + closing


class Raw:
    """Source that stands for a value."""

    def __init__(self, text: str) -> None:
        self.text = text


def child_source(
    base: str, cfg: Config, new: Config, changes: list[Any], asked: str
) -> str:
    """Source of the config that inherits from ``base``.

    Args:
        base: Value of ``_base_``.
        cfg: the config before the changes.
        new: the config with them.
        changes: Result of :func:`ws_mm.apply_norm`.
        asked: the arguments of the command.
    """
    layers: dict[str, dict[str, Any]] = {}
    for change in changes:
        name = change.key[-1]
        if name in ('conv_cfg', 'norm_cfg') and (
            'num_groups' not in change.new
            and isinstance(cfg.get(name, {}), dict)
        ):
            layers[name] = change.new
    content: dict[str, Any] = {}
    for change in changes:
        # Lists are replaced as a whole.
        depth = next(
            (i for i, name in enumerate(change.key) if isinstance(name, int)),
            len(change.key),
        )
        key = change.key[:depth]
        value, before = _at(new._cfg_dict, key), _at(cfg._cfg_dict, key)
        if isinstance(value, dict):
            replaces = _is_there(cfg._cfg_dict, key) and (
                not isinstance(before, dict) or bool(set(before) - set(value))
            )
            extra = {'_delete_': True} if replaces else {}
            if layers.get(key[-1]) == value:
                value = (
                    Raw(f'dict(_delete_=True, **{key[-1]})')
                    if extra
                    else Raw(key[-1])
                )
            else:
                value = {**extra, **value}
        node = content
        for depth, name in enumerate(key[:-1], 1):
            node = node.setdefault(name, {})
            above = key[:depth]
            if _is_there(cfg._cfg_dict, above) and not isinstance(
                _at(cfg._cfg_dict, above), dict
            ):
                node['_delete_'] = True
        node[key[-1]] = value
    about = textwrap.fill(
        f'{ABOUT}: {asked}',
        WIDTH,
        initial_indent='# ',
        subsequent_indent='#     ',
        break_on_hyphens=False,
        break_long_words=False,
    )
    lines = [about, f'_base_ = {_known_to_hosts(base)}']
    for name, value in [*layers.items(), *content.items()]:
        lines.append(f'{name} = {render(value, 0, len(name) + 3)}')
    return '\n'.join(lines) + '\n'


def _known_to_hosts(base: str) -> str:
    """Source of a base that the hosts' own tools find, too.

    Configs of ws_mm, and of a distribution that was renamed, they find only
    once ws_mm is imported.
    """
    renamed = base.startswith('mmseg::') and _is_renamed('mmsegmentation')
    if renamed or base.startswith('ws_mm::'):
        return f"__import__('ws_mm') and {base!r}"
    return repr(base)


def _is_renamed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return True
    return False


def note_for_hosts(config: Path) -> str:
    """Say how the hosts' own tools find the base of a config, if not so."""
    text = config.read_text(encoding='utf-8')
    found = re.search(r"""=\s*\[?\s*(['"]mmseg::\S+?['"])""", text)
    if found is None or not _is_renamed('mmsegmentation'):
        return ''
    return (
        f"MMSegmentation's own tools find the base of {config} only with "
        f"ws_mm: write __import__('ws_mm') and {found[1]} there, or import "
        'ws_mm in your script.'
    )


def _at(content: Any, key: tuple[str, ...]) -> Any:
    for name in key:
        if not isinstance(content, dict) or name not in content:
            return None
        content = content[name]
    return content.to_dict() if hasattr(content, 'to_dict') else content


def _is_there(content: Any, key: tuple[str, ...]) -> bool:
    """Return whether a key is set; no dict merges with a None."""
    above = _at(content, key[:-1])
    return isinstance(above, dict) and key[-1] in above


def write_child(out: Path, source: str, new: Config) -> None:
    """Write a config after seeing that it loads as what it should be.

    Raises:
        SetupError: it does not; nothing was written.
    """
    check_writable(str(out.resolve().parent), 'OUT')
    with tempfile.NamedTemporaryFile(
        'w',
        dir=out.resolve().parent,
        suffix='.py',
        delete=False,
        encoding='utf-8',
    ) as file:
        file.write(source)
    try:
        try:
            loaded = Config.fromfile(file.name)
        # Values without a source raise whatever Python says of their repr.
        except Exception as error:
            raise SetupError(
                'The config written would not load '
                f'({type(error).__name__}: {error}); nothing was written. '
                'Use ws_mm.apply_norm on the loaded config.'
            ) from error
        for key, wanted in new._cfg_dict.to_dict().items():
            found = _at(loaded._cfg_dict, (key,))
            # Variables that other keys of the config were made from.
            if key not in ('conv_cfg', 'norm_cfg') and _bare(found) != _bare(
                wanted
            ):
                raise SetupError(
                    f'The config written would load with another {key} than '
                    'it should; nothing was written. Please report the '
                    'config.'
                )
        os.chmod(file.name, 0o644)
        os.replace(file.name, out)
    finally:
        Path(file.name).unlink(missing_ok=True)


def _bare(value: Any) -> Any:
    """A value without the scopes that ``package::`` adds."""
    if isinstance(value, dict):
        return {
            key: _bare(inner)
            for key, inner in value.items()
            if key != '_scope_'
        }
    if isinstance(value, (list, tuple)):
        return [_bare(item) for item in value]
    return value


def convert(args: argparse.Namespace) -> tuple[Config, Config, list, list]:
    """The config, the converted one, the changes and what was left alone.

    Raises:
        SetupError: bad input.
    """
    import ws_mm
    from ws_mm.config_edits import Change
    from ws_mm.configs import ConfigError

    args.norm = args.norm or ('BCN' if args.remaining else 'GN')
    layers = []
    for name in ('conv', 'norm'):
        asked, options = getattr(args, name), getattr(args, f'{name}_options')
        if options and asked == 'keep':
            raise SetupError(f'--{name}-options: --{name} keep takes none.')
        layers.append({'type': asked, **options} if options else asked)
    cfg = read_config(args.config)
    new = read_config(args.config)
    try:
        changes, left = ws_mm.apply_norm(
            new,
            *layers,
            args.parts,
            images_per_step=args.images_per_step,
            base_batch_size=args.base_batch_size,
            remaining=args.remaining,
            backbone=args.backbone,
        )
    except ConfigError as error:
        raise SetupError(f'{args.config}: {error}') from error
    # mmengine dumps them. The new training would overwrite the old one, or
    # go on with its optimizer.
    for key, value in (('work_dir', None), ('resume', False)):
        if changes and cfg.get(key):
            new[key] = value
            why = 'of the training that dumped the config'
            changes = [*changes, Change((key,), cfg[key], value, why)]
    return cfg, new, changes, left


def main() -> None:
    """Convert one config."""
    args = parse_args()
    out = Path(args.out)
    if out.suffix != '.py':
        raise SetupError(f'OUT {out}: a config file is called NAME.py.')
    if out.is_dir():
        raise SetupError(f'OUT {out} is a folder. Give a name for the file.')
    if out.exists() and not args.overwrite:
        raise SetupError(
            f'{out} exists. Give another name, or replace it with --overwrite.'
        )
    cfg, new, changes, left = convert(args)
    from ws_mm.config_parts import REFUSED  # convert says what is missing

    if out.exists() and os.path.samefile(out, find_config(args.config)):
        raise SetupError(
            f'{out} is the config itself; it would inherit from itself. Give '
            'another name.'
        )
    if changes:  # before a reader of the lines ends this process
        asked = ' '.join(
            argument
            for argument in sys.argv[1:]
            if argument not in (args.out, '--overwrite')
        )
        source = child_source(
            base_name(args.config, out), cfg, new, changes, asked
        )
        write_child(out, source, new)
    for change in changes:
        print(change)
    if left:
        print('\nleft alone:')
    for one in left:
        print(f'  {one}')
    if not changes and any(REFUSED in one.why for one in left):
        raise SetupError(
            'these layers fit no part, for the reasons above; no file was '
            'written. Set --conv, --norm or their options (--norm-options '
            'num_groups=N must divide all channels).'
        )
    if not changes:
        print('\nNothing to change: it is so already. No file was written.')
        return
    print(f'\nwritten: {out}')
    if note := note_for_hosts(find_config(args.config)):
        print(note)


if __name__ == '__main__':
    launch.run(main)
