#!/usr/bin/env python3
"""Make an environment for this checkout and run something in it.

Standard library only. Python 3.6 must be able to import it, so that an old
interpreter reaches the message that says so.
"""

import argparse
import collections
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from support.bare_machine import (
    RECENT,
    Stop,
    cache_dir,
    captured,
    check_compiler,
    check_python,
    compiler,
    locked,
    run_logged,
    say,
)
from support.operators import (
    CFLAGS,
    PROBE,
    VERIFY,
    build_jobs,
    operator_device,
    operator_key,
)

ROOT = Path(__file__).resolve().parent.parent
USAGE = """\
usage: python3 tools/bootstrap.py [--line LINE] [--env DIR] COMMAND [options]

  demo   run tools/demo.py
  tests  run pytest: all tests in the maintained line, else those that a user
         of the layers depends on; files that are named replace the selection
  lint   run ruff, mypy and codespell (maintained line)
  site   build the documentation into site/, in a small environment of its own
  env    only make the environment and say how to enter it

LINE, whose exact versions are in tools/requirements/LINE.txt:
  maintained     onedl-mmdetection and onedl-mmsegmentation, torch 2.10
  official       mmdet 3.3.0 and mmsegmentation 1.2.2, torch 2.1, Python 3.10
  layers-oldest  mmengine alone, torch 2.1, Python 3.10
  layers-newest  mmengine alone, the newest torch

The environment is .venv in the checkout (.venv-LINE of the other lines), or
--env DIR, or $WS_MM_ENV; it is made once and then reused. Safe to interrupt
and to run again."""
COMMANDS = ('demo', 'tests', 'lint', 'env', 'site')
# The Pythons of a line, in the order they are recommended; the distribution
# of mmcv; and its tests, all if none are named.
Line = collections.namedtuple('Line', 'pythons mmcv tests')
LAYERS = (
    *('compat', 'functional', 'conv', 'norm', 'kernels', 'checkpoint'),
    *('registry', 'distributed', 'estimates', 'transposed', 'tracing'),
    *('third_party_norm', 'accuracy'),
)
LINES = {
    'maintained': Line(RECENT, 'onedl-mmcv', ()),
    'official': Line(
        ((3, 10),),
        'mmcv',
        (*LAYERS, 'configs', 'apply_norm', 'host_tools', 'packaging'),
    ),
    'layers-oldest': Line(((3, 10),), '', (*LAYERS, 'host_layer', 'dtypes')),
    'layers-newest': Line(RECENT, '', (*LAYERS, 'host_layer', 'dtypes')),
    'site': Line(RECENT, '', ()),  # of the command `site` alone
}
SITE = 'tools/site/mkdocs.yml'
MARKER = '.ws_mm_bootstrap'  # in every environment that was made here
STATE = '.ws_mm_state.json'  # which steps are done, and of which input


def parse(argv: Sequence[str]) -> Tuple[str, str, str, List[str]]:
    """Split the command line into line, environment, command and options."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument('--env', default=os.environ.get('WS_MM_ENV') or '')
    options.add_argument('--line', default='maintained')
    known, rest = options.parse_known_args(list(argv))
    lines = [line for line in LINES if line != 'site']
    if known.line not in lines:
        legal = ', '.join(lines)
        raise Stop(f'--line is {known.line}: it must be one of {legal}')
    command = rest[0] if rest else 'missing'
    if command in ('-h', '--help'):
        print(USAGE)
        raise SystemExit(0)
    if command not in COMMANDS:
        legal = ', '.join(COMMANDS)
        raise Stop(f'COMMAND is {command}: it must be one of {legal}')
    if known.line != 'maintained' and command in ('demo', 'lint', 'site'):
        raise Stop(f'{command} takes no --line: leave it out')
    if command == 'site':
        known.line = 'site'
    name = '.venv' if known.line == 'maintained' else f'.venv-{known.line}'
    return known.line, known.env or str(ROOT / name), command, rest[1:]


def read_pins(text: str) -> Dict[str, str]:
    """Return name -> version of a requirements file of exact pins."""
    pins = {}
    for line in text.splitlines():
        line = line.split('#')[0].strip()
        match = re.match(r'([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)$', line)
        if match:
            pins[match.group(1)] = match.group(2)
        elif line:
            raise Stop(
                f'tools/requirements has {line!r}, which is no exact pin: '
                'write it as name==version'
            )
    return pins


def digest(*texts: str) -> str:
    """Return a short digest of some texts."""
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:16]


def python_tag() -> str:
    """Return the running Python's wheel tag, such as cp311."""
    name = {'cpython': 'cp', 'pypy': 'pp'}.get(sys.implementation.name, 'py')
    return '%s%d%d' % (name, *sys.version_info[:2])


