"""Starts of the command line that need not import everything again: they are forked from a process that has.

`Dmjd(words)` stands for `subprocess.Popen([sys.executable, "-m", "dmjd.cli", *words])`, and `start_ranks` for torchrun
where that is not what is tested. Imports take three seconds of a start, and the tests of faults start hundreds. What is
forked is a process like any other, with files, signals, a group and children of its own. It is a child of this one,
which adopts it from the short-lived process between (prctl(2), PR_SET_CHILD_SUBREAPER): so on Linux; elsewhere it is
started as usual.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ADOPT = 36  # PR_SET_CHILD_SUBREAPER
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
LENGTH = 2**16  # of a message, in bytes


class Dmjd(subprocess.Popen[str]):
    """A run of the command line, with one thread; text comes from its pipes.

    Args:
        words: Of the command line, without `dmjd`.
        script: A program to run instead of `dmjd`, with these words.
        options: As `subprocess.Popen` has them.
    """

    def __init__(self, words: list[str], script: Path | None = None, **options: Any):
        options = {"text": True, **options, "env": {**os.environ, **(options.get("env") or {}), **ONE_THREAD}}
        program = [str(script)] if script else ["-m", "dmjd.cli"]
        super().__init__([sys.executable, *program, *map(str, words)], **options)

    def _execute_child(self, args: list[str], *details: Any) -> None:  # of CPython 3.11 and later
        if sys.platform != "linux":
            super()._execute_child(args, *details)  # type: ignore[misc]
            return
        _, _, _, _, cwd, env, _, _, _, *pipes, _restore, _gid, _gids, _uid, _umask, session, _group = details
        reads, _, _, writes, _, errors = pipes
        files = [own if file == -1 else file for own, file in enumerate((reads, writes, errors))]
        request = {"command": args[1:], "env": dict(env), "cwd": str(cwd or os.getcwd()), "session": session}
        adopt(True)
        try:
            socket.send_fds(server(), [json.dumps(request).encode()], files)
            self.pid = int(server().recv(LENGTH))
        finally:
            adopt(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def start_ranks(words: list[str], script: Path | None = None) -> list[Dmjd]:
    """Start two ranks that meet at a port that was free a moment ago, with pipes for what they say."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [Dmjd(words, script, env=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in (0, 1)]


def adopt(yes: bool) -> None:
    """Become the parent of processes whose own parent ends, or leave that to the system again."""
    ctypes.CDLL(None).prctl(ADOPT, int(yes), 0, 0, 0)


@cache
def server() -> socket.socket:
    """Start the process that imports everything, once; a socket to it, which ends it by being closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **ONE_THREAD})
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve(requests: socket.socket) -> list[str]:
    """Fork for every request; comes back in what was forked, with its command."""
    while True:
        content, files, _, _ = socket.recv_fds(requests, LENGTH, 3)
        if not content:
            os._exit(0)
        request = json.loads(content)
        read, write = os.pipe()
        between = os.fork()
        if between:
            os.close(write)
            requests_pid = os.read(read, 32)
            os.waitpid(between, 0)  # now what was forked has its new parent
            for file in (read, *files):
                os.close(file)
            requests.send(requests_pid)
            continue
        forked = os.fork()
        if forked:
            os.write(write, str(forked).encode())
            os._exit(0)
        if request["session"]:
            os.setsid()
        for place, file in enumerate(files):
            os.dup2(file, place)
        for file in (read, write, requests.fileno(), *files):
            os.close(file)
        requests.detach()
        sys.stdout = os.fdopen(1, "w", closefd=False)  # as at a start: the other one remembers what it was opened on
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        return list(request["command"])


if __name__ == "__main__":
    # All but dmjd.cli, which runs as the main module.
    import matplotlib.figure  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch.utils.data  # noqa: F401

    from dmjd.registry import Registry  # noqa: F401
    from dmjd.tasks import detect, embed, finetune, pretrain, segment  # noqa: F401

    # A collection in what is forked would touch, and so copy, all that is imported: half of the time of a short run.
    gc.collect()
    gc.freeze()
    program, *words = serve(socket.socket(fileno=int(sys.argv[1])))
    if program == "-m":
        module, *words = words
        sys.argv = ["dmjd", *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *words]
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
