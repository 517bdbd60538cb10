"""Checks on a machine with a GPU that it gives what the processor gives, and measures what gradients cost there.

    python tools/gpu.py                      the checks, then the papers' networks at 512×512, with random weights
    python tools/gpu.py --checks             the checks alone, some minutes
    python tools/gpu.py --tiny --device cpu  the same lines with a small network, where there is no GPU

Writes results/gpu-<the GPU's name>.json, or what --output names.
"""
import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from dmin import load_mixture, load_pipeline, make_objective, sample_gradients
from dmin.core.compression import _kernel, Compressor
from dmin.core.gradients import PerSampleGradients
from dmin.core.runtime import machine
from dmin.measures.timing import medians, time_in_turn
from dmin.reproduction.architectures import Architecture, ARCHITECTURES

# of 9,288 samples, in GPU-hours. Source: DMin, section 4, "Time"
PAPER_HOURS = {"SD 1.4 (LoRA)": 8, "SD 3 Medium (LoRA)": 24, "SD 3 Medium (Full)": 330}
MEASURED = {   # network, and samples a batch
    "SD 1.4 (LoRA)": (ARCHITECTURES["SD 1.4 (LoRA)"], 8),
    "SD 1.4 (Full)": (replace(ARCHITECTURES["SD 1.4 (LoRA)"], lora_rank=None), 4),
    "SD 3 Medium (LoRA)": (ARCHITECTURES["SD 3 Medium (LoRA)"], 8),
    "SD 3 Medium (Full)": (ARCHITECTURES["SD 3 Medium (Full)"], 4)}
_NARROW = dict(num_layers=1, num_attention_heads=2, caption_projection_dim=128)
TINY = {
    name: (replace(a, config=a.config | _NARROW), 2) for name, (a, _) in MEASURED.items() if "SD 3" in name}


def check_compressor(device: str) -> dict[str, float]:
    """The largest relative difference from the processor's compressed vectors: 0 for whole numbers."""
    found, draw = {"whole": 0., "float32": 0.}, torch.Generator().manual_seed(0)
    for v, start, length in ((1, 0, 5), (96, 63, 7000), (4096, 2**33 + 17, 50_000), (65_536, 4095, 300_000)):
        pieces = {"whole": torch.randint(-99, 100, (3, length), generator=draw).double()}
        pieces["float32"] = torch.randn(3, length, generator=draw)
        for kind, piece in pieces.items():
            compressor = Compressor(v)
            sums = []
            for where in ("cpu", device):
                total = compressor.zeros(3, piece.dtype).to(where)
                compressor.add_(total, piece.to(where), start)
                sums.append(compressor.finish(total).cpu())
            apart = float((sums[0] - sums[1]).norm() / sums[0].norm())
            found[kind] = max(found[kind], apart)
    assert found["whole"] == 0 and found["float32"] < 1e-6, found
    return found


def check_gradients(device: str) -> dict[str, float]:
    """The largest relative difference of gradients of the shipped pipelines from the processor's."""
    found, samples, t = {}, load_mixture("mini").select(range(3)), torch.tensor([100, 700])
    for name in ("tiny-sd-lora", "tiny-sd3-lora", "tiny-sd3-full"):
        both = []
        for where in ("cpu", device):
            objective = make_objective(load_pipeline(name).to(where))
            g = sample_gradients(objective, samples, t, Compressor(1024), batch_size=4)
            both.append(g.compressed.cpu())
        found[name] = float((both[0] - both[1]).norm() / both[0].norm())
        assert found[name] < 1e-3, (name, found[name])
    return found


class Work:
    """A network of random weights, a batch of noise, and each row's squared error."""

    def __init__(self, architecture: Architecture, batch: int, device: str):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.network = architecture.build(device)
            with torch.device(device): inputs = architecture.inputs(batch)
        finally: torch.set_default_dtype(torch.float32)
        self.counted = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.inputs = {k: torch.randn_like(x) for k, x in inputs.items()}
        self.inputs["timestep"] = torch.linspace(0, 999, batch, device=device)
        self.hooks = PerSampleGradients(self.network, self.counted, Compressor(4096))

    def loss(self):
        return self.network(**self.inputs).sample.float().square().flatten(1).mean(1)

    def plain(self): torch.autograd.grad(self.loss().sum(), list(self.counted.values()))

    def collect(self):
        with self.hooks: return self.hooks(self.loss, len(self.inputs["timestep"]))


def measure(architecture: Architecture, batch: int, device: str, rounds: int) -> dict:
    """Seconds of a (sample, timestep) and the peak of memory, plainly and collected."""
    work = Work(architecture, batch, device)
    runs = {"plain": work.plain, "collect": work.collect}
    result = {"parameters": sum(p.numel() for p in work.counted.values()), "batch": batch}
    for name, run in runs.items():   # plain first: collecting keeps its buffers
        if device != "cuda": break
        torch.cuda.reset_peak_memory_stats()
        run()
        result[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
    found = medians(time_in_turn(runs, rounds))
    result |= {f"{name}_seconds": s / batch for name, s in found.items()}
    hours = result["collect_seconds"] * 9288 * architecture.timesteps / 3600
    return result | {"ratio": found["collect"] / found["plain"], "hours_9288": hours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="no measurements")
    parser.add_argument("--tiny", action="store_true", help="small networks, one round")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use here: try --tiny --device cpu")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    result = {"machine": machine(), "kernel": _kernel(torch.device(options.device)) is not None}
    result["checks"] = {
        "compressor": check_compressor(options.device), "gradients": check_gradients(options.device)}
    print(json.dumps(result, indent=1))
    for kind, (architecture, batch) in ({} if options.checks else TINY if options.tiny else MEASURED).items():
        found = measure(architecture, batch, options.device, 1 if options.tiny else 5)
        result.setdefault("measured", {})[kind] = found | {"paper_hours": PAPER_HOURS.get(kind)}
        print(kind, json.dumps(result["measured"][kind]), flush=True)
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    output = options.output or Path(__file__).parents[1] / "results" / f"gpu-{short}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(output)


if __name__ == "__main__": main()
