"""Kernels that start at once, for running many notebooks: libraries are imported by one process, which forks
a kernel for each.

    python tools/forked_kernels.py pytest --nbmake --nbmake-kernel=forked nbs

Runs a command that finds the kernel `forked` beside its own. Each notebook still has a process of its own,
with nothing defined in it; only what `import` would have loaded is in memory already. For systems that can
fork.
"""
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

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
    "matplotlib_inline.backend_inline",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "torch.utils.flop_counter",
    "hnswlib",
    "ipykernel.kernelapp",
    "IPython.core.completer",
    "fastcore.test")


def ask(path: str, connection_file: str) -> int:
    """What the kernel's command does: has the server fork one, and lives as long as it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"file": connection_file, "folder": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answers = server.makefile()
        kernel = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, frame: os.kill(kernel, n))
        return int(answers.readline() or 1)


def fork(connection: socket.socket) -> int:
    """A kernel for one request; returns its process's number."""
    data, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    while not data.endswith(b"\n"): data += connection.recv(2**20)
    request, kernel = json.loads(data), os.fork()
    if kernel == 0:
        connection.detach()
        for source, target in zip(files, range(3)): os.dup2(source, target)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        be_kernel(request["file"])
    for file in files: os.close(file)
    connection.sendall(f"{kernel}\n".encode())
    return kernel


def be_kernel(connection_file: str) -> None:
    """Never returns."""
    import random

    import numpy as np
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    np.random.seed()
    sys.argv, code = ["ipykernel_launcher", "-f", connection_file], 0
    try: IPKernelApp.launch_instance(argv=["-f", connection_file])
    except SystemExit as e: code = e.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(listener: socket.socket, command: subprocess.Popen) -> int:
    """Forks kernels until the command ends; a kernel whose client is gone is ended."""
    events, clients = selectors.DefaultSelector(), {}
    events.register(listener, selectors.EVENT_READ)
    while command.poll() is None:
        for key, _ in events.select(timeout=.05):
            if key.fileobj is listener:
                client = listener.accept()[0]
                clients[fork(client)] = client
                events.register(client, selectors.EVENT_READ)
            else:   # a client says no more: it was killed
                events.unregister(key.fileobj)
                for kernel, client in clients.items():
                    if client is key.fileobj: os.kill(kernel, signal.SIGKILL)
        for kernel in list(clients):
            if not os.waitpid(kernel, os.WNOHANG)[0]: continue
            client = clients.pop(kernel)
            if client in {k.fileobj for k in events.get_map().values()}: events.unregister(client)
            try: client.sendall(b"0\n")
            except OSError: pass
            client.close()
    return command.returncode


def main(command: list[str]) -> int:
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/socket"
        listener.bind(path)
        listener.listen()
        argv = [
            sys.executable,
            "-I",
            "-S",
            str(Path(__file__).resolve()),
            "--kernel",
            path,
            "{connection_file}"]
        kernels = Path(folder) / "kernels/forked"
        kernels.mkdir(parents=True)
        (kernels / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "forked", "language": "python"}))
        started = subprocess.Popen(
            command, env=os.environ | {"JUPYTER_PATH": folder, "JUPYTER_PREFER_ENV_PATH": "0"})
        for name in LIBRARIES: __import__(name)
        return serve(listener, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kernel"]: sys.exit(ask(*sys.argv[2:]))
    if not sys.argv[1:]: sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
