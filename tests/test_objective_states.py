"""What state a pipeline's adapters are in: they count, they do not and it is said, or the objective is
refused by name.
"""
import warnings

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from test_text_to_image import small

from dmin import collect, finetune, generate, load_mixture, make_objective
from dmin.lora import add_lora
from dmin.pipelines import network
from dmin.families.latent import train_tokenizer
from dmin.methods.squared import Removal


@pytest.fixture(scope="module")
def mixture(): return load_mixture("mini", size=32).select(range(4))


@pytest.fixture(scope="module")
def tokenizer(mixture): return train_tokenizer(mixture["prompt"], 600)


def adapted(model, name="default", targets=("q_proj", "v_proj")):
    model.add_adapter(LoraConfig(r=2, target_modules=list(targets)), adapter_name=name)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(std=.1)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_fused_and_disabled_adapters(family, tokenizer, mixture, tmp_path):
    pipe = small(family, tokenizer, lora=True)
    numbers = list(make_objective(pipe).parameters)
    for spoil, mend, said in (
        (pipe.fuse_lora, pipe.unfuse_lora, r"fused into its weights.*pipe.unfuse_lora\(\)"),
        (pipe.disable_lora, pipe.enable_lora, r"disabled.*pipe.enable_lora\(\)"),
    ):
        before = make_objective(pipe).fingerprint()
        spoil()
        with pytest.raises(ValueError, match=said):
            collect(pipe, mixture, tmp_path / "s", v=16, timesteps=1, progress=False)
        assert not (tmp_path / "s").exists()
        mend()
        assert list(make_objective(pipe).parameters) == numbers
        # taking out rounds the weights
        assert mend == pipe.unfuse_lora or make_objective(pipe).fingerprint() == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")   # peft's, of a second adapter
def test_adapters_that_are_not_in_use_do_not_count(tokenizer, mixture):
    pipe = small("sd", tokenizer, lora=True)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="other")
    pipe.set_adapters(["default"])
    assert make_objective(pipe).parameters and all(".default" in n for n in make_objective(pipe).parameters)
    pipe.set_adapters(["other"])
    assert all(".other" in n for n in make_objective(pipe).parameters)
    pipe.set_adapters(["default", "other"])
    assert {n.split(".")[-2] for n in make_objective(pipe).parameters} == {"default", "other"}


def test_adapters_on_the_text_encoder_alone_are_refused(tokenizer, mixture, tmp_path):
    pipe = small("sd", tokenizer)
    whole = sum(p.numel() for p in make_objective(pipe).parameters.values())
    adapted(pipe.text_encoder)
    with pytest.raises(
        ValueError,
        match=r"on text_encoder alone.*UNet2DConditionModel, which was not trained.*parameters='\*'",
    ):
        collect(pipe, mixture, tmp_path / "s", v=16, timesteps=1, progress=False)
    assert not (tmp_path / "s").exists()
    assert sum(p.numel() for p in make_objective(pipe, parameters="*").parameters.values()) == whole


@pytest.mark.parametrize("family, where", [("sd", ["text_encoder"]), ("sd3", ["text_encoder", "text_encoder_2"])])
def test_adapters_that_do_not_count_are_said(family, where, tokenizer, mixture):
    pipe = small(family, tokenizer, lora=True)
    for name in where: adapted(getattr(pipe, name))
    there = sum(
        p.numel() for name in where for n, p in getattr(pipe, name).named_parameters() if "lora_" in n)
    here = sum(p.numel() for n, p in network(pipe).named_parameters() if "lora_" in n)
    with pytest.warns(
        UserWarning,
        match=f"{here:,} numbers of the adapters.*count; the {there:,} of those on {' and '.join(where)} do"
              " not",
    ):
        objective = make_objective(pipe)
    assert sum(p.numel() for p in objective.parameters.values()) == here


