"""Per-sample gradients against one-by-one autograd and against torch.func, on the layers that real networks
are made of.
"""
import pytest
import torch
from conftest import make_pipeline, make_unet, one_by_one
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch import nn

from dmin.core.compression import Compressor, NoCompression
from dmin.core.gradients import PerSampleGradients, RULES, sample_gradients
from dmin.core.objective import draw_noise
from dmin.core.registry import make_objective

UNETS = {
    "usual": {},
    "attention everywhere": dict(
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2),
    "residual down- and upsampling": dict(
        downsample_type="resnet", upsample_type="resnet", layers_per_block=2),
    "scale and shift": dict(resnet_time_scale_shift="scale_shift"),
    "skip": dict(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 32),
        in_channels=3,
        out_channels=3),
    "fourier time, no mid attention": dict(time_embedding_type="fourier", add_attention=False),
    "learned time": dict(time_embedding_type="learned", num_train_timesteps=1000),
    "padding on one side, dropout": dict(downsample_padding=0, dropout=0.3)}


@pytest.mark.parametrize("name", UNETS)
def test_every_layer_of_unet2d(name):
    torch.manual_seed(0)
    unet = make_unet(**UNETS[name])
    channels = unet.eval().config.in_channels
    x, t, target = torch.randn(3, channels, 8, 8), torch.tensor([5, 400, 999]), torch.randn(3, channels, 8, 8)
    parameters = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    def loss(i=slice(None)): return (unet(x[i], t[i]).sample - target[i]).square().flatten(1).mean(1)
    truth = one_by_one(parameters, lambda i: loss(slice(i, i + 1)).sum(), 3)
    with PerSampleGradients(unet, parameters, NoCompression(truth.shape[1])) as g:
        found, norms, losses = g(loss, 3)
    assert torch.allclose(losses, loss().detach()) and torch.allclose(norms, truth.norm(dim=1), rtol=1e-4)
    start = 0
    # layer by layer, so that a wrong bias does not hide behind large kernels
    for n, p in parameters.items():
        part = slice(start, start + p.numel())
        # a key's bias has no gradient at all, only rounding
        scale = truth[:, part].norm().clamp(min=1e-4 * truth.norm())
        assert (found[:, part] - truth[:, part]).norm() / scale < 1e-4, n
        start += p.numel()
    assert (found - truth).norm() / truth.norm() < 1e-5


def test_against_torch_func(pipe):
    """An independent implementation: vmap of grad over the whole network."""
    unet = pipe.unet.eval()
    x, t, target = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 900]), torch.randn(4, 1, 8, 8)
    def one(w, x, t, y):
        return (torch.func.functional_call(unet, w, (x[None], t[None])).sample[0] - y).square().mean()
    truth = torch.func.vmap(torch.func.grad(one), (None, 0, 0, 0))(
        {n: p.detach() for n, p in unet.named_parameters()}, x, t, target)
    squares = sum(g.flatten(1).square().sum(1) for g in truth.values())
    parameters = dict(unet.named_parameters())
    with PerSampleGradients(unet, parameters, Compressor(64)) as g:
        _, norms, _ = g(lambda: (unet(x, t).sample - target).square().flatten(1).mean(1), 4)
    assert torch.allclose(norms, squares.sqrt(), rtol=1e-4)


def test_rules_and_generic_path_agree(pipe, monkeypatch):
    unet, x, t = pipe.unet.eval(), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 900])
    parameters = dict(unet.named_parameters())
    def run():
        with PerSampleGradients(unet, parameters, Compressor(512, 3)) as g:
            return g(lambda: unet(x, t).sample.square().flatten(1).mean(1), 4)[0]
    fast = run()
    monkeypatch.setattr("dmin.core.gradients.RULES", {})
    generic = run()
    assert RULES and (fast - generic).norm() / fast.norm() < 1e-5


