"""A store whose model changed while it was open, and adapters in precisions and wrappers that people use."""
import pytest
import torch
from PIL import Image

from dmin import add_lora, collect, finetune, generate, load_images, load_lora, make_objective, open_store, save_lora
from dmin.core.images import as_samples
from dmin.core.objective import network
from dmin.core.registry import FAMILIES, pipeline_family
from dmin.families.ddpm import tiny_ddpm
from dmin.families.own_model import ModelObjective
from dmin.methods.trak import own_gradients, TRAK


def tiny(name):
    with pytest.raises(TypeError): pipeline_family(object())   # which finds all families
    return FAMILIES[name].tiny()


@pytest.fixture
def digits(): return load_images("mnist_5k", size=8).select(range(6))


def trained(pipe, digits): finetune(pipe, digits, steps=1, batch_size=2, progress=False)


def edited(pipe, digits): next(network(pipe).parameters()).data.add_(1)


@pytest.mark.parametrize("change", (trained, edited))
def test_a_changed_model_is_refused_by_its_open_store(change, digits, tmp_path):
    """Also for queries that were asked before, and for new samples; another store is collected as ever."""
    pipe = tiny_ddpm(8, channels=(16, 16))
    store = collect(pipe, digits.select(range(4)), tmp_path / "a", timesteps=2, progress=False)
    store.influence(digits)
    change(pipe, digits)
    for ask in (lambda: store.influence(digits), lambda: store.gradients(digits[0]), lambda: store.add(digits),
                lambda: TRAK(store)):
        with pytest.raises(ValueError, match="model has changed since the store in .*a was collected"): ask()
    assert len(store) == 4
    collect(pipe, digits, tmp_path / "b", timesteps=2, progress=False).influence(digits)


def test_dampings_are_chosen_by_gradients_of_what_the_store_has_now(digits, tmp_path):
    store = collect(tiny_ddpm(8, channels=(16, 16)), digits.select(range(4)), tmp_path, timesteps=2, progress=False)
    rows, first = own_gradients(store)
    assert own_gradients(store)[1] is first and len(rows) == 4
    store.add(digits, duplicates="skip")
    rows, again = own_gradients(store)
    assert len(rows) == len(again.compressed) == 6 and own_gradients(store, 3)[0].tolist() == [0, 2, 5]


def test_the_same_image_with_another_label_is_another_question(tmp_path):
    """Of several that were asked in turn, and are kept."""
    images = [Image.effect_noise((64, 64), 60 + i).convert("RGB") for i in range(3)]
    rows = as_samples([{"image": image, "label": 1} for image in images])
    store = collect(tiny("DiTPipeline"), rows, tmp_path, v=64, timesteps=2, progress=False)
    asked = [{"image": images[i], "label": label} for i, label in ((0, 0), (1, 0), (0, 1), (0, 0))]
    first, _, other, again = (store.gradients(row).compressed for row in asked)
    store.forget_queries()
    assert again is first and torch.equal(other, store.gradients(asked[2]).compressed)
    assert not torch.allclose(other, first)


def test_a_model_that_was_only_looked_at_is_the_same(digits, tmp_path):
    pipe = tiny_ddpm(8, channels=(16, 16))
    store = collect(pipe, digits, tmp_path, timesteps=2, progress=False)
    pipe.unet.train(), pipe.unet.requires_grad_(False)
    before = store.influence(digits).values
    again = open_store(tmp_path, pipe, digits).influence(digits).values
    assert torch.allclose(before, again, atol=1e-5)


