"""Stable Diffusion and Stable Diffusion 3: gradients against autograd, losses against plain diffusers,
several processes against one.
"""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import one_by_one, PYTHON
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from dmin import collect, load_mixture, open_store
from dmin.core.compression import NoCompression
from dmin.core.gradients import PerSampleGradients, sample_gradients
from dmin.core.registry import make_objective
from dmin.lora import add_lora, save_lora
from dmin.pipelines import generate, load_pipeline, network
from dmin.families.latent import tiny_vae, train_tokenizer
from dmin.families.stable_diffusion import tiny_sd
from dmin.families.stable_diffusion_3 import tiny_sd3
from dmin.training import finetune


@pytest.fixture(scope="session")
def mixture(): return load_mixture("mini", size=32).select(range(12))   # the size of the small models


@pytest.fixture(scope="session")
def tokenizer(mixture): return train_tokenizer(mixture["prompt"], 600)


def small(family, tokenizer, lora=False, seed=0):
    vae = tiny_vae(32, (8, 8, 8), seed=seed)
    pipe = (
        tiny_sd(tokenizer, vae, channels=(16, 32), seed=seed)
        if family == "sd"
        else tiny_sd3(tokenizer, vae, layers=2, heads=1, seed=seed))
    if lora:
        add_lora(pipe)
        torch.manual_seed(seed)
        for name, p in network(pipe).named_parameters():
            if "lora_B" in name: p.data.normal_(std=.2)   # new adapters have B = 0, and A no gradient
    return pipe


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def check_layer_by_layer(found, truth, parameters, allowed=1e-5):
    start = 0
    for name, p in parameters.items():
        part = slice(start, start + p.numel())
        scale = truth[:, part].norm().clamp(min=1e-3 * truth.norm())
        assert (found[:, part] - truth[:, part]).norm() / scale < 10 * allowed, name
        start += p.numel()
    assert relative(found, truth) < allowed


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_per_sample_gradients_equal_autograd(family, lora, tokenizer, mixture):
    objective = make_objective(small(family, tokenizer, lora))
    rows, timesteps, d = (
        mixture.select(range(3)),
        torch.tensor([20, 700]),
        sum(p.numel() for p in objective.parameters.values()))
    assert all("lora_" in name for name in objective.parameters) == lora
    found = sample_gradients(objective, rows, timesteps, NoCompression(d), batch_size=4)
    encoded, eps = objective.encode(rows[:]), objective.draw_noise(timesteps)[:, 0]
    def loss(i):
        row, k = i // 2, i % 2
        return objective.loss(
            {name: x[row : row + 1] for name, x in encoded.items()}, timesteps[k : k + 1], eps[k : k + 1]
        ).sum()
    for p in network(objective.pipe).parameters(): p.requires_grad_(False)
    for p in objective.parameters.values(): p.requires_grad_(True)
    objective.model.eval()
    check_layer_by_layer(
        found.compressed.flatten(0, 1), one_by_one(objective.parameters, loss, 6), objective.parameters)


SD3_OTHERS = {
    "SD 3.5: RMSNorm of queries and keys": dict(qk_norm="rms_norm"),
    "SD 3.5 Medium: a second attention": dict(qk_norm="rms_norm", dual_attention_layers=(0,)),
}


@pytest.mark.parametrize("name", SD3_OTHERS)
def test_other_transformers(name):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=4,
        **SD3_OTHERS[name],
    ).eval()
    x, prompt, pooled, t = (
        torch.randn(3, 4, 8, 8),
        torch.randn(3, 5, 24),
        torch.randn(3, 20),
        torch.tensor([3.0, 500.0, 900.0]))
    check_network(model, lambda i: model(x[i], prompt[i], pooled[i], t[i]).sample.square().flatten(1).mean(1))


UNET_OTHERS = {
    "Stable Diffusion 2: linear projections": dict(use_linear_projection=True, attention_head_dim=[2, 4]),
    "several layers a block": dict(transformer_layers_per_block=2, layers_per_block=2),
    "only cross attention in the blocks": dict(only_cross_attention=True),
}


@pytest.mark.parametrize("name", UNET_OTHERS)
def test_other_unets(name):
    torch.manual_seed(0)
    usual = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    model = UNet2DConditionModel(**usual | UNET_OTHERS[name]).eval()
    x, prompt, t = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 24), torch.tensor([3, 500, 900])
    check_network(model, lambda i: model(x[i], t[i], prompt[i]).sample.square().flatten(1).mean(1))