def check_owner(env: Path, tag: str, line: str = 'maintained') -> str:
    """Check that an environment is absent, empty or made here for a line."""
    if not env.exists() or (env.is_dir() and not any(env.iterdir())):
        return ''
    if not (env / MARKER).is_file():
        return (
            f'{env} was not made by tools/bootstrap.py, which leaves it as it '
            'is: name another folder with --env DIR or $WS_MM_ENV (or use an '
            'OpenMMLab environment of yours directly: pip install -e .)'
        )
    state = read_state(env)
    made = (state.get('line', line), state.get('environment', tag))
    if made != (line, tag):
        return (
            f'{env} was made for --line {made[0]} with {made[1]}, and this is '
            f'--line {line} with {tag}: name another folder with --env DIR or '
            '$WS_MM_ENV, or delete that one'
        )
    return ''


# The steps.


def read_state(env: Path) -> Dict[str, str]:
    """Return what the environment's set-up noted."""
    try:
        return dict(json.loads((env / STATE).read_text()))
    except (OSError, ValueError):
        return {}


class SetUp:
    """One environment, the steps to it, and what each depends on."""

    def __init__(
        self, env: Path, cache: Path, line: str = 'maintained'
    ) -> None:
        self.line, self.mmcv = line, LINES[line].mmcv
        self.requirements = ROOT / f'tools/requirements/{line}.txt'
        requirements = self.requirements.read_text()
        project = (ROOT / 'pyproject.toml').read_text()
        # A GPU or an nvcc that comes later calls for other operators.
        gpu = [str(shutil.which(name)) for name in ('nvidia-smi', 'nvcc')]
        self.env, self.cache = env, cache
        self.pins = read_pins(requirements)
        self.python = str(env / 'bin/python')
        self.pip = [self.python, '-m', 'pip']
        self.steps = {
            'environment': python_tag(),
            'packages': digest(requirements),
            'operators': digest(requirements, *gpu),
            'ws_mm': digest(project, str(ROOT)),
        }
        if not self.mmcv:
            del self.steps['operators']
        if line == 'site':  # it reads the package and does not import it
            del self.steps['ws_mm']

    def todo(self) -> List[str]:
        """Return the steps that are not done, in order."""
        state = read_state(self.env)
        return [
            k for k, wanted in self.steps.items() if state.get(k) != wanted
        ]

    def note(self, **values: str) -> None:
        """Note what is done (empty: no longer), whole or not at all."""
        state = dict(read_state(self.env), **values)
        new = self.env / (STATE + '.new')
        new.write_text(json.dumps({k: v for k, v in state.items() if v}))
        os.replace(str(new), str(self.env / STATE))

    def wheels(self, key: str) -> List[str]:
        """Return the kept wheels under a key, which may hold wildcards."""
        folder = glob.escape(str(self.cache / 'wheels'))
        return sorted(glob.glob(f'{folder}/{key}/*.whl'))

    def must_build(self) -> bool:
        """Return whether operators are needed and surely not kept."""
        if 'operators' not in self.todo():
            return False
        torch = self.pins['torch'] + '*'
        key = operator_key(self.pins, torch, python_tag(), '*')
        return not self.wheels(key)

    def environ(self) -> Dict[str, str]:
        """Return the variables under which the environment's Python runs."""
        environ = dict(os.environ)
        # Each of these would mix another environment into this one.
        for name in ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX'):
            environ.pop(name, None)
        environ.update(
            VIRTUAL_ENV=str(self.env),
            PATH=f'{self.env}/bin:{os.environ.get("PATH", os.defpath)}',
            PYTHONNOUSERSITE='1',
            PIP_USER='0',
            PIP_NO_INPUT='1',
            NO_MKDOCS_2_WARNING='1',
            PIP_DISABLE_PIP_VERSION_CHECK='1',
        )
        return environ

    def problem(self) -> str:
        """Return what would stop the set-up later, or an empty string."""
        if not sys.platform.startswith('linux'):
            return f'this system is {sys.platform}: use linux (or its WSL)'
        owned = check_owner(self.env, python_tag(), self.line)
        return owned or (check_compiler() if self.must_build() else '')

    def run(self) -> None:
        """Do every step that is not done."""
        problem = self.problem()
        if problem:
            raise Stop(problem)
        if not self.todo():
            return
        self.env.mkdir(parents=True, exist_ok=True)
        with locked(self.env / MARKER):
            if 'environment' in self.todo():
                self.logged('venv', [sys.executable, '-m', 'venv', self.env])
                self.note(
                    environment=self.steps['environment'], line=self.line
                )
            for step in self.todo():
                self.note(**{step: ''})
                getattr(self, 'install_' + step)()
                self.note(**{step: self.steps[step]})

    def logged(self, title: str, command: Sequence[Any]) -> None:
        """Run one command of a step."""
        words = [str(word) for word in command]
        log = self.cache / 'logs' / (title + '.log')
        run_logged(title, words, log, self.environ())

    def install_packages(self) -> None:
        """Install all pins but mmcv, which is built against them."""
        pip = [*self.pip, 'install']
        self.logged('pip', [*pip, 'pip==' + self.pins['pip']])
        chosen = [f'{k}=={v}' for k, v in self.pins.items() if k != self.mmcv]
        # Packages that come as source are built with the pinned tools, too.
        pip += ['--build-constraint', str(self.requirements)]
        self.logged('packages', [*pip, '--progress-bar', 'off', *chosen])

    def install_operators(self) -> None:
        """Install mmcv with operators that have been seen to run."""
        text = captured([self.python, '-c', PROBE], self.environ())
        probe = json.loads(text)
        nvcc = Path(probe['cuda_home'] or '', 'bin/nvcc')
        version = ''
        if nvcc.is_file():
            version = captured([str(nvcc), '--version'], self.environ())
        device, cpu_only = operator_device(probe, version)
        key = operator_key(self.pins, probe['torch'], python_tag(), device)
        install = 'install --no-deps --no-index --force-reinstall'
        devices = ['cpu'] if device == 'cpu' else ['cpu', 'cuda']
        for kept in [*self.wheels(key), '']:
            wheel = kept or self.build_wheel(key)
            self.logged('mmcv', [*self.pip, *install.split(), wheel])
            try:
                self.logged('check', [self.python, '-c', VERIFY, *devices])
                break
            except Stop:
                os.remove(wheel)  # what does not run is not kept
                if not kept:
                    raise
                say(f'{kept} does not run here: building it again')
        self.note(cpu_only=cpu_only)

    def build_wheel(self, key: str) -> str:
        """Build mmcv, keep the wheel under a key and return its path."""
        problem = check_compiler()
        if problem:
            raise Stop(problem)
        work = self.env / 'building'
        shutil.rmtree(str(work), ignore_errors=True)  # of a killed build
        (work / 'tmp').mkdir(parents=True)
        environ = self.environ()
        environ.setdefault('MAX_JOBS', str(build_jobs()))
        environ.pop('TORCH_CUDA_ARCH_LIST', None)  # the key names them
        environ.update(
            CFLAGS=CFLAGS, CXX=' '.join(compiler()), TMPDIR=str(work / 'tmp')
        )
        environ['MMCV_WITH_OPS'] = '1'  # the official one asks for it
        if '-cuda' in key:
            environ['FORCE_CUDA'] = '1'
        else:  # mmcv builds for every GPU that it sees
            environ.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
        # Pip's cache could hold a wheel that was built against another torch.
        options = 'wheel -v --no-cache-dir --no-deps --no-build-isolation'
        options += ' --no-binary'
        pin = f'{self.mmcv}=={self.pins[self.mmcv]}'
        try:
            run_logged(
                "mmcv's operators",
                [*self.pip, *options.split(), self.mmcv, '-w', work, pin],
                self.cache / 'logs/operators.log',
                environ,
            )
            (built,) = work.glob('*.whl')
            keep = self.cache / 'wheels' / key / built.name
            keep.parent.mkdir(parents=True, exist_ok=True)
            os.replace(str(built), str(keep))
        finally:
            shutil.rmtree(str(work), ignore_errors=True)
        return str(keep)

    def install_ws_mm(self) -> None:
        """Install this checkout, editable."""
        options = 'install --no-deps'
        if int(self.pins['setuptools'].split('.')[0]) >= 77:
            options += ' --no-index --no-build-isolation'
        options += ' -e'
        self.logged('ws_mm', [*self.pip, *options.split(), ROOT])

    def commands(self, command: str, args: Sequence[str]) -> List[List[str]]:
        """Return what a command runs, in order."""
        chosen = [f'tests/test_{name}.py' for name in LINES[self.line].tests]
        if any(word.startswith('tests') for word in args):
            chosen = []
        # Half of the time, where tests wait for processes of their own.
        spread = ['-n', '2', '--dist', 'loadfile']
        if 'pytest-xdist' not in self.pins:
            spread = []
        lint = ['ruff check .', 'ruff format --check .', 'mypy ws_mm']
        modules = {
            'tests': [['pytest', *spread, *chosen, *args]],
            'lint': [line.split() for line in [*lint, 'codespell_lib']],
            'site': [[*'mkdocs build --strict -f'.split(), SITE, *args]],
        }.get(command, [])
        if command == 'demo':
            return [[self.python, str(ROOT / 'tools/demo.py'), *args]]
        return [[self.python, '-m', *words] for words in modules]


