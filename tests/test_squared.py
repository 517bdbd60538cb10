"""DAS, squared kernels and the method for each question: formulas, invariances, and what does not fit."""
import pytest
import torch

from dmin import collect, load_images
from dmin.core.registry import make_objective
from dmin.core.scores import Attributor
from dmin.families.ddpm import tiny_ddpm
from dmin.methods.choosing import attribute, attributor, QUESTIONS
from dmin.methods.das import DAS, das_residuals, leave_one_out_change
from dmin.methods.dmin import DMin
from dmin.methods.squared import Removal, SquaredKernels, standardised, StandardisedMean
from dmin.methods.trak import Kernel
from dmin.methods.whitened import scores_by_timestep, WhitenedDMin

RECIPE = dict(v=512, timesteps=3, dtype="float32", progress=False)
METHODS = {
    "DAS": lambda loss, output: DAS(loss, output, .1),
    "DAS, released": lambda loss, output: DAS(loss, output, .1, "released"),
    "squared": lambda loss, output: SquaredKernels(output, .01),
    "removal": lambda loss, output: Removal(loss, output, (.1, .01)),
    "whitened, leverage": lambda loss, output: WhitenedDMin(loss, .1, leverage=True),
}


@pytest.fixture(scope="module")
def pipe(): return tiny_ddpm(8, channels=(16,))


@pytest.fixture(scope="module")
def digits(): return load_images("mnist_5k", size=8).select(range(0, 4000, 200))


