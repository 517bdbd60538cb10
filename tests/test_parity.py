"""The baselines beside other people's implementations, and beside matrices that are really inverted.

The peers are asked about the same function: a diffusion model's mean loss over the store's timesteps, with
the store's noise. Signs: here, higher is more influential, a proponent; where a peer differs the test says
so. What is stated is relative error, after scale where only the scale is a convention, and rank correlation.
"""
import importlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call

from dmin import collect, load_images
from dmin.methods.first_order import Gradient, mean_gradients, mean_query_gradients, TracInCP
from dmin.core.gradients import unflatten_like_gradient
from dmin.methods.kfac import KFAC, StoreKFAC
from dmin.methods.second_order import DataInf, LiSSA
from dmin.methods.trak import dense_projection, TRAK
from dmin.core.gradients import flatten_like_gradient
from dmin.core.objective import Objective
from dmin.core.registry import make_objective
from dmin.families.ddpm import tiny_ddpm


def peer(name):
    """A peer's module; `make test` installs them, so there a missing one is an error."""
    if os.environ.get("DMIN_REQUIRE_PEERS"): return importlib.import_module(name)
    return pytest.importorskip(name, reason="pip install --no-deps -r tests/peers.txt")


class MeanLoss(nn.Module):
    """A pipeline's loss of each image, averaged over the store's timesteps, as a module: images (n, C, H, W)
    in, (n,) out.
    """

    def __init__(self, objective, timesteps):
        super().__init__()
        self.network, self.objective, self.timesteps = objective.model, objective, timesteps
        self.eps = objective.draw_noise(timesteps)[:, 0]

    def forward(self, z0):
        total = 0
        for t, eps in zip(self.timesteps, self.eps):
            noisy = self.objective.noisy(z0, eps.expand_as(z0), torch.full((len(z0),), t))
            total = total + (self.network(noisy, t).sample - eps).square().flatten(1).mean(1) / len(
                self.timesteps)
        return total


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A tiny pipeline, its uncompressed store of 20 digits, two queries, and the same as a function of
    images.
    """
    digits, pipe = load_images("mnist_5k", size=8).select(range(0, 4000, 200)), tiny_ddpm(8, channels=(16,))
    store = collect(
        pipe,
        digits,
        tmp_path_factory.mktemp("store"),
        v=None,
        timesteps=[100, 400, 700],
        dtype="float32",
        progress=False)
    queries = load_images("mnist_5k", "test", size=8).select([0, 500])
    objective = make_objective(pipe)
    pipe.unet.requires_grad_(True)
    return SimpleNamespace(
        pipe=pipe,
        digits=digits,
        store=store,
        queries=queries,
        loss=MeanLoss(objective, [100, 400, 700]),
        train_z=objective.encode(digits[:])["z0"],
        query_z=objective.encode(queries[:])["z0"])


def relative(a, b): return ((a - b).norm() / b.norm()).item()
def up_to_scale(a, b): return relative(a * ((a * b).sum() / a.square().sum()), b)
def order(a, b): return min(spearmanr(x, y).statistic for x, y in zip(a, b))


def loaders(here):
    return [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(z), batch_size=10)
        for z in (here.train_z, here.query_z)]


# first order

def dattri_task(here, checkpoints):
    AttributionTask = peer("dattri.task").AttributionTask

    def loss(parameters, data):   # of one image
        return functional_call(here.loss, parameters, (data[0].view(1, *here.train_z.shape[1:]),)).sum()
    return AttributionTask(loss_func=loss, model=here.loss, checkpoints=checkpoints)


@pytest.mark.parametrize("cosine", [False, True])
def test_gradient_and_tracin_equal_dattri(here, cosine, tmp_path):
    TracInAttributor = peer("dattri.algorithm.tracin").TracInAttributor
    other = tiny_ddpm(8, channels=(16,), seed=1)
    states = [{f"network.{k}": v.clone() for k, v in p.unet.state_dict().items()} for p in (here.pipe, other)]
    second = collect(
        other, here.digits, tmp_path, v=None, timesteps=[100, 400, 700], dtype="float32", progress=False)
    attributor = TracInAttributor(
        task=dattri_task(here, states), weight_list=torch.tensor([0.1, 0.02]), normalized_grad=cosine)
    attributor.projector_kwargs = None   # else gradients are projected to 512 numbers
    theirs = attributor.attribute(*loaders(here)).T
    here.loss.load_state_dict(states[0])
    ours = TracInCP([here.store, second], [.1, .02], cosine=cosine).scores(here.queries)
    assert relative(ours, theirs) < 1e-3 and order(ours, theirs) > .999


def test_tracincp_equals_captum(here, tmp_path):
    TracInCP_ = peer("captum.influence").TracInCP
    def load(model, rate):
        return rate   # one checkpoint, the weights that are there: what is returned is its learning rate
    train = torch.utils.data.TensorDataset(here.train_z, torch.zeros(len(here.train_z)))
    # captum cannot flatten a convolution's gradients here
    layers = ["time_embedding.linear_1", "time_embedding.linear_2"]
    theirs = TracInCP_(
        here.loss,
        train,
        [0.3],
        load,
        [f"network.{x}" for x in layers],
        lambda output, target: output,
        batch_size=10,
    ).influence((here.query_z, torch.zeros(2)))
    store = collect(
        make_objective(here.pipe, [f"{x}*" for x in layers]),
        here.digits,
        tmp_path,
        v=None,
        timesteps=[100, 400, 700],
        dtype="float32",
        progress=False)
    ours = TracInCP([store], [.3]).scores(here.queries)
    assert relative(ours, theirs) < 1e-3 and order(ours, theirs) > .999


def test_gradient_is_autograds(here):
    grads = [
        torch.cat(
            [
                flatten_like_gradient(g, 0)
                for g in torch.autograd.grad(here.loss(z[None]).sum(), list(here.pipe.unet.parameters()))])
        for z in here.train_z[:3]]
    assert relative(mean_gradients(here.store)[:3], torch.stack(grads)) < 1e-4


# TRAK

@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_trak_equals_traker(here, kind, tmp_path):
    trak = peer("trak")
    projectors, outputs = peer("trak.projectors"), peer("trak.modelout_functions")

    class Loss(outputs.AbstractModelOutput):
        def __init__(self): pass
        @staticmethod
        def get_output(model, weights, buffers, z0):
            return functional_call(model, (weights, buffers), (z0[None],)).sum()
        @staticmethod
        def get_out_to_loss_grad(model, weights, buffers, batch): return torch.ones(len(batch[0]), 1)

    d, k, n, damping = sum(p.numel() for p in here.pipe.unet.parameters()), 64, len(here.train_z), .05
    matrix = dense_projection(d, k, kind)
    # ours has a convolution's gradient laid out position first: the matrix's rows are brought from that
    # order into the parameters' own
    parts = matrix.split([p.numel() for p in here.pipe.unet.parameters()])
    native = torch.cat(
        [
            unflatten_like_gradient(part.T, p.shape).flatten(1)
            for part, p in zip(parts, here.pipe.unet.parameters())],
        1,
    ).T

    class Given(projectors.AbstractProjector):
        def __init__(self, *args): super().__init__(*args)
        def project(self, grads, model_id):
            # traker divides by the root of d
            return torch.cat([g.flatten(1) for g in grads.values()], 1) @ native * d**.5
        def free_memory(self): pass

    ours = TRAK(here.store, damping, projection=matrix)
    traker = trak.TRAKer(
        here.loss,
        Loss(),
        train_set_size=n,
        save_dir=str(tmp_path),
        device="cpu",
        projector=Given(d, k, 0, "normal", "cpu"),
        proj_dim=k,
        use_half_precision=False,
        lambda_reg=damping * ours.kernel.unit,
        logging_level=50)
    traker.load_checkpoint(here.loss.state_dict(), model_id=0)
    traker.featurize([here.train_z], num_samples=n)
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", here.loss.state_dict(), 0, num_targets=2)
    traker.score([here.query_z], num_samples=2)
    # scaled by the mean of the inverse's entries
    theirs = torch.as_tensor(traker.finalize_scores("queries")).float().T
    scores = ours.scores(here.queries)
    assert up_to_scale(scores, theirs) < 1e-2 and order(scores, theirs) > .99


# DataInf and LiSSA

def one_parameter(here, tmp_path, name="conv_out.weight"):
    objective = make_objective(here.pipe, name)
    return collect(
        objective, here.digits, tmp_path, v=None, timesteps=[100, 400, 700], dtype="float32", progress=False
    ), f"network.{name}"


def test_datainf_equals_dattri(here, tmp_path):
    IFAttributorDataInf = peer("dattri.algorithm.influence_function").IFAttributorDataInf
    store, name = one_parameter(here, tmp_path)
    damping = .1 * mean_gradients(store).square().mean().item()
    here.pipe.unet.requires_grad_(True)
    attributor = IFAttributorDataInf(
        task=dattri_task(here, here.loss.state_dict()), layer_name=[name], regularization=damping)
    train, queries = loaders(here)
    attributor.cache(train)
    theirs = attributor.attribute(train, queries).T.detach()
    ours = DataInf(store, .1).scores(here.queries)
    assert relative(ours, theirs) < 1e-2 and order(ours, theirs) > .999


def test_datainf_of_one_sample_is_the_closed_form(here, tmp_path):
    store = collect(
        make_objective(here.pipe, "conv_out.weight"),
        here.digits.select([0]),
        tmp_path,
        v=None,
        timesteps=2,
        dtype="float32",
        progress=False)
    g, q = mean_gradients(store)[0].double(), mean_query_gradients(store, here.queries).double()
    damping = .1 * g.square().mean()
    exact = q @ torch.linalg.solve(torch.outer(g, g) + damping * torch.eye(len(g), dtype=torch.double), g)
    # DataInf leaves damping / (damping + g·g), about .1 / len(g), of what it subtracts from: in float64
    # that costs 4 of 16 digits, and
    # rounding the scores to float32 is all that can be seen, 2^-24 each; a dozen times as much is allowed
    found = DataInf(store, .1).scores(here.queries)[:, 0].double()
    assert relative(found, exact) < 1e-6
    assert relative(found, (q @ g) / (damping + g @ g)) < 1e-6   # Sherman and Morrison


def test_lissa_converges_to_the_exact_inverse(here, tmp_path):
    store, _ = one_parameter(here, tmp_path)
    x, q = mean_gradients(store).double(), mean_query_gradients(store, here.queries).double()
    damping = 10 * x.square().mean()
    exact = q @ torch.linalg.solve(x.T @ x / len(x) + damping * torch.eye(x.shape[1]), x.T)
    errors = [
        relative(LiSSA(store, 10.0, steps).scores(here.queries).double(), exact) for steps in (10, 100, 3000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


# K-FAC

class LinearObjective(Objective):
    """One linear layer that predicts the noise from the noisy image: its curvature can be inverted exactly.

    """

    def __init__(self, pipe):
        super().__init__(pipe)
        self.shape = (1, 4, 4)

    def encode(self, samples, names=None):
        return {
            "z0": torch.stack(
                [
                    torch.from_numpy(np.array(x.resize((4, 4)))).view(1, 4, 4) / 127.5 - 1
                    for x in samples["image"]])}
    def predict(self, encoded, t, eps):
        return self.model(self.noisy(encoded["z0"], eps, t).flatten(1)).view(-1, 1, 4, 4), eps


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return LinearObjective(
        SimpleNamespace(unet=nn.Linear(16, 16, bias=False), scheduler=tiny_ddpm(8, channels=(16,)).scheduler))


def damped_scores(kfac, q, curvature, x):
    damping = kfac.damping * curvature.diagonal().mean()
    return q.double() @ torch.linalg.solve(curvature + damping * torch.eye(len(curvature)), x.double().T)


def test_kfac_of_one_sample_is_the_exact_inverse(linear, here, tmp_path, monkeypatch):
    """With one sample and one linear layer the outer product of the gradient is a Kronecker product: nothing
    is approximated.
    """
    import dmin.methods.kfac as module
    one = here.digits.select([3])
    store = collect(linear, one, tmp_path, v=None, timesteps=[400], dtype="float32", progress=False)
    batch = linear.encode(one[:]) | {"t": torch.tensor([400]), "eps": linear.draw_noise([400])[:, 0]}
    monkeypatch.setattr(
        module, "CurvatureBatches", lambda *args, **kwargs: [(batch, batch["eps"].flatten(1))])
    x, q = mean_gradients(store), mean_query_gradients(store, here.queries)
    exact_curvature = torch.outer(x[0].double(), x[0].double())
    for corrected in (False, True):
        kfac = StoreKFAC(store, .1, fisher="empirical", corrected=corrected)
        assert (
            up_to_scale(kfac.scores(here.queries).double(), damped_scores(kfac, q, exact_curvature, x)) < 1e-3
        )


def test_kfac_of_a_linear_model_nears_the_exact_inverse(linear, here, tmp_path):
    """Of squared errors and one linear layer the Gauss-Newton matrix is a Kronecker product of the inputs'
    second moments and the identity; drawn targets estimate the latter.
    """
    digits = load_images("mnist_5k", size=8).select(range(0, 4000, 10))
    store = collect(linear, digits, tmp_path, v=None, timesteps=[400], dtype="float32", progress=False)
    x, q = mean_gradients(store), mean_query_gradients(store, here.queries)
    from dmin.methods.kfac import CurvatureBatches
    inputs = torch.cat(
        [linear.noisy(b["z0"], b["eps"], b["t"]).flatten(1) for b, _ in CurvatureBatches(linear, digits, 20)]
    ).double()
    exact_curvature = torch.kron(torch.eye(16, dtype=torch.double), inputs.T @ inputs / len(inputs))
    kfac = StoreKFAC(store, .1, draws=20)
    exact = damped_scores(kfac, q, exact_curvature, x)
    scores = kfac.scores(here.queries).double()
    assert up_to_scale(scores, exact) < .05 and order(scores, exact) > .99
    assert order(Gradient(store).scores(here.queries), exact) < .99   # the curvature matters here
    # in the scale of the mean loss, whose second derivative by an output is 2/16: a damping is a share of that
    assert kfac.unit == pytest.approx(2 / 16 * exact_curvature.diagonal().mean().item(), rel=.05)


def test_published_kfac_is_the_formula_on_gradients_taken_one_by_one(linear, here):
    """Whole mean gradients over draws, by plain autograd, and the exact inverse of the linear layer."""
    from dmin.core.images import sample_ids
    from dmin.methods.kfac import own_draws
    digits = load_images("mnist_5k", size=8).select(range(0, 4000, 100))
    weight, draws = linear.model.weight.requires_grad_(True), 7

    def gradient(sample, role):
        t, eps = own_draws(linear, [f"3/{role}/{sample_ids(sample)[0]}"], draws)
        encoded = linear.encode(sample[:])
        losses = [linear.loss(encoded, t[:, k], eps[:, k]).sum() for k in range(draws)]
        return torch.autograd.grad(sum(losses) / draws, weight)[0].flatten().double()

    q = torch.stack([gradient(here.queries.select([i]), "query") for i in range(2)])
    x = torch.stack([gradient(digits.select([i]), "sample") for i in range(len(digits))])
    kfac = KFAC(linear, digits, draws=draws, query_bits=None, seed=3)
    assert kfac.damping * kfac.unit == pytest.approx(1e-8)
    kfac.set_damping(.1)
    factors = kfac.curvature._operator.state_dict()
    a, b = (factors[f"{kind}_covariances"]["network"].double() for kind in ("input", "gradient"))
    curvature = torch.kron(b, a) + .1 * kfac.unit * torch.eye(256)
    assert relative(kfac.scores(here.queries).double(), q @ torch.linalg.solve(curvature, x.T)) < 1e-3


def test_published_kfac_does_not_depend_on_the_batch_or_the_order(here, tmp_path):
    """Of a draw's rows a pass, of the samples' order, and of where the gradients are kept."""
    from dmin.methods.kfac import MeanGradients
    whole = torch.cat([x for _, x in MeanGradients(here.pipe, here.digits, 5)])
    for batch_size in (1, 2, 7, 200):
        found = torch.cat([x for _, x in MeanGradients(here.pipe, here.digits, 5, batch_size=batch_size)])
        assert relative(found, whole) < 1e-4
    turned = here.digits.select(range(19, -1, -1))
    assert relative(torch.cat([x for _, x in MeanGradients(here.pipe, turned, 5)]).flip(0), whole) < 1e-4
    for _ in range(2):   # computed, then read
        kept = torch.cat([x for _, x in MeanGradients(here.pipe, here.digits, 5, folder=tmp_path)])
        assert torch.equal(kept, whole)
    with pytest.raises(ValueError, match="choose another folder"):
        list(MeanGradients(here.pipe, turned, 5, folder=tmp_path))


def test_expand_and_reduce_agree_without_weight_sharing(linear, here, tmp_path):
    store = collect(linear, here.digits, tmp_path, v=None, timesteps=[400], dtype="float32", progress=False)
    expand, reduce = (
        StoreKFAC(store, 0.1, fisher="empirical", approximation=x).scores(here.queries)
        for x in ("expand", "reduce"))
    assert relative(reduce, expand) < 1e-4


def test_eight_bits_keep_the_order(here):
    exact, rounded = (StoreKFAC(here.store, .1, query_bits=bits).scores(here.queries) for bits in (None, 8))
    assert order(rounded, exact) > .99 and not torch.equal(rounded, exact)


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_kfac_agrees_with_kronfluence(here, strategy, tmp_path, monkeypatch):
    """The same samples, one timestep and its noise, true targets in both. kronfluence measures with the loss
    itself, so its scores have our sign.
    """
    analyzer, task, arguments = (
        peer("kronfluence.analyzer"),
        peer("kronfluence.task"),
        peer("kronfluence.arguments"))
    import copy

    import dmin.methods.kfac as module

    pipe = copy.deepcopy(here.pipe)
    store = collect(
        pipe, here.digits, tmp_path / "store", v=None, timesteps=[400], dtype="float32", progress=False)
    objective = store.objective
    eps = objective.draw_noise([400])[0]

    def batch(z): return {"z0": z, "t": torch.full((len(z),), 400), "eps": eps.expand(len(z), -1, -1, -1)}
    monkeypatch.setattr(
        module,
        "CurvatureBatches",
        lambda *args, **kwargs: [(batch(here.train_z), eps.expand(len(here.train_z), -1, -1, -1).flatten(1))])
    kfac = StoreKFAC(store, 1., fisher="empirical", corrected=strategy == "ekfac")
    ours = kfac.scores_of(
        [
            m if name in kfac.curvature.names else torch.zeros_like(m)
            for m, name in zip(module.query_matrices(store, here.queries), objective.parameters)])

    class Denoising(task.Task):
        def compute_train_loss(self, batch, model, sample=False):
            z, = batch
            noisy = objective.noisy(z, eps.expand_as(z), torch.full((len(z),), 400))
            return (model(noisy, 400).sample - eps).square().flatten(1).mean(1).sum()
        def compute_measurement(self, batch, model): return self.compute_train_loss(batch, model)

    train, queries = (torch.utils.data.TensorDataset(z) for z in (here.train_z, here.query_z))
    model = analyzer.prepare_model(copy.deepcopy(here.pipe.unet), Denoising())
    work = analyzer.Analyzer(
        "parity", model, Denoising(), cpu=True, output_dir=str(tmp_path / "kronfluence"), disable_tqdm=True)
    work.fit_all_factors(
        "factors",
        train,
        per_device_batch_size=10,
        factor_args=arguments.FactorArguments(strategy=strategy, use_empirical_fisher=True))
    if strategy == "ekfac":
        found = work.load_lambda_matrices("factors")
        values = [x / found["num_lambda_processed"][name] for name, x in found["lambda_matrix"].items()]
    else:
        found = work.load_eigendecomposition("factors")
        values = [
            torch.outer(found["gradient_eigenvalues"][name], x)
            for name, x in found["activation_eigenvalues"].items()]
    # the mean eigenvalue, in kronfluence's scale
    unit = sum(x.sum() for x in values) / sum(x.numel() for x in values)
    work.compute_pairwise_scores(
        "scores",
        "factors",
        queries,
        train,
        per_device_query_batch_size=2,
        per_device_train_batch_size=10,
        score_args=arguments.ScoreArguments(damping_factor=unit.item()))
    theirs = work.load_pairwise_scores("scores")["all_modules"]
    print("kronfluence", strategy, up_to_scale(ours, theirs), order(ours, theirs))
    assert up_to_scale(ours, theirs) < .1 and order(ours, theirs) > .98
