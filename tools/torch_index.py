"""Prints the pip options that get a PyTorch that fits this machine: its CPU build where there is no NVIDIA
GPU.

PyPI's own Linux build of torch brings several GB of CUDA libraries. PyTorch's public index of CPU builds has
the same version as `2.13.0+cpu`, which pip prefers. The argument is `auto`, `none`, or the address of an
index (a mirror, or that of a CUDA version).
"""
import importlib.util
import shutil
import sys
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def reachable(index: str) -> bool:
    try: return urllib.request.urlopen(f"{index}/torch/", timeout=5).status == 200
    except OSError: return False


def pip_options(choice: str) -> str:
    if choice == "none": return ""
    if choice != "auto": return f"--extra-index-url {choice}"
    # torch is there already (Colab), a GPU is there, or PyPI's build has no CUDA in it (macOS, Windows)
    if importlib.util.find_spec("torch") or shutil.which("nvidia-smi") or sys.platform != "linux": return ""
    if reachable(CPU_INDEX): return f"--extra-index-url {CPU_INDEX}"
    print(
        f"{CPU_INDEX} cannot be reached, so torch comes from where pip usually looks; on Linux that may bring"
        " CUDA's\n"
        "libraries (several GB). To use a mirror: make TORCH_INDEX=<address of an index with CPU builds>",
        file=sys.stderr)
    return ""


if __name__ == "__main__": print(pip_options(sys.argv[1] if len(sys.argv) > 1 else "auto"))
