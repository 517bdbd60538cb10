"""Adapters of every format that diffusers reads: all of them arrive, or none; and what pipelines refuse
before any work.
"""
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict, LoHaConfig, LoKrConfig, LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from dmin.core.compression import NoCompression
from dmin.core.gradients import flatten_like_gradient, sample_gradients
from dmin.core.images import as_samples
from dmin.core.registry import make_objective
from dmin.methods.similarity import CLIP
from dmin.lora import add_lora, load_lora, save_lora
from dmin.core.runtime import data_folder
from dmin.pipelines import generate, load_pipeline, network, PIPELINES
from dmin.families.latent import tiny_vae, train_tokenizer
from dmin.families.stable_diffusion import tiny_sd
from dmin.families.stable_diffusion_3 import tiny_sd3
from dmin.families.stable_diffusion_xl import tiny_sdxl

PROMPTS = ["a red rose", "a card", "a toy"]


@pytest.fixture(scope="session")
def words(): return train_tokenizer(PROMPTS, 600)


def small(family, words, seed=0):
    vae = tiny_vae(32, (8, 8, 8), seed=seed)
    if family == "sd": return tiny_sd(words, vae, channels=(16, 32), seed=seed)
    return tiny_sd3(words, vae, layers=2, heads=1, seed=seed)


def adapted(pipe, parts, alpha=8, seed=0):
    """New adapters, all of their weights drawn at random."""
    if "unet" in parts or "transformer" in parts: add_lora(pipe, alpha=alpha)
    for name in parts:
        if not name.startswith("text_encoder"): continue
        getattr(pipe, name).add_adapter(
            LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "out_proj"]))
    torch.manual_seed(seed)
    for name in parts:
        for key, p in getattr(pipe, name).named_parameters():
            if "lora_" in key: p.data.normal_(std=.2)
    return pipe


def kohya(pipe, alpha=8):
    """A pipeline's adapters as Kohya's scripts save them."""
    tensors = {}
    for kind, part in [("lora_unet", pipe.unet), ("lora_te_text_model", pipe.text_encoder)]:
        if not getattr(part, "peft_config", None): continue
        for key, x in get_peft_model_state_dict(part, adapter_name="default").items():
            layer, half = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
            layer = f"{kind}_{layer.removeprefix('text_model.').replace('.', '_')}"
            tensors[f"{layer}.lora_{'down' if half == 'A' else 'up'}.weight"] = (
                x.detach().clone().contiguous())
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


