"""The set-up of a bare machine; nothing here installs torch or compiles."""

import ast
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

import bootstrap  # noqa: E402
from bootstrap import SetUp, Stop  # noqa: E402
from fake_environment import (  # noqa: E402
    SCRIPT,
    calls,
    environment,  # noqa: F401
    left_over,
    start,
    wait_for,
)
from support import bare_machine  # noqa: E402


def cli(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_line(result: subprocess.CompletedProcess) -> str:
    """Return the only line of a command that has failed."""
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    return line


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b''
        for path in folder.rglob('*')
    }


# Checks.


def test_python_3_6_can_read_it() -> None:
    for name in ('__init__', 'bare_machine', 'operators'):
        text = (ROOT / f'tools/support/{name}.py').read_text()
        ast.parse(text, feature_version=(3, 6))
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize('minor', [6, 9, 13])
def test_unfit_interpreter_says_so(minor: int) -> None:
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    found = sorted(pyenv.glob(f'versions/3.{minor}.*/bin/python'))
    python = str(found[0]) if found else f'/usr/bin/python3.{minor}'
    if not Path(python).exists():
        pytest.skip(f'no Python 3.{minor} in /usr/bin or {pyenv}')
    result = subprocess.run(
        [python, str(SCRIPT), 'demo', '--seed', 'a b'],
        capture_output=True,
        text=True,
    )
    age = 'old' if minor < 10 else 'new'
    line = one_line(result)
    assert re.match(rf'bootstrap: Python 3\.{minor}\.\d+ is too {age} ', line)
    assert '3.10, 3.11 or 3.12' in line


def test_unfit_python_is_told_which_one_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    version, line = (3, 14, 1), 'tools/bootstrap.py demo'
    told = bootstrap.check_python(version, line)
    assert told.endswith('(3.10, 3.11 or 3.12 is needed): install one of them')
    told = bootstrap.check_python((3, 11, 7), line, ((3, 10),))
    assert told.endswith(
        'Python 3.11.7 is too new (3.10 is needed): install it'
    )
    for minor, code in ((11, 127), (12, 0)):  # 3.11: a shim to nothing
        path = tmp_path / f'python3.{minor}'
        path.write_text(f'#!/bin/sh\nexit {code}\n')
        path.chmod(0o755)
    told = bootstrap.check_python(version, line)
    assert told.endswith(': run: python3.12 tools/bootstrap.py demo')
    assert bootstrap.check_python((3, 10, 0), line) == ''
    assert bootstrap.check_python((3, 12, 9), line) == ''


def test_other_systems_are_refused(
    setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert setup.problem() == 'this system is win32: use linux (or its WSL)'


@pytest.mark.parametrize('cxx', ['', 'c++-not-here -m64'])
def test_missing_compiler_stops_before_anything(
    cxx: str, tmp_path: Path
) -> None:
    env, cache = tmp_path / 'env', tmp_path / 'cache'
    result = cli(
        *('env', '--env', str(env)),
        PATH=os.environ['PATH'] if cxx else str(tmp_path),
        CXX=cxx,
        XDG_CACHE_HOME=str(cache),
    )
    line = one_line(result)
    tried = cxx or 'c++, g++, clang++'
    assert f'no C++ compiler on PATH (looked for {tried})' in line
    assert 'apt-get install g++' in line
    assert not list(tmp_path.iterdir())


def test_compiler_is_not_needed_for_a_kept_wheel(
    setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare_machine, 'compiler', list)
    assert 'no C++ compiler' in setup.problem()
    key = bootstrap.operator_key(
        setup.pins, '2.10.0+cu128', bootstrap.python_tag(), 'cpu'
    )
    wheel = setup.cache / 'wheels' / key / 'onedl_mmcv.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert setup.problem() == ''


def test_foreign_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python').write_text('mine')
    before = snapshot(tmp_path)
    line = one_line(cli('tests', WS_MM_ENV=str(tmp_path)))
    assert f'{tmp_path} was not made by tools/bootstrap.py' in line
    assert '--env DIR' in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['build'], 'COMMAND is build: .*one of demo, tests, lint, env'),
        ([], 'COMMAND is missing'),
        (['--demo'], 'COMMAND is --demo'),
        (['--line', 'newest', 'tests'], 'one of maintained, official, laye'),
        (['--line', 'official', 'demo'], 'demo takes no --line'),
        (['--line', 'site', 'tests'], '--line is site: it must be one of'),
    ],
)
def test_unknown_words(words: list[str], message: str) -> None:
    with pytest.raises(Stop, match=message):
        bootstrap.parse(words)


def test_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('WS_MM_ENV', raising=False)
    own = str(ROOT / '.venv')
    words = ['-k', 'a or b', 'tests/test_norm.py', '-x', '--en', '-h']
    line = 'maintained'
    assert bootstrap.parse(['tests', *words]) == (line, own, 'tests', words)
    for given in (['--env', '/x', 'demo', '-o'], ['demo', '--env=/x', '-o']):
        assert bootstrap.parse(given) == (line, '/x', 'demo', ['-o'])
    # Each line has a folder of its own.
    parsed = bootstrap.parse(['--line', 'official', 'tests'])
    assert parsed[:2] == ('official', str(ROOT / '.venv-official'))
    parsed = bootstrap.parse(['site', '-q'])
    assert parsed == ('site', str(ROOT / '.venv-site'), 'site', ['-q'])
    monkeypatch.setenv('WS_MM_ENV', '/y')
    assert bootstrap.parse(['lint'])[1] == '/y'