def check_network(model, loss):
    parameters = dict(model.named_parameters())
    truth = one_by_one(parameters, lambda i: loss(slice(i, i + 1)).sum(), 3)
    with PerSampleGradients(model, parameters, NoCompression(truth.shape[1])) as g:
        found, _, _ = g(lambda: loss(slice(None)), 3)
    check_layer_by_layer(found, truth, parameters)


def test_sd_loss_is_the_training_scripts(tokenizer, mixture):
    """Written out by hand: scale, noise by alphas, predict, compare with the noise."""
    pipe = small("sd", tokenizer)
    objective, rows = make_objective(pipe), mixture.select(range(2))
    with torch.no_grad():
        pixels = torch.stack(
            [
                torch.from_numpy(np.array(x.convert("RGB").resize((32, 32), 2))).permute(2, 0, 1) / 127.5 - 1
                for x in rows["image"]])
        z0 = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer(
            list(rows["prompt"]), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        alpha, eps = pipe.scheduler.alphas_cumprod[400], torch.randn(2, *objective.shape)
        out = pipe.unet(alpha.sqrt() * z0 + (1 - alpha).sqrt() * eps, 400, pipe.text_encoder(ids)[0]).sample
        losses = objective.loss(objective.encode(rows[:]), torch.tensor([400, 400]), eps)
    assert torch.allclose(losses, (out - eps).square().mean((1, 2, 3)), rtol=1e-4)


def test_batch_and_order_change_nothing(tokenizer, mixture, tmp_path):
    pipe = small("sd3", tokenizer, lora=True)
    one = sample_gradients(
        make_objective(pipe), mixture, torch.tensor([100, 800]), NoCompression(3072), batch_size=1)
    many = sample_gradients(
        make_objective(pipe), mixture, torch.tensor([100, 800]), NoCompression(3072), batch_size=24)
    turned = sample_gradients(
        make_objective(pipe),
        mixture.select(range(11, -1, -1)),
        torch.tensor([100, 800]),
        NoCompression(3072),
        batch_size=7)
    assert (
        relative(many.compressed, one.compressed) < 1e-5
        and relative(turned.compressed.flip(0), one.compressed) < 1e-5)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_seed_per_prompt(family, tokenizer):
    pipe, prompts = small(family, tokenizer), ["a rose", "a card", "a toy"]
    a, b = (generate(pipe, prompts, steps=3, batch_size=n, progress=False) for n in (1, 3))
    for x, y in zip(a["image"], b["image"]): assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1
    assert a["seed"][:] == [0, 1, 2] and a["prompt"][:] == prompts
    assert (
        generate(pipe, prompts[1:2], seed=1, steps=3, progress=False)[0]["image"].tobytes()
        == a[1]["image"].tobytes())


def test_test_prompts_keep_their_subset(tokenizer):
    test = load_mixture("mini", "test").select(range(3))
    made = generate(small("sd", tokenizer), test, steps=2, progress=False)
    assert (
        made["subset"][:] == test["subset"][:]
        and made["prompt"][:] == test["prompt"][:]
        and "origin" not in made.column_names)


def test_a_region_of_everything_is_the_whole(tokenizer, mixture, tmp_path):
    store = collect(small("sd3", tokenizer, lora=True), mixture, tmp_path, timesteps=2, v=64, progress=False)
    query = mixture.select([0])
    whole, all_of_it, corner = (
        store.influence(query, region=r).values for r in (None, (0, 0, 32, 32), (0, 0, 8, 8)))
    assert torch.allclose(whole, all_of_it, rtol=1e-4) and not torch.allclose(whole, corner, rtol=1e-2)
    mask = np.zeros((32, 32)); mask[:8, :8] = 1
    assert torch.allclose(store.influence(query, region=mask).values, corner, rtol=1e-4)
    for bad, said in [
        ((0, 0, 33, 10), "not a box"),
        (np.zeros((32, 32)), "is empty"),
        ("left", "give a box"),
        ((0.0, 0.0, 0.5, 1.0), "in pixels"),
        (np.ones((3, 3)), "expected (32, 32)"),
        ([(0, 0, 1, 1)] * 2, "2 regions for 1"),
    ]:
        with pytest.raises(ValueError) as e: store.influence(query, region=bad)
        assert said in str(e.value)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_training_moves_adapters_only(family, tokenizer, mixture):
    pipe = add_lora(small(family, tokenizer))
    before = {name: p.detach().clone() for name, p in network(pipe).named_parameters()}
    log = finetune(pipe, mixture, steps=3, batch_size=4, progress=False)
    moved = {name for name, p in network(pipe).named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved) and len(log.losses) == 3


def test_accumulating_gives_the_same_weights(tokenizer, mixture):
    def trained(**more):
        pipe = add_lora(small("sd3", tokenizer))
        finetune(pipe, mixture, steps=4, batch_size=6, ema=0, progress=False, **more)
        return torch.cat([p.detach().flatten() for n, p in network(pipe).named_parameters() if "lora_" in n])
    assert relative(trained(accumulate=3), trained()) < 1e-3


def test_bfloat16_training(tokenizer, mixture):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)
    try:
        log = finetune(
            add_lora(small("sd3", tokenizer)),
            mixture,
            steps=3,
            batch_size=4,
            progress=False,
            accelerator=Accelerator(mixed_precision="bf16"))
    finally: AcceleratorState._reset_state(True)
    assert np.isfinite(log.losses).all()


