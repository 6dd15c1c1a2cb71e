#!/usr/bin/env python3
"""Make an environment for this checkout and run something in it.

Standard library only, and nothing at import needs more than Python 3.6: an
interpreter that is too old must get as far as the line that says so.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
USAGE = """\
usage: python3 tools/bootstrap.py [--env DIR] COMMAND [options of COMMAND]

  demo   run tools/demo.py
  tests  run pytest
  lint   run ruff, mypy and codespell
  env    only make the environment and say how to enter it

The environment is .venv in the checkout, or --env DIR, or $WS_MM_ENV; it is
made once and then reused. Safe to interrupt and to run again."""
COMMANDS = ('demo', 'tests', 'lint', 'env')
PYTHONS = ((3, 11), (3, 12), (3, 10))  # in the order they are recommended
DISK_GB = 10
MMCV = 'onedl-mmcv'
MARKER = '.ws_mm_bootstrap'  # in every environment that was made here
STATE = '.ws_mm_state.json'  # which steps are done, and of which input

# Setting CFLAGS replaces Python's own flags, so -g0 alone would also drop
# the optimisation: no faster to build, and RoIAlign takes 3.4 times as long.
# With debug symbols the build takes about twice as long.
CFLAGS = '-O3 -g0 -DNDEBUG -fwrapv'

PROBE = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
archs = {'sm_%d%d' % torch.cuda.get_device_capability(i) for i in gpus}
print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda,
                  'archs': sorted(archs), 'cuda_home': CUDA_HOME}))
"""
# Importing is not enough: operators built against another torch may load
# and then fail, or crash, at the first call.
VERIFY = """
import sys, torch, mmdet, mmseg
from mmcv.ops import nms, roi_align
for device in sys.argv[1:]:
    corners = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]
    boxes = torch.tensor(corners, dtype=torch.float, device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = nms(boxes, scores, 0.5)[1].tolist()
    assert kept == [0, 2], 'nms kept %r on %s' % (kept, device)
    image = torch.full((1, 1, 8, 8), 3.0, device=device, requires_grad=True)
    roi = torch.tensor([[0.0, 1, 1, 5, 5]], device=device)
    pooled = roi_align(image, roi, 2)
    pooled.sum().backward()
    assert torch.allclose(pooled, torch.full_like(pooled, 3.0)), pooled
    assert abs(image.grad.sum().item() - 4) < 1e-4, image.grad
"""


class Stop(Exception):
    """Setting up cannot go on; the message is for the user."""