def interrupt(*unused: object) -> None:
    """Treat a request to end as Ctrl-C, so that nothing is left behind."""
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        line, folder, command, args = parse(argv)
        words = ' '.join(shlex.quote(word) for word in [sys.argv[0], *argv])
        pythons = LINES[line].pythons
        problem = check_python(sys.version_info, words, pythons)
        if problem:
            raise Stop(problem)
        env = Path(folder).expanduser().absolute()
        setup = SetUp(env, cache_dir(), line)
        setup.run()
        environ = setup.environ()
        cpu_only = read_state(env).get('cpu_only')
        if cpu_only:
            say(cpu_only)
            environ['CUDA_VISIBLE_DEVICES'] = ''
        if command == 'env':
            print(f'source {shlex.quote(str(env / "bin/activate"))}')
            return 0
        # Only the demo takes paths that are the caller's.
        if command != 'demo':
            os.chdir(str(ROOT))
        *first, last = setup.commands(command, args)
        codes = [subprocess.call(each, env=environ) for each in first]
        if any(codes):
            codes.append(subprocess.call(last, env=environ))
            return next(code for code in codes if code)
        # In place of this process: signals and exit code are the command's.
        os.execve(last[0], last, environ)
    except (Stop, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say('interrupted; the same command goes on where this one stopped')
        return 130


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