# several processes

WORK = """
import sys, torch
from dmin import collect, load_mixture, load_pipeline
rows = load_mixture("mini").select(range(20))
store = collect(load_pipeline(sys.argv[1], lora=sys.argv[2]), rows, sys.argv[3], v=256, timesteps=3, shard_size=2, progress=False)
store.check_complete()
from accelerate import PartialState
state = PartialState(cpu=not torch.cuda.is_available())
print(f"process {state.process_index} of {state.num_processes}")
"""


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    pipe = small("sd3", tokenizer, lora=True)
    save_lora(pipe, folder / "lora")
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder / "base")
    (folder / "work.py").write_text(WORK)
    return folder


def start(saved, store, processes):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else [])
    return subprocess.Popen(
        [
            PYTHON,
            *launch,
            str(saved / "work.py"),
            str(saved / "base"),
            str(saved / "lora"),
            str(store)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True)


LAUNCHER = """
import sys
def work(base, lora, folder):
    from dmin import collect, load_mixture, load_pipeline
    rows = load_mixture("mini").select(range(20))
    collect(load_pipeline(base, lora=lora), rows, folder, v=256, timesteps=3, shard_size=2, progress=False).check_complete()
    from accelerate import PartialState
    print(f"process {PartialState().process_index} of {PartialState().num_processes}", flush=True)
if __name__ == "__main__":
    import socket
    from accelerate import notebook_launcher
    with socket.socket() as free:   # 0 would be a port of its own in each process
        free.bind(("", 0))
        port = free.getsockname()[1]
    notebook_launcher(work, tuple(sys.argv[1:]), num_processes=2, use_port=str(port))
"""


def finish(process):
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:]
    return out


def bytes_of(store): return {f.name: f.read_bytes() for f in store.iterdir() if not f.name.startswith(".")}


