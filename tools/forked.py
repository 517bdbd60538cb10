"""Python processes and kernels that start at once: libraries are imported by one process, which forks the others.

    python tools/forked.py pytest --nbmake nbs tests
    python tools/forked.py pytest --tx 2*popen//python={python} tests

Runs a command whose kernels `python3` are forked, as are torchrun's workers and what it starts as
`$FORKED_PYTHON`, `{python}` in its arguments: a stand-in for `python` that takes `-c code`, `-m module` or a
script. Each has a process of its own, with nothing defined in it; only what `import` would have loaded is in
memory already. For systems that can fork.
"""
import atexit
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

# Not matplotlib's inline backend: it looks for its notebook when it is loaded, and without one shows no figure.
LIBRARIES = (
    "dmin",   # first: it keeps the others quiet about what is missing
    "numpy",
    "torch",
    "PIL.Image",
    "pandas",
    "datasets",
    "scipy.stats",
    "skimage.metrics",
    "transformers",
    "peft",
    "accelerate",
    "diffusers",
    "diffusers.pipelines.ddpm",
    "diffusers.pipelines.ddim",
    "diffusers.training_utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "matplotlib.pyplot",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "torch.utils.flop_counter",
    "hnswlib",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "IPython.core.completer",
    "nbclient",
    "fastcore.test")


# what stands in for python: it asks, waits, and ends as the fork does

def ask(path: str, arguments: list[str]) -> int:
    """Has the server fork a process, and lives as long as it does; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answers = server.makefile()
        process = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, frame: os.kill(process, n))
        status = int(answers.readline() or 1)
    if status < 0:   # a signal ended it
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


# the forks

def become(request: dict, files: list[int]) -> None:
    """What a fork does: takes over its client's files, folder and environment, and runs. Never returns."""
    import random

    import numpy as np

    for source, target in zip(files, range(3)): os.dup2(source, target)
    for file in files: os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    np.random.seed()
    kind, *arguments = request["arguments"]
    code = ended(be_kernel if kind == "kernel" else be_python, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(work, arguments: list[str]) -> int:
    """Runs `work(arguments)` as an interpreter would; returns the exit status."""
    code = 0
    try:
        work(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()   # waits for threads
    atexit._run_exitfuncs()
    return code


def be_kernel(arguments: list[str]) -> None:
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", "-f", arguments[0], "--quiet"]   # it prints no way to connect to it
    IPKernelApp.launch_instance(argv=sys.argv[1:])


def be_python(arguments: list[str]) -> None:
    while arguments[0] == "-u": arguments = arguments[1:]
    what, *rest = arguments
    if what == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what.startswith("-"): raise SystemExit(f"{what}: -c code, -m module or a script is needed")
    else:
        sys.argv, sys.path[0] = arguments, str(Path(what).absolute().parent)
        runpy.run_path(what, run_name="__main__")


# the server

def fork(connection: socket.socket, listener: socket.socket) -> int | None:
    """A process for one request; returns its number, None where the client is gone before it has asked."""
    data, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    while data and not data.endswith(b"\n"): data += connection.recv(2**20) or b"\n"
    if not data.endswith(b"}\n"):
        for file in files: os.close(file)
        return None
    process = os.fork()
    if process == 0:
        try:
            connection.close()
            listener.close()
            become(json.loads(data), files)
        except BaseException: traceback.print_exc()   # it could not even begin
        finally: os._exit(1)
    for file in files: os.close(file)
    try: connection.sendall(f"{process}\n".encode())
    except OSError: pass   # the client was killed: its end is read next, and ends the process
    return process


def serve(listener: socket.socket, command: subprocess.Popen) -> int:
    """Forks until the command ends; what was forked for a client that is gone is ended."""
    events, clients = selectors.DefaultSelector(), {}
    events.register(listener, selectors.EVENT_READ)
    while command.poll() is None:
        for key, _ in events.select(timeout=.02):
            if key.fileobj is listener:
                client = listener.accept()[0]
                if (process := fork(client, listener)) is None: client.close()
                else:
                    clients[process] = client
                    events.register(client, selectors.EVENT_READ)
            else:   # a client says no more: it was killed
                events.unregister(key.fileobj)
                for process, client in clients.items():
                    if client is key.fileobj: os.kill(process, signal.SIGKILL)
        for process in list(clients):
            done, status = os.waitpid(process, os.WNOHANG)
            if not done: continue
            client = clients.pop(process)
            if client in {k.fileobj for k in events.get_map().values()}: events.unregister(client)
            try: client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            except OSError: pass
            client.close()
    return command.returncode


def offer(folder: Path, socket_path: Path) -> dict[str, str]:
    """Writes the kernel and the stand-in for python; returns the environment in which they are found."""
    argv = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--ask", str(socket_path)]
    kernel = folder / "kernels/python3"
    kernel.mkdir(parents=True)
    about = {"argv": [*argv, "kernel", "{connection_file}"], "display_name": "forked", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(about))
    python = folder / "python"
    python.write_text("#!/bin/sh\nexec " + " ".join(f"'{x}'" for x in argv) + ' python "$@"\n')
    python.chmod(0o755)
    kernels = {"JUPYTER_PATH": str(folder), "JUPYTER_PREFER_ENV_PATH": "0"}
    return kernels | {"FORKED_PYTHON": str(python), "PYTHON_EXEC": str(python)}   # the latter is torchrun's


def main(command: list[str]) -> int:
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"   # the debugger's word on frozen modules is nobody's here
    folder = Path(tempfile.mkdtemp())   # not TemporaryDirectory: each fork would remove it at its end
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            command = [word.replace("{python}", str(folder / "python")) for word in command]
            started = subprocess.Popen(command, env=os.environ | offer(folder, folder / "socket"))
            for name in LIBRARIES: __import__(name)
            gc.collect()
            gc.freeze()   # no fork looks through the libraries' objects again, nor copies their pages for it
            return serve(listener, started)
    finally:
        gc.unfreeze()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]: sys.exit(ask(sys.argv[2], sys.argv[3:]))
    if not sys.argv[1:]: sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