def test_only_the_parameters_that_count(pipe):
    objective = make_objective(pipe, parameters=["*.to_q.*", "conv_out.*"])
    assert {n.split(".")[-2] for n in objective.parameters} == {"to_q", "conv_out"}
    d = sum(p.numel() for p in objective.parameters.values())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 30])
    def loss(i=slice(None)): return pipe.unet(x[i], t[i]).sample.square().flatten(1).mean(1)
    truth = one_by_one(objective.parameters, lambda i: loss(slice(i, i + 1)).sum(), 2)
    with PerSampleGradients(pipe.unet, objective.parameters, NoCompression(d)) as g: found = g(loss, 2)[0]
    assert (found - truth).norm() / truth.norm() < 1e-5


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_batch_size_changes_only_rounding(pipe, digits, batch_size):
    objective, t = make_objective(pipe), torch.tensor([0, 300, 999])
    some = digits.select(range(5))
    reference = sample_gradients(objective, some, t, Compressor(512), batch_size=15)
    found = sample_gradients(objective, some, t, Compressor(512), batch_size=batch_size)
    assert (found.compressed - reference.compressed).norm() / reference.compressed.norm() < 1e-5
    assert torch.allclose(found.losses, reference.losses, rtol=1e-5)


def test_order_of_samples_and_timesteps_does_not_matter(pipe, digits):
    objective = make_objective(pipe)
    a = sample_gradients(objective, digits.select([0, 1, 2]), torch.tensor([0, 300]), Compressor(512))
    b = sample_gradients(objective, digits.select([2, 0]), torch.tensor([300, 0]), Compressor(512))
    assert torch.allclose(a.compressed[[2, 0]].flip(1), b.compressed, atol=1e-5 * float(a.norms.max()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_and_ddim(kind, digits):
    pipe = make_pipeline(scheduler=lambda: DDIMScheduler(prediction_type=kind), pipeline=DDIMPipeline)
    objective, t = make_objective(pipe), torch.tensor([100])
    z0, eps = objective.encode(digits[:2])["z0"], draw_noise(objective.shape, t)[0]
    alpha = DDPMScheduler().alphas_cumprod[100]
    zt = alpha.sqrt() * z0 + (1 - alpha).sqrt() * eps
    wanted = {
        "epsilon": eps.expand_as(z0),
        "sample": z0,
        "v_prediction": alpha.sqrt() * eps - (1 - alpha).sqrt() * z0,
    }[kind]
    by_hand = (pipe.unet(zt, t).sample - wanted).square().flatten(1).mean(1)
    assert torch.allclose(
        objective.loss({"z0": z0}, t.expand(2), eps.expand(2, -1, -1, -1)), by_hand, rtol=1e-4)


class Fancy(nn.Module):
    """In-place activations, a module used three times, a tied weight, an unused layer, two outputs."""
    def __init__(self):
        super().__init__()
        self.first, self.again, self.tied, self.unused = (nn.Linear(6, 6) for _ in range(4))
        self.tied.weight = self.first.weight
        self.scale = nn.ParameterList([nn.Parameter(torch.randn(6))])
    def forward(self, x):
        h = torch.relu_(self.first(x))
        for _ in range(3): h = torch.tanh_(self.again(h))
        return self.tied(h)


def test_unusual_modules():
    torch.manual_seed(0)
    model, x = Fancy(), torch.randn(5, 4, 6)
    parameters = {n: p for n, p in model.named_parameters() if "scale" not in n}
    def loss(i=slice(None)): return model(x[i]).square().flatten(1).sum(1)
    truth = one_by_one(parameters, lambda i: loss(slice(i, i + 1)).sum(), 5)
    with PerSampleGradients(model, parameters, NoCompression(truth.shape[1])) as g:
        found, norms, _ = g(loss, 5)
    assert (found - truth).norm() / truth.norm() < 1e-5 and torch.allclose(
        norms, truth.norm(dim=1), rtol=1e-4)


def test_model_is_left_as_it_was(pipe):
    pipe.unet.train()
    pipe.unet.conv_in.requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        with PerSampleGradients(pipe.unet, dict(pipe.unet.named_parameters()), Compressor(8)) as g:
            g(lambda: 1 / 0, 1)
    assert (
        pipe.unet.training
        and not pipe.unet.conv_in.weight.requires_grad
        and pipe.unet.conv_out.weight.requires_grad)
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_half_precision_model(digits):
    exact = sample_gradients(
        make_objective(make_pipeline()), digits.select([0, 1]), torch.tensor([100]), Compressor(512))
    half = make_pipeline()
    half.unet.to(torch.bfloat16)
    objective = make_objective(half)
    found = sample_gradients(objective, digits.select([0, 1]), torch.tensor([100]), Compressor(512))
    cosine = torch.cosine_similarity(found.compressed, exact.compressed, dim=2)
    assert found.compressed.dtype == torch.float32 and cosine.min() > .97


def test_rows_that_are_not_the_batch_are_refused():
    class Mixes(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Linear(6, 6)
        def forward(self, x): return self.inner(torch.cat([x, x.mean(0, keepdim=True)]))[:-1]
    model = Mixes()
    with (
        PerSampleGradients(model, dict(model.named_parameters()), NoCompression(42)) as g,
        pytest.raises(RuntimeError, match="inner works on 6 rows"),
    ):
        g(lambda: model(torch.ones(5, 6)).sum(1), 5)


def test_memory_is_given_back(pipe):
    """Graph and hooks hold each other; a collection of hours must not grow with each batch."""
    import gc
    from dmin.core.gradients import _Call
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    def loss(): return pipe.unet(x, t).sample.square().flatten(1).mean(1)
    def fails(): raise ZeroDivisionError if loss() is not None else None
    def kept():
        gc.collect()
        return sum(type(o) is _Call for o in gc.get_objects())   # isinstance would touch deprecated objects
    with PerSampleGradients(pipe.unet, dict(pipe.unet.named_parameters()), Compressor(64)) as g:
        for _ in range(5): g(loss, 2)
        assert kept() == 0
        with pytest.raises(ZeroDivisionError): g(fails, 2)
        assert kept() == 0


class UsesAnothersWeight(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
    def forward(self, x): return nn.functional.linear(self.a(x), self.b.weight)


class PositionTable(nn.Module):
    def __init__(self): super().__init__(); self.table, self.out = nn.Embedding(5, 6), nn.Linear(6, 6)
    def forward(self, x): return self.out(x + self.table(torch.arange(5)))


@pytest.mark.parametrize("kind", [UsesAnothersWeight, PositionTable])
def test_what_no_rule_sees_is_noticed(kind):
    """Five samples and five positions: the table's rows look like samples."""
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 5, 6)
    with (
        PerSampleGradients(model, dict(model.named_parameters()), Compressor(64)) as g,
        pytest.raises(RuntimeError, match="do not add up"),
    ):
        def loss(): return model(x).square().flatten(1).sum(1)
        g.verify(loss, 5, *g(loss, 5)[:2])


def test_collecting_inside_no_grad_and_inference_mode(pipe, digits):
    objective, t = make_objective(pipe), torch.tensor([100])
    usual = sample_gradients(objective, digits.select([0]), t, Compressor(64)).compressed
    with torch.no_grad():
        assert torch.equal(
            sample_gradients(objective, digits.select([0]), t, Compressor(64)).compressed, usual)


def test_shapes_at_their_smallest_and_colour(digits):
    pipe = make_pipeline(in_channels=3, out_channels=3, size=(8, 16))
    from PIL import Image
    images = [Image.new("RGB", (16, 8), (10 * i, 30, 200)) for i in range(1, 3)]
    from dmin.core.images import as_samples
    for samples in (images[:1], images):
        for noises in (1, 3):
            found = sample_gradients(
                make_objective(pipe),
                as_samples(samples),
                torch.tensor([999]),
                Compressor(1),
                noises=noises,
                batch_size=1)
            assert found.compressed.shape == (len(samples), 1, 1) and found.norms.min() > 0


def test_gradients_left_by_a_training_loop_do_not_disturb_the_check():
    """A model fresh from `loss.backward()` passes the check against autograd, and keeps what it had."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    model(x).square().sum().backward()
    before = model.weight.grad.clone()
    def loss(): return model(x).square().mean(1)
    parameters = dict(model.named_parameters())
    with PerSampleGradients(model, parameters, NoCompression(8)) as gradients:
        compressed, norms, _ = gradients(loss, 4)
        gradients.verify(loss, 4, compressed, norms)
    assert torch.equal(model.weight.grad, before)