def say(line: str) -> None:
    """Print a line of our own, apart from what the command prints."""
    print('bootstrap: ' + line, file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> Tuple[str, str, List[str]]:
    """Split the command line into environment, command and its options."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument('--env', default=os.environ.get('WS_MM_ENV') or '')
    known, rest = options.parse_known_args(list(argv))
    command = rest[0] if rest else 'missing'
    if command in ('-h', '--help'):
        print(USAGE)
        raise SystemExit(0)
    if command not in COMMANDS:
        legal = ', '.join(COMMANDS)
        raise Stop(f'COMMAND is {command}: it must be one of {legal}')
    return known.env or str(ROOT / '.venv'), command, rest[1:]


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
                f'tools/requirements.txt has {line!r}, which is no exact '
                'pin: write it as name==version'
            )
    return pins


def cache_dir() -> Path:
    """Return the folder that keeps built wheels and logs."""
    root = os.environ.get('XDG_CACHE_HOME', '')
    base = Path(root) if os.path.isabs(root) else Path.home() / '.cache'
    return base / 'ws_mm'


def clock(seconds: float) -> str:
    """Return a duration in seconds as m:ss."""
    return '%d:%02d' % divmod(int(seconds), 60)


def digest(*texts: str) -> str:
    """Return a short digest of some texts."""
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:16]


def python_tag() -> str:
    """Return the running Python's wheel tag, such as cp311."""
    name = {'cpython': 'cp', 'pypy': 'pp'}.get(sys.implementation.name, 'py')
    return '%s%d%d' % (name, *sys.version_info[:2])


# Checks: each returns the line to show, empty if all is well.


def check_python(version: Sequence[Any], command_line: str) -> str:
    """Check an interpreter's version, given as in sys.version_info."""
    if tuple(version[:2]) in PYTHONS:
        return ''
    age = 'old' if tuple(version[:2]) < min(PYTHONS) else 'new'
    mend = 'install one of them'
    for wanted in PYTHONS:
        python = 'python%d.%d' % wanted
        # A pyenv shim can be on PATH for a Python that is not there.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            devnull = subprocess.DEVNULL
            subprocess.check_call([python, '-c', ''], stderr=devnull)
            mend = f'run: {python} {command_line}'
            break
    found = '%d.%d.%d' % tuple(version[:3])
    return (
        f'Python {found} is too {age} (3.10, 3.11 or 3.12 is needed): {mend}'
    )


def check_owner(env: Path, tag: str) -> str:
    """Check that an environment is absent, empty or made here."""
    if not env.exists() or (env.is_dir() and not any(env.iterdir())):
        return ''
    if not (env / MARKER).is_file():
        return (
            f'{env} was not made by tools/bootstrap.py, which leaves it as it '
            'is: name another folder with --env DIR or $WS_MM_ENV (or use an '
            'OpenMMLab environment of yours directly: pip install -e .)'
        )
    made_by = read_state(env).get('environment', tag)
    if made_by != tag:
        return (
            f'{env} was made by {made_by} and this Python is {tag}: run that '
            'one, name another folder with --env DIR, or delete this one'
        )
    python = env / 'bin/python'
    if python.is_symlink() and not python.exists():
        return (
            f'the Python that made {env} is gone: delete that folder and run '
            'the same command again'
        )
    return ''


def check_folder(path: Path, what: str, mend: str, need_gb: float) -> str:
    """Check that a folder can be made and has room."""
    while not path.exists():
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=str(path)):
            pass
    except OSError as error:
        why = error.strerror
        return f'{path} cannot be written ({why}), where {what} goes: {mend}'
    free = shutil.disk_usage(str(path)).free / 1e9
    if free >= need_gb:
        return ''
    return (
        f'{path}, where {what} goes, has {free:.1f} GB free and {need_gb} GB '
        f'are needed: free some, or {mend}'
    )


def compiler() -> List[str]:
    """Return the command of the C++ compiler, or an empty list."""
    if os.environ.get('CXX'):
        command = shlex.split(os.environ['CXX'])
        return command if shutil.which(command[0]) else []
    return [n for n in ('c++', 'g++', 'clang++') if shutil.which(n)][:1]


def check_compiler() -> str:
    """Check for what mmcv's operators are compiled with."""
    cxx = compiler()
    if not cxx:
        tried = os.environ.get('CXX') or 'c++, g++, clang++'
        return (
            f"no C++ compiler on PATH (looked for {tried}): mmcv's operators "
            'need GCC 9 or newer, for example from: apt-get install g++'
        )
    headers = Path(sysconfig.get_paths()['include'])
    if not (headers / 'Python.h').is_file():
        package = 'python%d.%d-dev' % sys.version_info[:2]
        return (
            f"{headers} has no Python.h: mmcv's operators need Python's "
            f'headers, for example from: apt-get install {package}'
        )
    return ''


def check_venv() -> str:
    """Check that this Python can make environments."""
    for name in ('venv', 'ensurepip'):
        if importlib.util.find_spec(name) is None:
            package = 'python%d.%d-venv' % sys.version_info[:2]
            return (
                f'this Python has no module {name}, which makes environments: '
                f'get it, for example from: apt-get install {package}'
            )
    return ''


