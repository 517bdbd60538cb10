"""Whatever sampler sits in a pipeline, and whatever was done with it: noise levels, fingerprints and scores
are the training's.
"""
import math

import diffusers
import pytest
import torch
from conftest import make_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler)
from test_text_to_image import small

from dmin import collect, generate, load_mixture, make_objective, open_store
from dmin.methods.trak import clean_estimate, JourneyTRAK, trajectory
from dmin.measures.lds import elbo_weights
from dmin.pipelines import network
from dmin.core.schedule import noise_schedule, training_settings
from dmin.families.latent import train_tokenizer

TIMES = torch.tensor([100, 500, 900])
EVERY_ONE = sorted(
    {
        *(c.__name__ for c in DDIMScheduler().compatibles),
        "LCMScheduler",
        "TCDScheduler",
        "SASolverScheduler",
        "DDIMParallelScheduler",
        "DDPMParallelScheduler"}
    - {"EDMEulerScheduler", "DPMSolverSDEScheduler"})
FLOWS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    **{
        name: lambda kind=kind: kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        for name, kind in {
            "DPM++": DPMSolverMultistepScheduler,
            "DPM++ single": DPMSolverSinglestepScheduler,
            "UniPC": UniPCMultistepScheduler,
        }.items()}}


@pytest.fixture(scope="module")
def mixture(): return load_mixture("mini", size=32).select(range(4))


@pytest.fixture(scope="module")
def tokenizer(mixture): return train_tokenizer(mixture["prompt"], 600)


@pytest.fixture(scope="module")
def sd(tokenizer): return small("sd", tokenizer)


@pytest.fixture(scope="module")
def sd3(tokenizer):
    pipe = small("sd3", tokenizer, lora=True)
    pipe.scheduler = FLOWS["Euler"]()
    return pipe


def swapped(pipe, scheduler):
    """The same models with another sampler."""
    return type(pipe)(
        **pipe.components | {"scheduler": scheduler},
        **({"requires_safety_checker": False} if hasattr(pipe, "unet") else {}))


def factors(objective):
    one, nought = torch.ones(3, *objective.shape), torch.zeros(3, *objective.shape)
    return objective.noisy(one, nought, TIMES)[:, 0, 0, 0], objective.noisy(nought, one, TIMES)[:, 0, 0, 0]