@pytest.fixture(scope="module")
def stores(pipe, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    average = make_objective(pipe, output="average")
    return collect(pipe, digits, folder / "loss", **RECIPE), collect(average, digits, folder / "out", **RECIPE)


def test_leaving_out_is_fitting_without():
    """The formula against fits from which a sample was left out, with several outputs and fewer rows than
    parameters, and with more.
    """
    for n, outputs, d in ((4, 3, 30), (30, 2, 7)):
        draw = torch.Generator().manual_seed(n)
        x, y, q = (torch.randn(*shape, generator=draw, dtype=torch.double)
                   for shape in ((n, outputs, d), (n, outputs), (2, outputs, d)))

        def answers(kept):
            a, b = x[kept].flatten(0, 1), y[kept].flatten()
            theta = torch.linalg.solve(a.T @ a + .3 * torch.eye(d, dtype=a.dtype), a.T @ b)
            return q @ theta, y - x @ theta

        whole, residuals = answers(list(range(n)))
        change = leave_one_out_change(x, q, residuals, .3)
        for i in range(n):
            assert torch.allclose(change[:, i], whole - answers([k for k in range(n) if k != i])[0], atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_one_call_for_all(name, stores, digits):
    """A query's row depends on no other query, a region changes it, and it ranks."""
    method, queries = METHODS[name](*stores), digits.select([3, 7, 11])
    scores = method.scores(queries)
    assert isinstance(method, Attributor) and method.name
    assert scores.shape == (3, 20) and scores.isfinite().all()
    atol = 1e-3 * scores.abs().max().item()
    assert torch.allclose(method.scores(queries.select([2, 0])), scores[[2, 0]], atol=atol)
    assert scores.argmax(1).tolist() == [3, 7, 11]
    assert torch.allclose(method.influence(queries).values, scores, atol=atol)
    assert not torch.allclose(method.influence(queries, region=(0, 0, 4, 8)).values, scores, atol=atol)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_samples_does_not_matter(name, stores, pipe, digits, tmp_path):
    turned, average = digits.select(range(19, -1, -1)), make_objective(pipe, output="average")
    others = collect(pipe, turned, tmp_path / "a", **RECIPE), collect(average, turned, tmp_path / "b", **RECIPE)
    queries = digits.select([4])
    expected = METHODS[name](*stores).scores(queries)
    found = METHODS[name](*others).scores(queries).flip(1)
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["DAS", "DAS, released", "squared"])
def test_squares_are_not_negative(name, stores, digits):
    assert (METHODS[name](*stores).scores(digits) >= 0).all()


def test_a_square_knows_no_sign():
    """Gradients of minus the output, and of twice the output, ask the same; a kernel that is not squared
    differs in sign where only the queries are turned round.
    """
    draw = torch.Generator().manual_seed(0)
    rows, q = torch.randn(9, 2, 30, generator=draw), torch.randn(3, 2, 30, generator=draw)
    plain, turned = [Kernel(x) for x in rows.unbind(1)], [Kernel(-2 * x) for x in rows.unbind(1)]
    a, b = scores_by_timestep(plain, q, .1).sum(-1), scores_by_timestep(turned, q, .1).sum(-1)
    assert torch.allclose(a, -2 * b, rtol=1e-4, atol=1e-6)
    assert torch.allclose(standardised(a.square()), standardised(b.square()), atol=1e-4)


def test_residuals_are_those_of_the_losses(stores):
    losses = stores[0].per_sample("losses")
    assert torch.allclose(das_residuals(stores[0]).square(), losses, rtol=1e-5)


def test_a_smaller_residual_means_less(stores, digits):
    """DAS is linear in each sample's squared residual."""
    method, queries = METHODS["DAS"](*stores), digits.select([5])
    before = method.scores(queries)
    method.residuals = method.residuals.clone()
    method.residuals[2] *= .5
    after = method.scores(queries)
    assert torch.allclose(after[:, 2], before[:, 2] / 4, rtol=1e-4)
    assert torch.equal(after[:, 3:], before[:, 3:])


def test_standardised_scores_have_no_unit(stores, digits):
    scores = METHODS["squared"](*stores).scores(digits.select([1, 2]))
    assert torch.allclose(standardised(scores), standardised(1e4 * scores + 7e-3), atol=1e-3)
    assert torch.allclose(standardised(scores).square().mean(1), torch.ones(2), atol=1e-4)
    with pytest.raises(ValueError, match="query 0"): standardised(torch.ones(1, 4))
    with pytest.raises(ValueError, match="no attributors"): StandardisedMean([])


def test_dampings_are_chosen_without_labels(stores):
    method = Removal(*stores)
    assert all(damping > 0 for damping in method.dampings)
    assert all(part.dampings for part in method.parts)   # the curves that the choices were made by
    assert DAS(*stores).dampings


@pytest.mark.parametrize("option, words", [
    (dict(seed=1), "noise"), (dict(timesteps=2), "timesteps"), (dict(noises=2), "noise"), (dict(v=256), "v is")])
def test_stores_that_do_not_fit_are_refused(option, words, stores, pipe, digits, tmp_path):
    output = collect(make_objective(pipe, output="average"), digits, tmp_path, **(RECIPE | option))
    for kind in (DAS, Removal):
        with pytest.raises(ValueError, match=f"(?s)do not fit.*{words}.*collect"): kind(stores[0], output)


def test_stores_of_other_samples_or_models_are_refused(stores, digits, tmp_path):
    objective = make_objective(tiny_ddpm(8, channels=(16,), seed=1), output="average")
    other = collect(objective, digits, tmp_path / "model", **RECIPE)
    fewer = collect(stores[1].objective, digits.select(range(5)), tmp_path / "fewer", **RECIPE)
    for store, words in ((other, "different models"), (fewer, "samples"), (stores[0], "of the loss first")):
        with pytest.raises(ValueError, match=words): Removal(stores[0], store)
    with pytest.raises(ValueError, match="of the loss first"): Removal(*stores[::-1])
    with pytest.raises(ValueError, match="output='average'"): SquaredKernels(stores[0])


def test_a_question_has_its_method(stores, digits):
    loss, output = stores
    assert isinstance(attributor(loss), DMin) and isinstance(attributor(loss, "removal", output), Removal)
    assert torch.equal(attribute(loss, digits.select([1])).values, DMin(loss).scores(digits.select([1])))
    assert attribute(loss, digits.select([1]), "removal", output).top(1).rows.item() == 1


def test_a_question_without_an_answer_says_what_to_do(stores):
    loss, output = stores
    with pytest.raises(ValueError) as unknown: attributor(loss, "likeness")
    assert all(f"'{name}'" in str(unknown.value) for name in QUESTIONS)
    with pytest.raises(ValueError, match=r"output_store = collect\(make_objective\(pipe, output='average'\)"):
        attributor(loss, "removal")
    with pytest.raises(ValueError, match="reads no output_store"): attributor(loss, "similar", output)