def check_network(
    pip: Sequence[str], pins: Dict[str, str], environ: Dict[str, str]
) -> str:
    """Check that pip, with the user's settings, fetches a small package."""
    options = 'download --no-deps --no-cache-dir --retries 0 --timeout 20'
    small = 'wheel==' + pins['wheel']
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*pip, *options.split(), '-d', folder, small],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            universal_newlines=True,
            env=environ,
        )
    if not result.returncode:
        return ''
    why = ' '.join(error_lines(result.stdout)[-1:])
    return (
        f'pip cannot fetch {small} from the package index ({why}): check the '
        f'network, and index-url and proxy in: {" ".join(pip)} config list'
    )


# Running long commands.


class Progress:
    """A status line that keeps moving while a command is silent."""

    def __init__(self, title: str) -> None:
        self.title, self.text = title, ''
        self.start = time.monotonic()
        self.tty = sys.stderr.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def elapsed(self) -> float:
        """Return the seconds since the step began."""
        return time.monotonic() - self.start

    def line(self) -> str:
        """Return the status line."""
        return f'{self.title}  {clock(self.elapsed())}  {self.text}'.strip()

    def _show(self) -> None:
        # A terminal shows one line that changes; a log file gets few lines.
        while not self._stop.wait(1 if self.tty else 30):
            if self.tty:
                width = shutil.get_terminal_size().columns - 12
                sys.stderr.write('\r\033[Kbootstrap: ' + self.line()[:width])
                sys.stderr.flush()
            else:
                say(self.line())

    def __enter__(self) -> 'Progress':
        self._thread.start()
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.tty:
            sys.stderr.write('\r\033[K')
        self.text = 'done' if kind is None else 'stopped'
        say(self.line())


def build_progress(line: str, elapsed: float) -> str:
    """Return progress from a line of ninja's, such as ' [3/78] c++ ...'."""
    match = re.match(r'\s*\[(\d+)/(\d+)\] ', line)
    if match is None or match.group(1) == '0':
        return ''
    done, total = int(match.group(1)), int(match.group(2))
    left = clock(elapsed / done * (total - done))
    return f'{done} of {total} objects, about {left} left'


def pip_progress(line: str, elapsed: float) -> str:
    """Return progress from a line of pip's."""
    line = line.strip()
    match = re.match(r'Progress (\d+) of (\d+)$', line)
    if match:
        done, total = (int(part) / 1e6 for part in match.groups())
        return f'downloading, {done:.0f} of {total:.0f} MB'
    words = ('Collecting ', 'Downloading ', 'Building ', 'Installing ')
    return line[:60] if line.startswith(words) else ''


def error_lines(text: str) -> List[str]:
    """Return the last lines of a log that say what went wrong."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    # What pip adds around the error of a command that it ran.
    frame = 'note:|hint:|.*(-with-error|-failed$|status .error|Encountered)'
    bad = re.compile(rf'(?!{frame}).*(\berror\b|Error:)', re.IGNORECASE)
    return ([line for line in lines if bad.match(line)] or lines)[-5:]


def captured(command: Sequence[str], environ: Dict[str, str]) -> str:
    """Return what a short command prints."""
    result = subprocess.run(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env=environ,
    )
    if result.returncode:
        why = ' '.join(error_lines(result.stderr)[-1:])
        raise Stop(f'{command[0]} failed: {why}')
    return result.stdout


def run_logged(
    title: str,
    command: Sequence[str],
    log: Path,
    environ: Dict[str, str],
    describe: Callable[[str, float], str] = pip_progress,
) -> None:
    """Run a command with a status line and all of its output in a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file, Progress(title) as progress:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            universal_newlines=True,
            errors='replace',
            env=environ,
            start_new_session=True,
        )
        try:
            for line in process.stdout or ():
                text = describe(line, progress.elapsed())
                progress.text = text or progress.text
                if not line.startswith('Progress '):
                    file.write(line)
            process.wait()
        finally:
            end_group(process)
        if process.returncode:
            file.flush()
            shown = '\n  '.join(error_lines(log.read_text(errors='replace')))
            raise Stop(f'{title} failed (all output: {log})\n  {shown}')