@pytest.mark.parametrize("name", EVERY_ONE)
@pytest.mark.parametrize("config", [{}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
                         ids=["plain", "zero terminal SNR, trailing"])
def test_noise_levels_before_and_after_sampling(name, config, sd):
    """Of Stable Diffusion at t = 100, 500 and 900; the numbers are DDPM's own, by its formula."""
    kind = getattr(diffusers, name)
    zero = "rescale_betas_zero_snr" in config
    base = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", **config)
    betas = torch.linspace(.00085**.5, .012**.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    if zero:
        roots = kept.sqrt()
        kept = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    objective = make_objective(swapped(sd, kind.from_config(base.config)))
    if not zero: assert kept[TIMES].sqrt() == pytest.approx([.946, .526, .119], abs=1e-3)
    for steps in (None, 5):
        if steps: objective.scheduler.set_timesteps(steps)
        image, noise = factors(objective)
        assert torch.allclose(image.double(), kept[TIMES].sqrt(), rtol=1e-4, atol=1e-6)
        assert torch.allclose(noise.double(), (1 - kept[TIMES]).sqrt(), rtol=1e-4)
    assert objective.fingerprint() == make_objective(swapped(sd, base)).fingerprint()


@pytest.mark.parametrize("name", FLOWS)
def test_noise_levels_of_flows(name, sd3):
    objective, s = make_objective(swapped(sd3, FLOWS[name]())), (TIMES + 1) / 1000
    expected = 3 * s / (1 + 2 * s)
    for steps in (None, 5):
        if steps: objective.scheduler.set_timesteps(steps)
        image, noise = factors(objective)
        assert torch.allclose(noise, expected, rtol=1e-5) and torch.allclose(image, 1 - expected, atol=1e-6)
    assert objective.fingerprint() == make_objective(sd3).fingerprint()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_swapping_samplers_changes_no_score(family, sd, sd3, mixture, tmp_path):
    """A store collected with one sampler answers through every other, to the bit, also after images were
    drawn with it.
    """
    pipe = sd if family == "sd" else sd3
    store = collect(pipe, mixture, tmp_path, v=64, timesteps=2, progress=False)
    scores = store.influence(mixture.select([1])).values
    for name in EVERY_ONE if family == "sd" else FLOWS:
        scheduler = (
            getattr(diffusers, name).from_config(pipe.scheduler.config) if family == "sd" else FLOWS[name]())
        other = swapped(pipe, scheduler)
        generate(other, "a rose", steps=4, progress=False)
        again = open_store(tmp_path, other, mixture)
        assert torch.equal(again.influence(mixture.select([1])).values, scores), name


def test_what_is_trained_changes_the_fingerprint(sd, sd3):
    settings = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    kinds = [
        settings,
        settings | {"beta_end": 0.02},
        settings | {"beta_schedule": "linear"},
        settings | {"prediction_type": "v_prediction"},
        settings | {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.01] * 1000},
        settings | {"num_train_timesteps": 500}]
    found = [make_objective(swapped(sd, DDIMScheduler(**x))).fingerprint() for x in kinds]
    shifts = [
        make_objective(swapped(sd3, FlowMatchEulerDiscreteScheduler(shift=x))).fingerprint()
        for x in (1.0, 3.0)]
    assert len({*found, *shifts}) == len(found) + 2


def test_trained_betas_are_read():
    betas = [.001 * (1 + i % 7) for i in range(1000)]
    found = noise_schedule(EulerDiscreteScheduler(trained_betas=betas))
    assert torch.allclose(
        found.image.double(), (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0).sqrt(), rtol=1e-4)


@pytest.mark.parametrize("scheduler, said", [
    (EDMEulerScheduler(), "EDMEulerScheduler, which has neither betas"), (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    (diffusers.CogVideoXDDIMScheduler(), "snr_shift_scale"), (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas with prediction_type='epsilon'"),
    (diffusers.DDPMWuerstchenScheduler(), "neither betas"), (DDPMScheduler(prediction_type="x"), "prediction_type='x'")])
def test_a_schedule_that_cannot_be_read_is_refused_by_name(scheduler, said):
    with pytest.raises(ValueError, match=said): training_settings(scheduler)
    with pytest.raises(ValueError, match=said): make_objective(make_pipeline(scheduler=lambda: scheduler))


def test_a_scheduler_of_the_other_family_is_refused(sd, sd3):
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline is trained as a diffusion.*FlowMatchEulerDiscreteScheduler"
    ):
        make_objective(swapped(sd, FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline is trained as a flow.*DDIMScheduler"):
        make_objective(swapped(sd3, DDIMScheduler()))


def all_knowing(pipe, objective, z0):
    """Lets the network predict what it must for the clean latent to be `z0`, at whatever timestep it is
    asked.
    """
    times, schedule = objective.schedule.times.double(), objective.schedule
    def at(t, values):   # samplers ask between timesteps, too
        place = torch.as_tensor(t, dtype=torch.float64).flatten()[:1].clamp(times[0], times[-1])
        right = torch.searchsorted(times, place).clamp(1, len(times) - 1)
        share = (place - times[right - 1]) / (times[right] - times[right - 1])
        return (values[right - 1] * (1 - share) + values[right] * share).float()
    def forward(*args, **kwargs):
        x, t = (
            (*args, *kwargs.values())[:2]
            if len(args) >= 2
            else (kwargs.get("hidden_states", args[0] if args else None), kwargs.get("timestep")))
        a, b = at(t, schedule.image.double()), at(t, schedule.noise.double())
        eps = (x - a * z0) / b
        found = eps if schedule.prediction_type == "epsilon" else eps - z0
        return (
            diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=found)
            if kwargs.get("return_dict", True)
            else (found,))
    network(pipe).forward = forward


@pytest.mark.parametrize("name", [*EVERY_ONE, *(f"flow {x}" for x in FLOWS)])
def test_trajectories_and_clean_estimates(name, tokenizer):
    """A network that knows the clean latent implies it at every step of every sampler's trajectory."""
    pipe = small("sd3" if name.startswith("flow") else "sd", tokenizer)
    pipe.scheduler = (
        FLOWS[name[5:]]()
        if name.startswith("flow")
        else getattr(diffusers, name).from_config(pipe.scheduler.config))
    objective = make_objective(pipe)
    z0 = torch.randn(objective.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    all_knowing(pipe, objective, z0)
    images = generate(pipe, ["a rose"], steps=4, guidance_scale=1., progress=False)
    seen, times = trajectory(pipe, images, steps=4, guidance_scale=1.)
    assert seen.shape[1] == len(times) >= 4 and (times.diff() < 1e-2).all()
    encoded = objective.encode(images[:])
    places = (times[:, None] - objective.schedule.times).abs().argmin(1)
    for k, place in enumerate(places):
        t = place[None]
        found = clean_estimate(objective, encoded, seen[:, k], t)
        # samplers that ask between two timesteps
        off = float((times[k] - objective.schedule.times[place]).abs())
        assert (found - z0).abs().max() < 2e-3 + .05 * off, (k, float(times[k]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_journey_trak_under_samplers(name, sd, mixture, tmp_path):
    pipe = swapped(sd, getattr(diffusers, name).from_config(sd.scheduler.config))
    store = collect(pipe, mixture, tmp_path, v=64, timesteps=2, progress=False)
    queries = generate(pipe, ["a rose", "a card"], steps=3, progress=False)
    scores = JourneyTRAK(store, .1, steps=3).scores(queries)
    assert scores.shape == (2, 4) and scores.isfinite().all()
    assert torch.allclose(JourneyTRAK(store, .1, steps=3).scores(queries), scores)


def test_noise_alone_implies_no_image(tokenizer):
    """At zero terminal signal-to-noise a predicted noise says nothing of the image; a velocity does."""
    pipe = small("sd", tokenizer)
    t, config = torch.tensor([999]), dict(rescale_betas_zero_snr=True)
    for kind in ("epsilon", "v_prediction"):
        objective = make_objective(swapped(pipe, DDIMScheduler(prediction_type=kind, **config)))
        encoded = objective.embed_prompts(["a rose"])
        zt = torch.randn(1, *objective.shape)
        if kind == "v_prediction": assert clean_estimate(objective, encoded, zt, t).isfinite().all()
        else:
            with pytest.raises(ValueError, match="zero terminal signal-to-noise"):
                clean_estimate(objective, encoded, zt, t)


def test_the_bound_is_the_trainings():
    wanted = elbo_weights(DDPMScheduler(), [0, 500, 999])
    for kind in (EulerDiscreteScheduler, PNDMScheduler, LCMScheduler):
        scheduler = kind(beta_start=1e-4, beta_end=.02, beta_schedule="linear")
        scheduler.set_timesteps(5)
        assert torch.equal(elbo_weights(scheduler, [0, 500, 999]), wanted)
    assert math.isclose(float(wanted.sum()), 1, rel_tol=1e-5)


def test_unconditional_models_draw_and_score_alike(digits, tmp_path):
    """A DDPM whose scheduler was swapped draws the same images, and its store answers the same."""
    pipe = make_pipeline(scheduler=lambda: DDPMScheduler(beta_start=1e-4, beta_end=.015))
    other = make_pipeline(scheduler=lambda: EulerDiscreteScheduler(beta_start=1e-4, beta_end=.015))
    scores = (
        collect(pipe, digits.select(range(4)), tmp_path, v=64, timesteps=2, progress=False)
        .influence(digits.select([1]))
        .values)
    a, b = (generate(p, 2, steps=3, progress=False) for p in (pipe, other))
    assert [x.tobytes() for x in a["image"]] == [x.tobytes() for x in b["image"]]
    assert torch.equal(
        open_store(tmp_path, other, digits.select(range(4))).influence(digits.select([1])).values, scores)