def test_an_environment_of_another_python_or_line(setup: SetUp) -> None:
    tag = bootstrap.python_tag()
    setup.note(line='maintained')
    assert bootstrap.check_owner(setup.env, tag) == ''
    made = f'was made for --line maintained with {tag}, and this is --line '
    told = bootstrap.check_owner(setup.env, 'cp399')
    assert f'{made}maintained with cp399: name another' in told
    other = SetUp(setup.env, setup.cache, 'layers-newest')
    assert f'{made}layers-newest with {tag}' in other.problem()


def test_each_line_names_files_that_exist(setup: SetUp) -> None:
    for name, line in bootstrap.LINES.items():
        other = SetUp(setup.env, setup.cache, name)
        (command,) = other.commands('tests', ['-x'])
        assert command[1:3] == ['-m', 'pytest']
        files = [word for word in command[3:] if word.startswith('tests/')]
        assert len(files) == len(line.tests)
        assert [f for f in files if not (ROOT / f).is_file()] == []
        assert ('operators' in other.steps) == bool(line.mmcv)
        (command,) = other.commands('tests', ['tests/test_norm.py'])
        files = [word for word in command if word.startswith('tests/')]
        assert files == ['tests/test_norm.py']


def test_the_site_needs_no_torch_and_no_package(setup: SetUp) -> None:
    site = SetUp(setup.env, setup.cache, 'site')
    assert list(site.steps) == ['environment', 'packages']
    assert 'torch' not in site.pins
    (command,) = site.commands('site', ['-q'])
    assert command[1:4] == ['-m', 'mkdocs', 'build']
    assert '--strict' in command
    assert (ROOT / command[-2]).is_file()


# What is kept and what is printed.


def test_key_names_all_that_a_wheel_depends_on() -> None:
    pins = {'onedl-mmcv': '2.3.6'}
    arguments = [pins, '2.10.0+cu128', 'cp311', 'cpu']
    keys = {bootstrap.operator_key(*arguments)}
    others = [{'onedl-mmcv': '2.3.7'}, '2.10.0+cpu', 'cp312', 'cuda12.8_sm_90']
    for place, other in enumerate(others):
        changed = [*arguments[:place], other, *arguments[place + 1 :]]
        keys.add(bootstrap.operator_key(*changed))
    assert len(keys) == 5
    assert all(key.endswith(os.uname().machine) for key in keys)


def test_operators_for_the_gpu_need_its_compiler() -> None:
    probe = {'cuda': '12.8', 'archs': []}
    device = bootstrap.operator_device
    assert device(probe, 'release 12.8, V12.8') == ('cpu', '')
    probe['archs'] = ['sm_80', 'sm_90']
    assert device(probe, 'release 12.4, V12.4') == ('cuda12.8_sm_80_sm_90', '')
    for version, shown in (('', 'absent'), ('release 11.8, V11.8', '11')):
        built_for, why = device(probe, version)
        assert built_for == 'cpu'
        assert f'nvcc is {shown},' in why
        assert 'CUDA 12.8' in why


# Steps, with the stand-in.


def test_steps_are_done_once(setup: SetUp) -> None:
    result = cli('env', '--env', str(setup.env))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f'source {setup.env}/bin/activate\n'
    assert setup.todo() == []
    (wheel,) = setup.wheels('*')
    assert Path(wheel).read_text() == 'whole\n'
    assert not left_over(setup)
    done = calls(setup)
    assert cli('env', '--env', str(setup.env)).returncode == 0
    assert calls(setup) == done

    # One step is done again without the others.
    setup.note(ws_mm='')
    assert cli('env', '--env', str(setup.env)).returncode == 0
    assert calls(setup)[: len(done)] == done
    (again,) = calls(setup)[len(done) :]
    assert again.endswith(f'-e {ROOT}')

    # Another environment takes the wheel from the cache.
    setup.note(operators='', ws_mm='')
    (setup.env / 'bin/calls').unlink()
    assert cli('env', '--env', str(setup.env)).returncode == 0
    assert calls(setup, 'install')
    assert not calls(setup, 'wheel -v')