def end_group(process: 'subprocess.Popen[str]') -> None:
    """End a command that is still running, with all that it started."""
    # Pip undoes a half-done installation when it is interrupted.
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        if process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(seconds)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it if need be.

    The kernel drops it with the process, so no lock is ever left behind.
    """
    import fcntl  # Windows has none, and must get as far as its own line

    with path.open('a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            say(f'waiting for process {file.read()}, at work on {what}')
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


# The steps.


def read_state(env: Path) -> Dict[str, str]:
    """Return what the environment's set-up noted."""
    try:
        return dict(json.loads((env / STATE).read_text()))
    except (OSError, ValueError):
        return {}


def operator_key(
    pins: Dict[str, str], torch: str, tag: str, device: str
) -> str:
    """Return the name under which a wheel of operators is kept."""
    machine = os.uname().machine
    return f'mmcv{pins[MMCV]}-torch{torch}-{tag}-{device}-{machine}'


def operator_device(probe: Dict[str, Any], nvcc: str) -> Tuple[str, str]:
    """Return what to build operators for and, if so, why not for the GPU.

    Args:
        probe: what PROBE printed.
        nvcc: what nvcc --version printed, empty without one.
    """
    if not probe['archs']:
        return 'cpu', ''
    cuda = str(probe['cuda'])
    match = re.search(r'release (\d+)', nvcc)
    release = match.group(1) if match else 'absent'
    if release == cuda.split('.')[0]:
        return '_'.join(['cuda' + cuda, *probe['archs']]), ''
    return 'cpu', (
        f"the GPU stays unused: nvcc is {release}, and building mmcv's "
        f'operators for the GPU needs CUDA {cuda}: install that toolkit and '
        'set $CUDA_HOME'
    )


def build_jobs() -> int:
    """Return how many compilers fit at 1.5 GB each."""
    meminfo = Path('/proc/meminfo').read_text()
    match = re.search(r'MemAvailable:\s*(\d+) kB', meminfo)
    fitting = int(match.group(1)) // 1500000 if match else 1
    return max(1, min(len(os.sched_getaffinity(0)), fitting))