def test_a_pipeline_without_adapters_says_nothing(tokenizer, mixture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_objective(small("sd", tokenizer)), make_objective(add_lora(small("sd3", tokenizer)))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_images_of_more_than_8_bits(family, mode, tokenizer, mixture, tmp_path):
    """They would be cut off at 255, and another image attributed than the one that was meant."""
    pipe = small(family, tokenizer, lora=True)
    store = collect(pipe, mixture, tmp_path / "s", v=16, timesteps=1, progress=False)
    deep = {"image": Image.new(mode, (32, 32)), "prompt": "a rose"}
    with pytest.raises(ValueError, match=f"query 0 has mode {mode}.*not 8-bit"): store.influence(deep)
    rows = [*({"image": r["image"], "prompt": r["prompt"]} for r in mixture), deep]
    with pytest.raises(ValueError, match=f"sample 4 has mode {mode}"):
        collect(pipe, rows, tmp_path / "other", v=16, timesteps=1, progress=False)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def tall(mixture): return [{"image": x["image"].resize((32, 48)), "prompt": x["prompt"]} for x in mixture]


def test_gradients_at_other_pictures_than_those_of_the_tuning(tokenizer, tall, tmp_path):
    """Tuned on squashed pictures and attributed at cropped ones, or the other way round: it is said."""
    recipe, some = dict(v=16, timesteps=1, progress=False), dict(steps=1, batch_size=2, progress=False)
    pipe = small("sd", tokenizer, lora=True)
    finetune(make_objective(pipe, resize="crop"), tall, **some)
    with pytest.warns(UserWarning, match="resize='squash', not 'crop' as in finetune: at other pictures"):
        collect(pipe, tall, tmp_path / "squashed", resize="squash", **recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(pipe, tall, tmp_path / "cropped", resize="crop", **recipe)


def test_two_stores_of_other_pictures_do_not_fit(tokenizer, tall, tmp_path):
    pipe, recipe = small("sd", tokenizer, lora=True), dict(v=16, timesteps=1, progress=False)
    loss = collect(pipe, tall, tmp_path / "loss", resize="crop", **recipe)
    stores = {
        way: collect(make_objective(pipe, output="average", resize=way), tall, tmp_path / way, **recipe)
        for way in ("squash", "crop")}
    with pytest.raises(ValueError, match="the first has the options resize='crop', the second none"):
        Removal(loss, stores["squash"])
    Removal(loss, stores["crop"])


def test_options_that_nobody_has_are_told_with_all_that_there_are(tokenizer, mixture, tmp_path):
    pipe = small("sd", tokenizer, lora=True)
    with pytest.raises(TypeError, match="no option batchsize: it takes .*resize.*; and collect takes .*batch_size"):
        collect(pipe, mixture, tmp_path / "s", batchsize=3)
    with pytest.raises(TypeError, match="no option num_images: it takes .*; and generate takes seed, steps"):
        generate(pipe, "a rose", num_images=3)


def test_prompts_that_are_cut(mixture):
    """Of a few it is not said, as nothing can be done about them; of many it is."""
    pipe = small("sd", train_tokenizer(mixture["prompt"], 600, length=8))
    objective, rows = make_objective(pipe), mixture.select([0] * 20)
    few, many = (
        rows.remove_columns("prompt").add_column(
            "prompt", ["a"] * (20 - n) + ["a red rose on a white table by the window"] * n)
        for n in (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.check(few)
    with pytest.warns(UserWarning, match="3 of 20 prompts are longer"): objective.check(many)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_gradients_of_active_adapters_equal_autograd(tokenizer, mixture):
    """Two adapters in use, one of them alone counted through patterns."""
    from conftest import one_by_one

    from dmin.core.compression import NoCompression
    from dmin.core.gradients import sample_gradients
    pipe = small("sd", tokenizer, lora=True)
    adapted(pipe.unet, "other", ("to_k",))
    pipe.set_adapters(["default", "other"])
    objective = make_objective(pipe)
    rows, t = mixture.select(range(2)), torch.tensor([300])
    found = sample_gradients(
        objective, rows, t, NoCompression(sum(p.numel() for p in objective.parameters.values())))
    with torch.no_grad(): encoded = objective.encode(rows[:])
    eps = objective.draw_noise(t)[0]
    for p in pipe.unet.parameters(): p.requires_grad_(False)
    for p in objective.parameters.values(): p.requires_grad_(True)
    truth = one_by_one(
        objective.parameters,
        lambda i: objective.loss({k: x[i : i + 1] for k, x in encoded.items()}, t, eps).sum(),
        2)
    assert ((found.compressed[:, 0] - truth).norm() / truth.norm()).item() < 1e-5