@pytest.mark.parametrize("name", ("StableDiffusionPipeline", "FluxPipeline", "DiTPipeline"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_adapters_in_float32_on_a_base_in_half_precision(name, dtype, tmp_path):
    """As large models are tuned; the check against autograd allows for the base's rounding."""
    pipe = add_lora(tiny(name).to(dtype))
    assert {p.dtype for p in make_objective(pipe).parameters.values()} == {torch.float32}
    size, column = make_objective(pipe).size, "label" if name == "DiTPipeline" else "prompt"
    rows = [{"image": Image.effect_noise(size, 60 + i).convert("RGB"), column: 1 if column == "label" else "a cup"}
            for i in range(3)]
    store = collect(pipe, as_samples(rows), tmp_path, v=256, timesteps=2, progress=False)
    assert store.influence(rows[1]).values.isfinite().all()


@pytest.mark.parametrize("name", ("PixArtSigmaPipeline", "StableDiffusionPipeline"))
def test_a_wrapped_network_is_saved_loaded_and_recognised(name, tmp_path):
    """What `get_peft_model` made is the same model as one with the saved adapters put in."""
    from peft import get_peft_model, LoraConfig
    pipe, place = tiny(name), "unet" if name == "StableDiffusionPipeline" else "transformer"
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    setattr(pipe, place, get_peft_model(getattr(pipe, place), config))
    save_lora(pipe, tmp_path)
    assert make_objective(load_lora(tiny(name), tmp_path)).fingerprint() == make_objective(pipe).fingerprint()


def test_layers_trained_beside_adapters_count(tmp_path):
    """peft's `modules_to_save`, saved by peft and loaded again."""
    from peft import get_peft_model, LoraConfig
    pipe = tiny("DiTPipeline")
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["proj_out_2"])
    wrapped = pipe.transformer = get_peft_model(pipe.transformer, config)
    torch.nn.init.normal_(wrapped.base_model.model.proj_out_2.modules_to_save.default.weight)
    names = list(make_objective(pipe).parameters)
    assert any("proj_out_2.modules_to_save.default" in name for name in names) and any("lora_A" in n for n in names)
    wrapped.save_pretrained(tmp_path)
    loaded = make_objective(load_lora(tiny("DiTPipeline"), tmp_path))
    assert loaded.fingerprint() == make_objective(pipe).fingerprint()


class Denoiser(ModelObjective):
    shape = (1, 8, 8)
    def encode(self, samples, names=None): return {"z0": torch.rand(len(samples["image"]), *self.shape)}
    def predict(self, encoded, t, eps): return self.model(encoded["z0"] + eps), eps


def test_forms_of_an_own_model(digits, tmp_path):
    class Flat(Denoiser):
        def predict(self, encoded, t, eps): return self.model(encoded["z0"] + eps), eps[:, 0]
    class Fixed(Denoiser):
        def encode(self, samples, names=None): return {"z0": torch.rand(len(samples["image"]), 1, 8, 8)}
    class Wrong(Fixed): shape = (1, 9, 9)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match=r"gave \(2, 1, 8, 8\), and a target of \(2, 8, 8\)"):
        collect(Flat(net), digits, tmp_path, v=16, progress=False)
    with pytest.raises(ValueError, match=r"`shape` \(1, 9, 9\): is that the shape of one"):
        collect(Wrong(net), digits, tmp_path, v=16, progress=False)
    with pytest.raises(TypeError, match="no option prameters"): Denoiser(net, prameters="*")
    before = net.train()[1].running_mean.clone()
    Denoiser(net).check(digits)
    assert torch.equal(net[1].running_mean, before) and net.training


def test_an_option_that_finetune_does_not_have(digits):
    pipe = tiny_ddpm(8, channels=(16, 16))
    with pytest.raises(TypeError, match="no option lrr: it takes .*make_objective"):
        finetune(pipe, digits, steps=1, lrr=1, progress=False)


@pytest.mark.parametrize("option", ("guidence_scale", "height"))
def test_options_that_a_pipeline_does_not_have(option):
    with pytest.raises(TypeError, match=f"no option {option}: it takes .*guidance_scale.*size"):
        generate(tiny("StableDiffusionPipeline"), "a rose", **{option: 3}, progress=False)


def test_sizes_reach_samplers_that_pass_options_on():
    drawn = generate(tiny("SanaPipeline"), "a rose", steps=1, size=64, negative_prompt="a cup", progress=False)
    assert drawn[0]["image"].size == (64, 64)


def test_samples_that_are_none(digits):
    with pytest.raises(TypeError, match=r"dataset.select\(range\(2\)\)"): as_samples(digits[:2])
    with pytest.raises(TypeError, match="found str 'pictures', not images: .*imagefolder"): as_samples("pictures")
    with pytest.raises(TypeError, match="Linear is a network: .*ModelObjective"): make_objective(torch.nn.Linear(1, 1))


def test_files_of_adapters_that_are_none(tmp_path):
    with pytest.raises(OSError, match="no such file or folder"): load_lora(tiny("StableDiffusionPipeline"), "none.safetensors")
    save_lora(add_lora(tiny("DiTPipeline")), tmp_path)
    assert make_objective(load_lora(tiny("DiTPipeline"), tmp_path / "adapter_model.safetensors")).parameters


def test_adapters_of_weight_zero_have_no_gradient(tmp_path):
    pipe = add_lora(tiny("StableDiffusionPipeline"))
    pipe.set_adapters(["default"], [0.])
    rows = as_samples([{"image": Image.new("RGB", (64, 64)), "prompt": "a cup"}])
    with pytest.raises(FloatingPointError, match="gradient of sample 0 .* is 0"):
        collect(pipe, rows, tmp_path, v=64, timesteps=1, progress=False)