class SetUp:
    """One environment, the steps to it, and what each depends on."""

    def __init__(self, env: Path, cache: Path) -> None:
        requirements = (ROOT / 'tools/requirements.txt').read_text()
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
        torch = self.pins['torch'] + '*'
        key = operator_key(self.pins, torch, python_tag(), '*')
        return 'operators' in self.todo() and not self.wheels(key)

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
            PIP_DISABLE_PIP_VERSION_CHECK='1',
        )
        return environ

    def problems(self) -> List[str]:
        """Return a line for each thing that would stop the set-up later."""
        if not sys.platform.startswith('linux'):
            return [f'this system is {sys.platform}: use linux (or its WSL)']
        found = [check_owner(self.env, python_tag())]
        todo = self.todo()
        if todo and not found[0]:
            need = DISK_GB if 'packages' in todo else 1
            mend = 'use another folder with '
            found += [
                check_folder(
                    self.env,
                    'the environment',
                    mend + '--env DIR or $WS_MM_ENV',
                    need,
                ),
                check_folder(
                    self.cache, 'the cache', mend + '$XDG_CACHE_HOME', need
                ),
                check_venv() if 'environment' in todo else '',
                check_compiler() if self.must_build() else '',
            ]
        return [line for line in found if line]

    def run(self) -> None:
        """Do every step that is not done."""
        problems = self.problems()
        if problems:
            raise Stop('\nbootstrap: '.join(problems))
        if not self.todo():
            return
        self.env.mkdir(parents=True, exist_ok=True)
        with locked(self.env / MARKER, str(self.env)):
            if 'environment' in self.todo():
                self.logged('venv', [sys.executable, '-m', 'venv', self.env])
                self.note(environment=self.steps['environment'])
            if 'packages' in self.todo() or self.must_build():
                problem = check_network(self.pip, self.pins, self.environ())
                if problem:
                    raise Stop(problem)
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
        chosen = [f'{k}=={v}' for k, v in self.pins.items() if k != MMCV]
        # Packages that come as source are built with the pinned tools, too.
        pip += ['--build-constraint', str(ROOT / 'tools/requirements.txt')]
        self.logged('packages', [*pip, '--progress-bar', 'raw', *chosen])

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
        building = self.cache / 'building'
        building.mkdir(parents=True, exist_ok=True)
        with locked(building / (key + '.lock'), key):
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
        # Under the lock this can only be what a killed build left.
        work = self.cache / 'building' / key
        shutil.rmtree(str(work), ignore_errors=True)
        (work / 'tmp').mkdir(parents=True)
        environ = self.environ()
        environ.setdefault('MAX_JOBS', str(build_jobs()))
        environ.pop('TORCH_CUDA_ARCH_LIST', None)  # the key names them
        environ.update(
            CFLAGS=CFLAGS, CXX=' '.join(compiler()), TMPDIR=str(work / 'tmp')
        )
        if '-cuda' in key:
            environ['FORCE_CUDA'] = '1'
        else:  # mmcv builds for every GPU that it sees
            environ.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
        # Pip's cache could hold a wheel that was built against another torch.
        options = 'wheel -v --no-cache-dir --no-deps --no-build-isolation'
        options += ' --no-binary'
        pin = f'{MMCV}=={self.pins[MMCV]}'
        try:
            run_logged(
                "mmcv's operators",
                [*self.pip, *options.split(), MMCV, '-w', str(work), pin],
                self.cache / 'logs/operators.log',
                environ,
                build_progress,
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
        options = 'install --no-deps --no-index --no-build-isolation -e'
        self.logged('ws_mm', [*self.pip, *options.split(), ROOT])

    def commands(self, command: str, args: Sequence[str]) -> List[List[str]]:
        """Return what a command runs, in order."""
        lint = ['ruff check .', 'ruff format --check .', 'mypy ws_mm']
        modules = {
            'tests': [['pytest', *args]],
            'lint': [line.split() for line in [*lint, 'codespell_lib']],
        }.get(command, [])
        if command == 'demo':
            return [[self.python, str(ROOT / 'tools/demo.py'), *args]]
        return [[self.python, '-m', *words] for words in modules]


def run(command: Sequence[str], cwd: Path, environ: Dict[str, str]) -> int:
    """Run a command on this terminal and return its exit code."""
    process = subprocess.Popen(list(command), cwd=str(cwd), env=environ)
    # Ctrl-C reaches the command by itself, which ends in its own way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *unused: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)
    return code if code >= 0 else 128 - code


def interrupt(*unused: object) -> None:
    """Treat a request to end as Ctrl-C, so that nothing is left behind."""
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    start = time.monotonic()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        folder, command, args = parse(argv)
        words = ' '.join(shlex.quote(word) for word in [sys.argv[0], *argv])
        problem = check_python(sys.version_info, words)
        if problem:
            raise Stop(problem)
        env = Path(folder).expanduser().absolute()
        setup = SetUp(env, cache_dir())
        setup.run()
        say(f'{env} is ready after {clock(time.monotonic() - start)}')
        environ = setup.environ()
        cpu_only = read_state(env).get('cpu_only')
        if cpu_only:
            say(cpu_only)
            environ['CUDA_VISIBLE_DEVICES'] = ''
        if command == 'env':
            print(f'source {shlex.quote(str(env / "bin/activate"))}')
        # Only the demo takes paths that are the caller's.
        cwd = Path.cwd() if command == 'demo' else ROOT
        codes = [0]
        for each in setup.commands(command, args):
            say(' '.join(each[1:]))
            codes.append(run(each, cwd, environ))
            if codes[-1] > 128:  # ended by a signal
                break
        if command != 'env':
            say(f'{command} took {clock(time.monotonic() - start)} in all')
        return max(codes)
    except (Stop, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say('interrupted; the same command goes on where this one stopped')
        return 130


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
