"""Every family that announces itself: its tiny pipeline is collected, sampled and asked, with autograd's gradients."""
import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Dataset

from dmin import collect, finetune, generate, make_objective, register_objective
from dmin.core.compression import NoCompression
from dmin.core.gradients import flatten_like_gradient, sample_gradients
from dmin.core.images import as_samples
from dmin.core.objective import network, Objective
from dmin.core.registry import FAMILIES, pipeline_family
from dmin.families.own_model import ModelObjective
from dmin.lora import add_lora, load_lora, save_lora

FAMILY_NAMES = (
    "DDPMPipeline", "LDMPipeline", "DiTPipeline", "StableDiffusionPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "Flux2KleinPipeline", "SanaPipeline", "ZImagePipeline", "QwenImagePipeline", "PixArtAlphaPipeline",
    "PixArtSigmaPipeline")
CONDITIONS = {"prompt": ["a rose", "a card", "a cup"], "label": [0, 3, 5]}


def found(name):
    """A family by its pipeline's name, once all of them are found."""
    with pytest.raises(TypeError): pipeline_family(object())
    return FAMILIES[name]


@pytest.fixture(params=FAMILY_NAMES)
def family(request): return found(request.param)


@pytest.fixture
def pipe(family): return family.tiny()


@pytest.fixture
def rows(family, pipe):
    """Three images of random pixels, of the size and mode that the pipeline wants."""
    objective, rng = make_objective(pipe), np.random.default_rng(0)
    height, width = getattr(objective, "size", objective.shape[1:])
    shape = (height, width) if objective.shape[0] == 1 else (height, width, 3)
    columns = {"image": [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(3)]}
    if family.condition: columns[family.condition] = CONDITIONS[family.condition]
    return as_samples([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


@pytest.mark.parametrize("adapters", (False, True))
def test_gradients_are_autograds(pipe, rows, adapters):
    """Of all parameters, and of adapters that have moved away from where they change nothing."""
    if adapters:
        for name, p in network(add_lora(pipe)).named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(p, std=.1)
    objective, t = make_objective(pipe), torch.tensor([400])
    parameters = list(objective.parameters.values())
    engine = sample_gradients(objective, rows, t, NoCompression(sum(p.numel() for p in parameters)))
    encoded = objective.encode(rows[:])
    noise = objective.draw_noise([400])[:, 0]
    for i in range(3):
        loss = objective.loss({name: x[i:i + 1] for name, x in encoded.items()}, t, noise).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        exact = torch.cat([flatten_like_gradient(g).flatten() for g in gradients])
        assert (engine.compressed[i, 0] - exact).norm() < 1e-5 * exact.norm()


def test_adapters_come_back(family, pipe, tmp_path):
    """Saved as diffusers saves them, or peft, and loaded into another pipeline, they are the same model."""
    for name, p in network(add_lora(pipe)).named_parameters():
        if "lora_" in name: torch.nn.init.normal_(p, std=.1)
    save_lora(pipe, tmp_path / "lora")
    again = load_lora(family.tiny(), tmp_path / "lora")
    assert make_objective(again).fingerprint() == make_objective(pipe).fingerprint()


def test_tuned_by_finetune(pipe, rows):
    """Every family is trained by its own loss, of its adapters alone."""
    add_lora(pipe)
    before = {name: p.detach().clone() for name, p in network(pipe).named_parameters()}
    log = finetune(pipe, rows, steps=4, batch_size=3, lr=1e-3, progress=False)
    assert np.isfinite(log.losses).all()
    moved = {name for name, p in network(pipe).named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(make_objective(pipe).parameters)


def test_collected_sampled_and_asked(family, pipe, rows, tmp_path):
    store = collect(pipe, rows, tmp_path, v=2**12, timesteps=2, progress=False)
    assert store.influence(rows[1]).top(1).rows.item() == 1
    images = generate(pipe, CONDITIONS[family.condition][:1] if family.condition else 1, steps=2, progress=False)
    assert store.influence(images).values.isfinite().all()


def test_an_objective_alone():
    """A loss may be announced for pipelines whose images are made elsewhere."""
    @register_objective("NobodysPipeline")
    class NobodysObjective(Objective): pass
    try: assert FAMILIES["NobodysPipeline"].objective is NobodysObjective and FAMILIES["NobodysPipeline"].sample is None
    finally: del FAMILIES["NobodysPipeline"]


def test_image_to_image_pipelines_are_their_base():
    """The same gradients, and the same images from prompts."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
    pairs = (("StableDiffusionPipeline", StableDiffusionImg2ImgPipeline, dict(requires_safety_checker=False)),
             ("StableDiffusionXLPipeline", StableDiffusionXLImg2ImgPipeline, dict(add_watermarker=False)))
    for name, kind, options in pairs:
        base = found(name).tiny()
        other = kind(**base.components, **options)
        assert make_objective(base).fingerprint() == make_objective(other).fingerprint()
        one, two = (generate(p, "a rose", steps=2, progress=False)["image"][0] for p in (base, other))
        assert np.array_equal(one, two)


def test_a_refiner_is_told_a_score():
    from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
    parts = found("StableDiffusionXLPipeline").tiny().components
    unet = UNet2DConditionModel.from_config(
        parts["unet"].config, projection_class_embeddings_input_dim=64 + 5 * 8, cross_attention_dim=64)
    parts |= dict(unet=unet, text_encoder=None, tokenizer=None)
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    rows = {"image": [Image.new("RGB", (80, 64))] * 2, "prompt": ["a rose", "a card"]}
    objective = make_objective(pipe, aesthetic_score=2.5)
    with pytest.warns(UserWarning, match="80×64 pixels, are resized to 64×64"): encoded = objective.encode(rows)
    assert encoded["time_ids"].tolist() == [[64, 80, 0, 0, 2.5]] * 2
    assert objective.loss(encoded, torch.tensor([9, 9]), torch.randn(2, *objective.shape)).isfinite().all()
    with pytest.raises(ValueError, match="only a refiner"):
        make_objective(found("StableDiffusionXLPipeline").tiny(), aesthetic_score=2.5)


def test_a_flows_shift():
    """By resolution it is the sampler's own; a number takes the place of the scheduler's."""
    pipe = found("FluxPipeline").tiny()
    scheduler, tokens = pipe.scheduler, 4 * 4
    line = (scheduler.config.max_shift - scheduler.config.base_shift) / (4096 - 256)
    mu = scheduler.config.base_shift + line * (tokens - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1, .1, 10), mu=mu)
    levels = make_objective(pipe, shift="resolution").schedule.noise
    assert torch.allclose(levels[99::100].flip(0), scheduler.sigmas[:-1], atol=1e-5)
    plain, three = make_objective(pipe), make_objective(pipe, shift=3)
    assert torch.allclose(plain.schedule.noise[499], torch.tensor(.5))
    assert torch.allclose(three.schedule.noise[499], torch.tensor(.75))
    assert len({x.fingerprint() for x in (plain, three, make_objective(pipe, shift="resolution"))}) == 3
    with pytest.raises(ValueError, match="shift=0"): make_objective(pipe, shift=0)


def test_another_network_is_refused_by_name():
    pipe, other = found("StableDiffusionPipeline").tiny(), found("DDPMPipeline").tiny()
    pipe.unet = other.unet
    with pytest.raises(TypeError, match="UNet2DModel, and the loss is of a UNet2DConditionModel"):
        make_objective(pipe)


def test_a_network_on_two_devices_is_refused():
    pipe = found("StableDiffusionPipeline").tiny()
    pipe.unet.conv_out.to("meta")
    with pytest.raises(ValueError, match="are on cpu and meta"): make_objective(pipe)


def test_an_offloaded_network_is_refused():
    """Its encoders may be."""
    from accelerate import cpu_offload_with_hook
    pipe = found("StableDiffusionPipeline").tiny()
    cpu_offload_with_hook(pipe.text_encoder, execution_device="cpu")
    make_objective(pipe).encode({"image": [Image.new("RGB", (64, 64))], "prompt": ["a rose"]})
    cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    with pytest.raises(ValueError, match="UNet2DConditionModel are offloaded .*remove_all_hooks"): make_objective(pipe)
    pipe.remove_all_hooks()
    make_objective(pipe)


@pytest.mark.parametrize("what", ["text_encoder", "vae"])
def test_an_encoder_that_is_offloaded_layer_by_layer_is_named(what, tmp_path):
    from accelerate import cpu_offload
    pipe = found("StableDiffusionPipeline").tiny()
    rows = Dataset.from_dict({"image": [Image.new("RGB", (64, 64))], "prompt": ["a rose"]})
    cpu_offload(getattr(pipe, what), execution_device="cpu")
    kind = type(getattr(pipe, what)).__name__
    with pytest.raises(ValueError, match=f"of {kind} is not in memory.*remove_all_hooks"):
        collect(pipe, rows, tmp_path / "s", v=16, timesteps=1, progress=False)
    assert not (tmp_path / "s").exists()
    pipe.remove_all_hooks()
    collect(pipe, rows, tmp_path / "s", v=16, timesteps=1, progress=False).check_complete()


class Clips(ModelObjective):
    """Noise is predicted in clips of four frames, drawn from the images' first number."""
    shape = (2, 4, 6, 6)
    def encode(self, samples, names=None):
        return {"z0": torch.stack([torch.full(self.shape, image.getpixel((0, 0)) / 255) for image in samples["image"]])}
    def predict(self, encoded, t, eps):
        level = (t / 1000).view(-1, 1, 1, 1, 1)
        return self.model(encoded["z0"] * (1 - level) + eps * level), eps


def test_three_spatial_dimensions(tmp_path):
    """Clips are attributed with autograd's gradients: a family of videos needs nothing of the engine."""
    layers = torch.nn.Conv3d(2, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()
    model = torch.nn.Sequential(*layers, torch.nn.Conv3d(8, 2, (3, 1, 3), padding=(1, 0, 1), groups=2))
    objective, t = Clips(model), torch.tensor([300])
    rows = as_samples([Image.new("L", (6, 6), value) for value in (10, 100, 250)])
    every = NoCompression(sum(p.numel() for p in model.parameters()))
    engine = sample_gradients(objective, rows, t, every).compressed
    encoded, noise = objective.encode(rows[:]), objective.draw_noise([300])[:, 0]
    for i in range(3):
        loss = objective.loss({"z0": encoded["z0"][i:i + 1]}, t, noise).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        exact = torch.cat([flatten_like_gradient(g).flatten() for g in gradients])
        assert (engine[i, 0] - exact).norm() < 1e-5 * exact.norm()
    store = collect(objective, rows, tmp_path, v=256, timesteps=3, progress=False)
    assert store.influence(rows[1]).top(1).rows.item() == 1


def test_images_smaller_than_a_token_are_refused(tmp_path):
    pipe = found("FluxPipeline").tiny()
    rows = as_samples([{"image": Image.new("RGB", (32, 7)), "prompt": "a rose"}])
    with pytest.raises(ValueError, match="32×7 pixels, and the network sees squares of 8"):
        collect(pipe, rows, tmp_path, progress=False)


def test_a_network_that_peft_has_wrapped():
    """As the training scripts of PixArt make it: the same gradients as with adapters put in."""
    from peft import get_peft_model, LoraConfig
    inside, wrapped = (found("PixArtSigmaPipeline").tiny() for _ in range(2))
    add_lora(inside)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    wrapped.transformer = get_peft_model(wrapped.transformer, config)
    with torch.no_grad():
        for p, q in zip(*(make_objective(pipe).parameters.values() for pipe in (inside, wrapped)), strict=True):
            torch.nn.init.normal_(p, std=.1), q.copy_(p)
    gradients = []
    for objective in map(make_objective, (inside, wrapped)):
        rows = as_samples([{"image": Image.new("RGB", objective.size[::-1], "red"), "prompt": "a rose"}])
        every = NoCompression(sum(p.numel() for p in objective.parameters.values()))
        gradients.append(sample_gradients(objective, rows, torch.tensor([400]), every).compressed)
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_folders_that_peft_wrote_load_into_any_pipeline(tmp_path):
    """`PeftModel.save_pretrained` of a U-Net alone, as peft's own examples write it."""
    from peft import get_peft_model, LoraConfig
    pipe, other = (found("StableDiffusionPipeline").tiny() for _ in range(2))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    wrapped = get_peft_model(pipe.unet, config)
    wrapped.save_pretrained(tmp_path)
    load_lora(other, tmp_path)
    mine = dict(other.unet.named_parameters())
    assert list(make_objective(other).parameters) and all(
        torch.equal(p, mine[name.removeprefix("base_model.model.")]) for name, p in wrapped.named_parameters())
    before = found("DiTPipeline").tiny()
    with pytest.raises(ValueError, match="do not fit DiTTransformer2DModel: .* have no place"):
        load_lora(before, tmp_path)
    assert not any("lora" in name for name, _ in network(before).named_parameters())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors"): load_lora(before, tmp_path)
