"""An environment of bootstrap.py with a stand-in for its Python."""

import subprocess
import sys
import time
from pathlib import Path

import bootstrap
import pytest
from bootstrap import SetUp

SCRIPT = Path(bootstrap.__file__)
# Stands in for an environment's Python: notes how it is called, and builds a
# wheel at once, for ever, or not at all, as the file `mode` says.
FAKE_PYTHON = """\
#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
mode=$(cat "$here/mode")
case "$*" in
  *' wheel '*)
    while [ "$1" != -w ]; do shift; done
    echo half > "$2/onedl_mmcv-2.3.6-cp311-cp311-linux.whl"
    echo ' [1/78] c++ nms.cpp'
    if [ $mode = hang ]; then echo $$ > "$here/pid"; exec sleep 60; fi
    if [ $mode = fail ]; then
      echo 'nms.cpp:3:10: fatal error: torch.h: No such file'
      echo 'ninja: build stopped: subcommand failed.'
      echo 'error: subprocess-exited-with-error'
      exit 1
    fi
    echo whole > "$2/onedl_mmcv-2.3.6-cp311-cp311-linux.whl" ;;
  *json.dumps*)
    echo '{"torch": "2.10.0", "cuda": "12.8", "archs": [], "cuda_home": null}'
    ;;
  *roi_align*) [ $mode != broken ] ;;
  *' pytest '*) exit 5 ;;
  *' mypy '*) exit 2 ;;
  */tools/demo.py*)
    echo "$PWD gpus=$CUDA_VISIBLE_DEVICES"
    if [ $mode = hang ]; then echo $$ > "$here/pid"; exec sleep 60; fi ;;
esac
"""


@pytest.fixture(name='setup')
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """Return an environment with its packages and a stand-in for Python."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    env = tmp_path / 'env'
    (env / 'bin').mkdir(parents=True)
    (env / bootstrap.MARKER).touch()
    (env / 'bin/mode').write_text('build')
    (env / 'bin/python').write_text(FAKE_PYTHON)
    (env / 'bin/python').chmod(0o755)
    made = SetUp(env, bootstrap.cache_dir())
    made.note(**{k: made.steps[k] for k in ('environment', 'packages')})
    return made


def calls(setup: SetUp, word: str = '') -> list[str]:
    path = setup.env / 'bin/calls'
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if f' {word}' in line]


def left_over(setup: SetUp) -> bool:
    """Return whether a build has left its folder."""
    return (setup.env / 'building').exists()


def start(setup: SetUp, command: str = 'env') -> subprocess.Popen:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), command, '--env', str(setup.env)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists() and path.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(path)