@pytest.fixture(scope="module")
def one(saved, tmp_path_factory):
    """What one process stores: name -> bytes."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    finish(start(saved, folder, 1))
    return bytes_of(folder)


def test_two_processes_equal_one(saved, one, tmp_path):
    said = finish(start(saved, tmp_path / "two", 2))
    assert "process 0 of 2" in said and "process 1 of 2" in said
    assert one == bytes_of(tmp_path / "two") and len(one) == 13


def test_notebook_launcher(saved, one, tmp_path):
    (saved / "launcher.py").write_text(LAUNCHER)
    done = subprocess.run(
        [
            PYTHON,
            str(saved / "launcher.py"),
            str(saved / "base"),
            str(saved / "lora"),
            str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 of 2" in done.stdout and "process 1 of 2" in done.stdout
    assert one == bytes_of(tmp_path / "two")


def test_two_processes_killed_end_with_the_same_bytes(saved, one, tmp_path):
    rng = np.random.default_rng()
    for _ in range(2):
        process = start(saved, tmp_path / "two", 2)
        wanted, end = (
            len(list((tmp_path / "two").glob("shard-*"))) + int(rng.integers(0, 4)),
            time.monotonic() + 600)
        while (
            process.poll() is None
            and time.monotonic() < end
            and len(list((tmp_path / "two").glob("shard-*"))) < wanted
        ):
            time.sleep(.01)
        time.sleep(float(rng.random()) * .1)
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        process.communicate()
    finish(start(saved, tmp_path / "two", 2))
    assert one == bytes_of(tmp_path / "two")


def test_manifest_names_the_options(tokenizer, mixture, tmp_path):
    pipe = small("sd3", tokenizer, lora=True)
    collect(
        make_objective(pipe, latents="draw", latent_seed=3),
        mixture.select(range(2)),
        tmp_path,
        v=16,
        timesteps=1,
        progress=False)
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["objective"]
        == "StableDiffusion3Objective, latent_seed=3, latents='draw'")
    with pytest.raises(ValueError, match="objective is"):
        collect(pipe, mixture.select(range(2)), tmp_path, v=16, timesteps=1, progress=False)
    with pytest.raises(ValueError, match="with other options: its objective is .*latents='draw', not"):
        open_store(tmp_path, pipe)


# bad input

@pytest.mark.parametrize("change, said", [
    (dict(rename=("prompt", "text")), "no column 'prompt'"), (dict(prompt=""), "sample 1 is empty"), (dict(prompt=None), "sample 1 is None, not a string"),
    (dict(numbers=True), "sample 0 is 0, not a string")])
def test_prompts_that_are_not_there(tokenizer, mixture, tmp_path, change, said):
    rows = mixture.select(range(3)).select_columns(["image", "prompt"])
    if "rename" in change: rows = rows.rename_column(*change["rename"])
    elif "numbers" in change: rows = rows.remove_columns("prompt").add_column("prompt", [0, 1, 2])
    else:
        rows = rows.map(
            lambda x, i: {"prompt": change["prompt"] if i == 1 else x["prompt"]}, with_indices=True)
    with pytest.raises(ValueError) as e:
        collect(small("sd3", tokenizer), rows, tmp_path / "store", v=16, timesteps=1, progress=False)
    assert said in str(e.value) and not (tmp_path / "store").exists()


def test_a_long_prompt_is_cut_and_said(tokenizer, mixture, tmp_path):
    rows = mixture.select(range(2)).map(
        lambda x, i: {"prompt": "a rose " * 30 if i else "a rose"}, with_indices=True)
    with pytest.warns(
        UserWarning, match="1 of 2 prompts are longer than the 24 tokens.*of sample 1.*was cut"
    ):
        store = collect(small("sd3", tokenizer), rows, tmp_path, v=16, timesteps=1, progress=False)
    assert store.missing() == []


def test_images_of_other_sizes_are_resized_and_said_once(tokenizer, tmp_path):
    larger = load_mixture("mini").select(range(12))
    with pytest.warns(UserWarning, match="resized to 32×32") as said:
        collect(small("sd", tokenizer), larger, tmp_path, v=16, timesteps=1, shard_size=2, progress=False)
    assert len([w for w in said if "resized" in str(w.message)]) == 1


@pytest.mark.parametrize("resize", ("squash", "crop"))
def test_a_way_to_resize_that_was_chosen_is_not_told(resize, tokenizer, recwarn):
    objective = make_objective(small("sd", tokenizer), resize=resize)
    objective.encode(load_mixture("mini").select(range(2)))
    assert not [w for w in recwarn if "other sizes" in str(w.message)]


def test_prompts_to_generate_from(tokenizer):
    pipe = small("sd3", tokenizer)
    for bad, said in [
        (3, "needs prompts"),
        ("", "prompt 0 is empty"),
        (["a", " "], "prompt 1 is empty"),
        ([], "no prompts"),
        ([None], "must be strings"),
    ]:
        with pytest.raises(ValueError, match=said): generate(pipe, bad, progress=False)


def test_pipelines_that_are_not_supported(tokenizer):
    from diffusers import DiffusionPipeline
    class NobodysPipeline(DiffusionPipeline): pass
    other = NobodysPipeline()
    with pytest.raises(TypeError, match=r"StableDiffusion3Pipeline.* are\..*register_family"):
        make_objective(other)
    with pytest.raises(TypeError, match="register_family"): generate(other, "a rose")


def test_adapters_that_do_not_fit(tokenizer, tmp_path):
    save_lora(small("sd3", tokenizer, lora=True), tmp_path)
    small("sd", tokenizer).save_pretrained(tmp_path / "sd")
    with pytest.raises(
        ValueError,
        match="do not fit UNet2DConditionModel.*Load them into the pipeline that they were trained for",
    ):
        load_pipeline(tmp_path / "sd", lora=tmp_path)
    with pytest.raises(OSError, match="cannot be fetched"):
        load_pipeline(tmp_path / "sd", lora="nobody/nothing")
    assert any("lora_" in name for name in make_objective(load_pipeline_with(tokenizer, tmp_path)).parameters)


def load_pipeline_with(tokenizer, folder):
    from dmin.lora import load_lora
    return load_lora(small("sd3", tokenizer), folder)


def test_no_parameters_to_train(tokenizer, mixture):
    with pytest.raises(ValueError, match="no parameter matches"):
        finetune(small("sd3", tokenizer), mixture, steps=1, parameters="*lora*", progress=False)


@pytest.mark.parametrize("name, offline", [("sd14-lora", "tiny-sd-lora"), ("sd3-medium-lora", "tiny-sd3-lora"), ("sd3-medium-full", "tiny-sd3-full"), ("nobody/nothing", "tiny-sd3-lora")])
def test_the_hub_is_out_of_reach(name, offline):
    with pytest.raises(OSError, match=f"cannot be fetched.*{offline}"): load_pipeline(name)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_hub_repository_of_the_same_shape(family, tokenizer, mixture, tmp_path, monkeypatch):
    """The names of real models, their repositories replaced by local ones: new or published adapters, the
    recipe's image size.
    """
    import dmin.pipelines as pipelines
    small(family, tokenizer).save_pretrained(tmp_path / "hub")
    name = "sd14-lora" if family == "sd" else "sd3-medium-lora"
    save_lora(small(family, tokenizer, lora=True), tmp_path / "lora")
    monkeypatch.setattr(pipelines, "locate_pipeline", lambda name: str(tmp_path / "hub"))
    with pytest.MonkeyPatch.context() as m:
        m.setitem(
            pipelines.PIPELINES,
            name,
            __import__("dataclasses").replace(
                pipelines.PIPELINES[name], lora=None if family == "sd" else str(tmp_path / "lora")))
        if family == "sd":
            with pytest.warns(UserWarning, match="as it was published"): pipe = load_pipeline(name)
        else: pipe = load_pipeline(name)
    objective = make_objective(pipe)
    assert (
        objective.size == (512, 512)
        and all("lora_" in n for n in objective.parameters)
        and network(pipe).peft_config["default"].r == 4)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_images_are_as_large_as_a_tuned_network_says(family, tokenizer):
    pipe = small(family, tokenizer)
    network(pipe).register_to_config(sample_size=4)   # as load_pipeline does with the Hub's
    made = generate(pipe, ["a rose"], steps=1, progress=False)[0]["image"]
    assert made.size == make_objective(pipe).size == (16, 16)


def test_recipes_are_the_papers():
    from dmin.core.runtime import data_folder
    from dmin.pipelines import PIPELINES
    names = {
        "SD 1.4 (LoRA)": "sd14-lora",
        "SD 3 Medium (LoRA)": "sd3-medium-lora",
        "SD 3 Medium (Full)": "sd3-medium-full"}
    with open(data_folder() / "published" / "dmin_table7_training.csv") as f:
        published = {r["model"]: r for r in csv.DictReader(f)}
    assert published.keys() == names.keys()
    for model, row in published.items():
        r = PIPELINES[names[model]].recipe
        assert (r.lr, r.batch_size, r.epochs, r.size, r.precision) == (
            float(row["learning_rate"]),
            int(row["batch_size"]),
            int(row["epochs"]),
            int(row["image_size"]),
            row["precision"])
        assert (str(r.rank or ""), str(r.alpha or "")) == (row["lora_rank"], row["lora_alpha"]) and (
            not r.rank or " ".join(r.targets) == row["lora_target_layers"])


def test_fingerprint_knows_encoders_and_scales(tokenizer):
    pipe = small("sd3", tokenizer, lora=True)
    seen = {make_objective(pipe).fingerprint()}
    pipe.vae.decoder.conv_out.bias.data += 1
    seen.add(make_objective(pipe).fingerprint())
    pipe.text_encoder_2.text_projection.weight.data *= 2
    seen.add(make_objective(pipe).fingerprint())
    pipe.set_adapters("default", .5)
    seen.add(make_objective(pipe).fingerprint())
    assert len(seen) == 4