def state(pipe):
    """Everything that a refused load must leave alone."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": (p.detach().clone(), p.requires_grad)
            for name, part in parts.items() for key, p in part.named_parameters()}


def unchanged(pipe, before):
    after = state(pipe)
    assert list(after) == list(before)
    for key, (x, learns) in before.items():
        assert torch.equal(after[key][0], x) and after[key][1] == learns, key
    for name in pipe._lora_loadable_modules: assert not getattr(getattr(pipe, name), "peft_config", None)


def adapters(pipe):
    return {f"{name}.{key}": p.detach() for name in pipe._lora_loadable_modules
            for key, p in getattr(pipe, name).named_parameters() if "lora_" in key}


def image(pipe): return np.asarray(generate(pipe, "a red rose", steps=2, progress=False)["image"][0])


SD_PARTS = [("unet",), ("unet", "text_encoder"), ("text_encoder",)]


@pytest.mark.parametrize("parts", SD_PARTS, ids="+".join)
def test_kohya_files_load(parts, words, tmp_path):
    made = adapted(small("sd", words), parts)
    save_file(kohya(made), tmp_path / "kohya.safetensors")
    for where in (tmp_path / "kohya.safetensors", tmp_path):
        pipe = load_lora(small("sd", words), where)
        wanted, found = adapters(made), adapters(pipe)
        assert wanted.keys() == found.keys() and len(found) >= 4
        for key in wanted: assert torch.equal(wanted[key], found[key]), key
        assert np.array_equal(image(pipe), image(made)) and not np.array_equal(
            image(pipe), image(small("sd", words)))


def test_kohya_alpha_counts(words, tmp_path):
    made = adapted(small("sd", words), ("unet",), alpha=2)
    save_file(kohya(made, alpha=2), tmp_path / "kohya.safetensors")
    scales = {
        m.scaling["default"]
        for m in load_lora(small("sd", words), tmp_path).unet.modules()
        if hasattr(m, "scaling")}
    assert scales == {.5}   # alpha / rank


def test_adapters_without_an_alpha_are_told(tmp_path, monkeypatch):
    """A file of the Hub may hold none: then they act at another strength than they were trained at."""
    source = PIPELINES["tiny-sd3-lora"]
    weights = load_file(data_folder() / source.lora / "pytorch_lora_weights.safetensors")
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")   # without its metadata
    monkeypatch.setitem(PIPELINES, "tiny-sd3-lora", replace(source, lora=str(tmp_path)))
    with pytest.warns(UserWarning, match="with alpha 4, .* its recipe says 8"): load_pipeline("tiny-sd3-lora")


@pytest.mark.parametrize("family, parts", [("sd", p) for p in SD_PARTS] + [
    ("sd3", ("transformer",)), ("sd3", ("transformer", "text_encoder", "text_encoder_2")), ("sd3", ("text_encoder_2",))])
def test_saved_adapters_come_back(family, parts, words, tmp_path):
    made = adapted(small(family, words), parts)
    save_lora(made, tmp_path / "lora")
    pipe = load_lora(small(family, words), tmp_path / "lora")
    wanted, found = adapters(made), adapters(pipe)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert np.array_equal(image(pipe), image(made))


def spoiled(tensors, how):
    first = next(key for key in tensors if "lora_down" in key)
    if how == "a layer that is not there":
        for key in [k for k in tensors if k.startswith(first.split(".")[0])]:
            tensors[re.sub(r"_blocks_\d", "_blocks_7", key, count=1)] = tensors.pop(key)
    if how == "another shape": tensors[first] = torch.zeros(4, tensors[first].shape[1] + 1)
    if how == "another text encoder":
        tensors |= {
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 64),
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(64, 4)}
    return tensors


@pytest.mark.parametrize("how, said", [
    ("a layer that is not there", "_blocks.7"), ("another shape", "size mismatch|shape"), ("another text encoder", "2 of their .*text_encoder_2")])
@pytest.mark.parametrize("parts", SD_PARTS[:2], ids="+".join)
def test_what_does_not_fit_changes_nothing(parts, how, said, words, tmp_path):
    save_file(spoiled(kohya(adapted(small("sd", words), parts)), how), tmp_path / "kohya.safetensors")
    pipe = small("sd", words)
    pipe.unet.conv_in.requires_grad_(False)
    before, made = state(pipe), image(pipe)
    with pytest.raises(
        ValueError, match=f"do not fit UNet2DConditionModel(?s:.*)({said})(?s:.*)that they were trained for"
    ):
        load_lora(pipe, tmp_path)
    unchanged(pipe, before)
    assert np.array_equal(image(pipe), made)
    save_lora(adapted(small("sd", words), parts), tmp_path / "good")
    assert adapters(load_lora(pipe, tmp_path / "good"))   # it can still take others


@pytest.mark.parametrize("family, part", [("sd", "text_encoder"), ("sd3", "text_encoder_2"), ("sd3", "transformer")])
def test_half_of_a_pair_is_refused(family, part, words, tmp_path):
    save_lora(
        adapted(
            small(family, words),
            ("unet" if family == "sd" else "transformer", "text_encoder")
            + (part,) * (part == "text_encoder_2")),
        tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    del tensors[
        next(key for key in tensors if key.startswith(part + ".") and ("lora_A" in key or ".down." in key))]
    save_file(tensors, file)
    pipe = small(family, words)
    before = state(pipe)
    with pytest.raises(ValueError, match="do not fit"): load_lora(pipe, tmp_path)
    unchanged(pipe, before)


def test_one_text_encoder_layer_too_many(words, tmp_path):
    """diffusers drops it without a word."""
    save_lora(adapted(small("sd", words), ("unet", "text_encoder")), tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    for key in [k for k in tensors if k.startswith("text_encoder.") and "layers.0." in k]:
        tensors[key.replace("layers.0.", "layers.9.")] = tensors[key].clone()
    save_file(tensors, file)
    pipe = small("sd", words)
    before = state(pipe)
    with pytest.raises(ValueError, match=r"text_encoder.*layers\.9\."): load_lora(pipe, tmp_path)
    unchanged(pipe, before)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_adapters_that_are_no_safetensors_are_not_read(family, as_file, words, tmp_path, monkeypatch):
    made = adapted(small(family, words), ("unet" if family == "sd" else "transformer",))
    save_lora(made, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    file = tmp_path / "pytorch_lora_weights.bin"
    torch.save(tensors, file)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    pipe = small(family, words)
    before = state(pipe)
    with pytest.raises(OSError, match="only safetensors are read"):
        load_lora(pipe, file if as_file else tmp_path)
    unchanged(pipe, before)


def test_clip_that_is_no_safetensors_is_not_read(tmp_path, monkeypatch):
    from dmin.core.runtime import data_folder
    from transformers import CLIPImageProcessor, CLIPModel
    clip = CLIPModel.from_pretrained(data_folder() / "tiny" / "clip")
    clip.config.save_pretrained(tmp_path)
    CLIPImageProcessor.from_pretrained(data_folder() / "tiny" / "clip").save_pretrained(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    from dmin.reproduction.image_sets import load_images
    with pytest.raises(OSError, match="safetensors"):
        CLIP(load_images("clipart_10").select(range(2)), model=tmp_path)


@pytest.mark.parametrize("first", [("unet",), ("text_encoder",)])
def test_adapters_on_adapters(first, words, tmp_path):
    save_lora(adapted(small("sd", words), ("unet", "text_encoder")), tmp_path)
    pipe = adapted(small("sd", words), first, seed=1)
    before = {key: x.clone() for key, x in adapters(pipe).items()}
    with pytest.raises(ValueError, match=r"has adapters already.*pipe\.unload_lora_weights\(\)"):
        load_lora(pipe, tmp_path)
    assert all(torch.equal(before[key], x) for key, x in adapters(pipe).items())
    pipe.unload_lora_weights()
    assert adapters(load_lora(pipe, tmp_path))


def test_a_full_disk_leaves_the_adapters_that_were_there(words, tmp_path, monkeypatch):
    old, new = (adapted(small("sd", words), ("unet",), seed=seed) for seed in (0, 1))
    save_lora(old, tmp_path / "lora")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    def full(*args, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", full)
    for folder in ("lora", "other"):
        with pytest.raises(OSError, match="could not write .*No space left on device.*make room"):
            save_lora(new, tmp_path / folder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


# --- bad input ---

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", torch.float16, None])
def test_dtypes(dtype):
    wanted = torch.float32 if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert load_pipeline("ddpm-mnist", "cpu", dtype=dtype).unet.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "half-ish", torch.float64, 16, "torch.float16"])
def test_dtypes_that_are_none(dtype):
    with pytest.raises(ValueError, match=re.escape(f"dtype={dtype!r}") + ".*float32, float16, bfloat16"):
        load_pipeline("ddpm-mnist", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "CUDA:x", [], 1.5])
def test_devices_that_are_none(device, monkeypatch):
    monkeypatch.setattr(
        "dmin.pipelines._from_pretrained", lambda *a, **k: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match=re.escape(f"device={device!r}") + ".*'cpu', 'cuda' or 'cuda:1'"):
        load_pipeline("ddpm-mnist", device)


@pytest.mark.parametrize("bad, said", [
    (dict(steps=2.5), "steps=2.5"), (dict(steps=0), "steps=0"), (dict(steps=1001), "choose 1 to 1000"), (dict(steps=True), "steps=True"),
    (dict(batch_size=0), "batch_size=0"), (dict(batch_size=1.5), "batch_size=1.5"), (dict(seed=-1), "seed=-1"),
    (dict(seed=2**64), f"seed={2**64}"), (dict(seed=.5), "seed=0.5"), (dict(seed=2**63 - 2), "the last of 3 images"),
    (dict(prompts_or_n=2.), "prompts_or_n=2.0"), (dict(prompts_or_n=True), "prompts_or_n=True"), (dict(prompts_or_n=0), "prompts_or_n=0"),
    (dict(prompts_or_n=torch.tensor(2.)), "prompts_or_n=")])
def test_generate_refuses(bad, said, monkeypatch):
    pipe = make_pipeline()
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *a, **k: pytest.fail("computed before the check"))
    with pytest.raises(ValueError, match=re.escape(said)):
        generate(pipe, **dict(prompts_or_n=3, progress=False) | bad)


def test_generate_takes_other_integers():
    pipe, kinds = make_pipeline(), (int, np.int64, torch.tensor)
    made = [generate(pipe, k(2), steps=k(2), batch_size=k(1), seed=k(5), progress=False) for k in kinds]
    assert all(
        m["seed"][:] == [5, 6] and m[0]["image"].tobytes() == made[0][0]["image"].tobytes() for m in made)
    assert len(generate(pipe, 1, seed=2**63 - 1, steps=1, progress=False)) == 1


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("size", [(8,), (32, 32, 32), ()])
def test_sizes_that_are_none(family, size, words, monkeypatch):
    pipe = small(family, words)
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: pytest.fail("computed before the check"))
    with pytest.raises(ValueError): generate(pipe, "a red rose", size=size, steps=1, progress=False)


@pytest.mark.parametrize("bad", [None, 3, 2., np.int64(3), torch.tensor(3), ["a", 3], []])
def test_prompts_that_are_none(bad, words):
    with pytest.raises(ValueError, match="prompt"): generate(small("sd", words), bad, progress=False)


@pytest.mark.parametrize("bad", [dict(rank=0), dict(rank=1.5), dict(alpha=0), dict(alpha=float("nan")), dict(alpha="8"),
                                 dict(seed=-1), dict(seed=2**64), dict(seed=.5)])
def test_adapters_that_are_none(bad, words):
    pipe = small("sd", words)
    before = state(pipe)
    with pytest.raises(ValueError, match=next(iter(bad)) + "="): add_lora(pipe, **bad)
    unchanged(pipe, before)


def test_adapters_take_other_numbers(words):
    pipe = add_lora(small("sd", words), rank=np.int64(2), alpha=1.5, seed=torch.tensor(1))
    assert {m.scaling["default"] for m in network(pipe).modules() if hasattr(m, "scaling")} == {.75}


def as_stability_names(tensors):
    """Kohya's tensors of a tiny SDXL under the names of Stability's own code, as its scripts save them."""
    blocks = {"down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_attentions_0": "middle_block_1",
              "up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1"}
    renamed = {}
    for key, x in tensors.items():
        for ours, theirs in blocks.items(): key = key.replace(ours, theirs)
        renamed[key] = x
    assert not any("attentions" in key for key in renamed)
    return renamed


@pytest.mark.parametrize("stability", (False, True))
def test_kohya_files_of_sdxl_load(stability, tmp_path):
    """Under either set of names, all of them arrive, scaled by their alpha."""
    pipe = adapted(tiny_sdxl(), ["unet"])
    tensors = {key: x for key, x in kohya_unet(pipe, alpha=2).items()}
    save_file(as_stability_names(tensors) if stability else tensors, tmp_path / "x.safetensors")
    loaded = load_lora(tiny_sdxl(), tmp_path / "x.safetensors")
    ours, theirs = (get_peft_model_state_dict(x.unet, adapter_name="default") for x in (pipe, loaded))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items())
    assert {layer.scaling["default"] for layer in loaded.unet.modules() if hasattr(layer, "scaling")} == {.5}


def kohya_unet(pipe, alpha):
    """The adapters of a pipeline's U-Net alone, as Kohya's scripts save them."""
    tensors = {}
    for key, x in get_peft_model_state_dict(pipe.unet, adapter_name="default").items():
        layer, half = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
        layer = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{layer}.lora_{'down' if half == 'A' else 'up'}.weight"] = x.detach().clone().contiguous()
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


LAYERS, CONVOLUTIONS = ["to_k", "to_q", "to_v", "to_out.0"], ["conv1", "conv2"]
KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS),
    "LoRA of convolutions": LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS + CONVOLUTIONS),
    "DoRA": LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS + CONVOLUTIONS, use_dora=True),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, use_rslora=True),
    "LoHa": LoHaConfig(r=4, alpha=8, target_modules=LAYERS + CONVOLUTIONS),
    "LoKr": LoKrConfig(r=4, alpha=8, target_modules=LAYERS + CONVOLUTIONS)}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind_of_adapter(kind, words):
    """Only the adapters count, and each sample's gradient is autograd's, in float64."""
    pipe = small("sd", words)
    pipe.unet.add_adapter(KINDS[kind])
    torch.manual_seed(0)
    for name, p in pipe.unet.named_parameters():
        if any(part in name for part in ("lora_B", "hada_", "lokr_")): p.data.normal_(std=.1)
    objective = make_objective(pipe)
    tuned = {name for name, p in pipe.unet.named_parameters() if re.search("lora_|hada_|lokr_", name)}
    assert set(objective.parameters) == tuned
    pipe.unet.double()
    rng = np.random.default_rng(0)
    rows = as_samples([{"image": Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), "prompt": x}
                       for x in PROMPTS])
    parameters, t = list(objective.parameters.values()), torch.tensor([400])
    found = sample_gradients(objective, rows, t, NoCompression(sum(p.numel() for p in parameters)), verify=True)
    encoded, noise = objective.encode(rows[:]), objective.draw_noise([400])[:, 0]
    for i in range(3):
        loss = objective.loss({name: x[i:i + 1] for name, x in encoded.items()}, t, noise).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        exact = torch.cat([flatten_like_gradient(g).flatten() for g in gradients])
        assert (found.compressed[i, 0] - exact).norm() < 1e-5 * exact.norm()