def test_steps_follow_what_they_depend_on(
    setup: SetUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.note(**setup.steps)
    (tmp_path / 'tools/requirements').mkdir(parents=True)
    pins = 'tools/requirements/maintained.txt'
    for name in ('pyproject.toml', pins):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(bootstrap, 'ROOT', tmp_path)  # the checkout moved
    moved = SetUp(setup.env, setup.cache)
    assert moved.todo() == ['ws_mm']
    setup.note(**moved.steps)
    for name, steps in (
        ('pyproject.toml', ['ws_mm']),
        (pins, ['packages', 'operators']),
    ):
        with (tmp_path / name).open('a') as file:
            file.write('\n')
        changed = SetUp(setup.env, setup.cache)
        assert changed.todo() == steps
        setup.note(**changed.steps)


def test_step_cut_short_is_done_again(
    setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.note(**setup.steps)
    # Pins that change and change back must not leave the first stamp.
    monkeypatch.setitem(setup.steps, 'packages', 'other pins')

    def cut_short() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, 'install_packages', cut_short)
    with pytest.raises(KeyboardInterrupt):
        setup.run()
    assert SetUp(setup.env, setup.cache).todo() == ['packages']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_goes_on_with_the_next_call(
    number: signal.Signals, setup: SetUp
) -> None:
    mode, pid = setup.env / 'bin/mode', setup.env / 'bin/pid'
    mode.write_text('hang')
    process = start(setup)
    wait_for(pid)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert setup.wheels('*') == []
    build = int(pid.read_text())
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert told.splitlines()[-1] == (
            'bootstrap: interrupted; the same command goes on where this one '
            'stopped'
        )
        assert not left_over(setup)
        with pytest.raises(ProcessLookupError, match='No such process'):
            os.kill(build, 0)
    else:  # which leaves no time to clear up
        assert left_over(setup)
        with contextlib.suppress(ProcessLookupError):
            os.kill(build, signal.SIGKILL)
    mode.write_text('build')
    setup.run()
    (wheel,) = setup.wheels('*')
    assert Path(wheel).read_text() == 'whole\n'
    assert not left_over(setup)
    assert setup.todo() == []


def test_failed_build_shows_the_cause_and_the_log(setup: SetUp) -> None:
    (setup.env / 'bin/mode').write_text('fail')
    result = cli('env', '--env', str(setup.env))
    log = setup.cache / 'logs/operators.log'
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2:] == [
        f"bootstrap: mmcv's operators failed (all output: {log})",
        '  nms.cpp:3:10: fatal error: torch.h: No such file',
    ]
    assert 'ninja: build stopped' in log.read_text()
    assert not list(setup.cache.rglob('*.whl'))
    assert not left_over(setup)


def test_operators_that_do_not_run_are_not_kept(
    setup: SetUp, capsys: pytest.CaptureFixture
) -> None:
    setup.run()
    (kept,) = setup.wheels('*')
    setup.note(operators='')
    (setup.env / 'bin/mode').write_text('broken')
    with pytest.raises(Stop, match='check failed'):
        setup.run()
    assert f'{kept} does not run here: building' in capsys.readouterr().err
    assert len(calls(setup, 'wheel -v')) == 2
    assert setup.wheels('*') == []
    assert 'operators' in setup.todo()


def test_two_at_once_take_turns(setup: SetUp) -> None:
    with (setup.env / bootstrap.MARKER).open('a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process = start(setup)
        line = process.stderr.readline()
        assert line == (
            'bootstrap: waiting for another bootstrap, at work on '
            f'{setup.env}\n'
        )
        assert process.poll() is None
        assert not calls(setup)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_no_other_environment_leaks_in(
    setup: SetUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('PYTHONPATH', '/elsewhere')
    monkeypatch.setenv('PIP_TARGET', '/elsewhere')
    monkeypatch.setenv('PIP_USER', '1')
    environ = setup.environ()
    assert not {'PYTHONPATH', 'PIP_TARGET'} & set(environ)
    assert environ['PIP_USER'] == '0'
    assert environ['PATH'].split(':')[0] == str(setup.env / 'bin')


# Commands.


def test_command_runs_in_the_environment(
    setup: SetUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.note(**setup.steps)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WS_MM_ENV', str(setup.env))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
    assert cli('tests', '-k', 'norm').returncode == 5
    assert cli('lint').returncode == 2
    demo = cli('demo', '--seed', '1')
    assert (demo.returncode, demo.stdout) == (0, f'{tmp_path} gpus=1\n')
    assert calls(setup) == [
        '-m pytest -n 2 --dist loadfile -k norm',
        '-m ruff check .',
        '-m ruff format --check .',
        '-m mypy ws_mm',
        '-m codespell_lib',
        f'{ROOT}/tools/demo.py --seed 1',
    ]


def test_gpu_without_operators_is_hidden_and_said_so(setup: SetUp) -> None:
    setup.note(cpu_only='the GPU stays unused: no nvcc', **setup.steps)
    demo = cli('demo', '--env', str(setup.env), CUDA_VISIBLE_DEVICES='1')
    assert demo.stdout.endswith(' gpus=\n')
    assert 'bootstrap: the GPU stays unused: no nvcc\n' in demo.stderr


def test_the_command_takes_the_place_of_the_process(setup: SetUp) -> None:
    # So a request to end, and what the command ends with, are its own.
    setup.note(**setup.steps)
    (setup.env / 'bin/mode').write_text('hang')
    process = start(setup, 'demo')
    pid = setup.env / 'bin/pid'
    wait_for(pid)
    assert int(pid.read_text()) == process.pid
    process.kill()
    process.communicate(timeout=30)
