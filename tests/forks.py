"""Scripts of tools/ run by forks of one process that has imported them."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds that one script may take


class Forks:
    """Start scripts without the seconds that their imports take."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A buffer would hide from select() what it holds.
            bufsize=0,
            env=os.environ
            | {
                'OMP_NUM_THREADS': '1',
                'CUDA_VISIBLE_DEVICES': '',
                'PYTHONPATH': f'{ROOT}:{ROOT / "tools"}',
            },
        )
        self.codes: dict[int, int] = {}
        self.running: set[int] = set()

    def start(
        self, script: str, *arguments: object, log: Path, **environment: str
    ) -> int:
        """Start a script in a session of its own.

        Args:
            script: name of a module in tools/ that has a ``main``.
            *arguments: of the script.
            log: gets what it prints.
            **environment: added to that of the tests.

        Returns:
            The process's id.
        """
        order = dict(
            script=script,
            arguments=[str(argument) for argument in arguments],
            log=str(log),
            environment=environment,
            folder=os.getcwd(),
        )
        self.server.stdin.write(f'{json.dumps(order)}\n'.encode())
        while True:
            answer = json.loads(self.server.stdout.readline())
            if 'started' in answer:
                self.running.add(answer['started'])
                return answer['started']
            self.codes[answer['ended']] = answer['code']

    def start_ranks(
        self, script: str, *arguments: object, logs: Path
    ) -> list[int]:
        """Start two processes of one group, as torchrun does.

        Args:
            script: name of a module in tools/ that has a ``main``.
            *arguments: of the script.
            logs: folder of their outputs, ``log 0`` and ``log 1``.
        """
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = str(server.getsockname()[1])
        return [
            self.start(
                *(script, *arguments, '--launcher', 'pytorch'),
                log=logs / f'log {rank}',
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE='2',
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port,
            )
            for rank in range(2)
        ]

    def poll(self, process: int) -> int | None:
        """Exit code, negative the signal, or None while it runs."""
        while select.select([self.server.stdout], [], [], 0)[0]:
            answer = json.loads(self.server.stdout.readline())
            self.codes[answer['ended']] = answer['code']
        return self.codes.get(process)

    def wait(self, process: int, limit: float = LIMIT) -> int:
        """Exit code of a process that has to end within the limit."""
        until = time.monotonic() + limit
        while (code := self.poll(process)) is None:
            assert time.monotonic() < until, f'it runs after {limit} s'
            time.sleep(0.02)
        return code

    def call(
        self, script: str, *arguments: object, log: Path, **environment: str
    ) -> tuple[int, str]:
        """Run a script; its exit code and what it printed come back."""
        process = self.start(script, *arguments, log=log, **environment)
        return self.wait(process), log.read_text()

    def run(
        self, script: str, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a script as :func:`tiny_runs.call` does."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, 'log')
            code, said = self.call(script, *arguments, log=log, **environment)
        return subprocess.CompletedProcess(script, code, said)

    def stop(self) -> None:
        """End the server and everything that it started."""
        for process in self.running - self.codes.keys():
            try:
                os.killpg(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.server.stdin.close()
        # A process that was forked meanwhile, such as a DataLoader's worker,
        # may hold the other end open, so that the server waits for a line.
        self.server.kill()
        self.server.stdout.close()
        self.server.wait(LIMIT)


def serve() -> None:
    """Fork a process for every line, until there is none."""
    # What the imports print is no answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    import mmdet.utils
    import mmseg.utils
    import test
    import train
    from analysis_tools import check_model
    from model_converters import apply_norm
    from proofs import kill_and_resume, soak
    from support import launch
    from yapf.yapflib import yapf_api

    import ws_mm  # noqa: F401

    # Layout of a printed config takes longer than a short run of it.
    yapf_api.FormatCode = lambda text, **unused: (text, True)
    for package in (mmseg, mmdet):
        package.utils.register_all_modules(init_default_scope=False)

    mains = {
        'train': lambda: launch.run(train.main),
        'test': lambda: launch.run(test.main),
        'apply_norm': lambda: launch.run(apply_norm.main),
        'check_model': lambda: launch.run(check_model.main),
        'kill_and_resume': kill_and_resume.main,
        'soak': soak.main,
    }
    while True:
        if select.select([0], [], [], 0.02)[0]:
            # One line at a time: the next is sent after the answer.
            line = os.read(0, 1 << 20)
            if not line:
                return
            order = json.loads(line)
            # Or the fork prints once more what waits to be printed here.
            sys.stdout.flush()
            process = os.fork()
            if not process:
                obey(order, mains[order['script']])
            print(json.dumps({'started': process}), file=answers, flush=True)
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if ended:
            code = os.waitstatus_to_exitcode(status)
            answer = {'ended': ended, 'code': code}
            print(json.dumps(answer), file=answers, flush=True)


def obey(order: dict, main: object) -> None:
    """Be the script."""
    import traceback

    os.setsid()
    file = os.open(order['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(order['environment'])
    os.chdir(order['folder'])
    more = order['environment'].get('PYTHONPATH')
    sys.path[:0] = more.split(':') if more else []
    sys.argv = [f'{order["script"]}.py', *order['arguments']]
    code = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    serve()
