"""CCA, KCCA, MCCA, DCCA and DCCAE against closed forms, exact duals and finite differences in float64."""

import numpy as np
import pytest
import torch
from compared import NAMES, context_of, needs_cca_zoo, pairs, standard
from scipy.linalg import block_diag, eigh, sqrtm
from sklearn.metrics.pairwise import rbf_kernel

from baselines import cca as cca_module
from baselines.cca import CCA, Preparation, ridge_cca
from baselines.dcca import DCCA, TotalCorrelation
from baselines.dccae import DCCAE
from baselines.kcca import KCCA, bandwidth, widest_gap
from baselines.mcca import MCCA
from utils.errors import UserError

FEATURES, _ = pairs(120, widths=(9, 12))


def exact(x, y, ridge):
    """Correlations and weights of CCA by matrix roots, with a ridge in units of the mean variance, one for both or for each."""
    x, y = x - x.mean(0), y - y.mean(0)
    sxx, syy, sxy = (a.T @ b / (len(x) - 1) for a, b in ((x, x), (y, y), (x, y)))
    ridges = ridge if isinstance(ridge, list) else [ridge, ridge]
    root_x, root_y = (np.linalg.inv(sqrtm(s + r * np.trace(s) / len(s) * np.eye(len(s))).real) for s, r in zip((sxx, syy), ridges))
    left, correlations, right = np.linalg.svd(root_x @ sxy @ root_y)
    count = len(correlations)
    return correlations, (root_x @ left[:, :count], root_y @ right[:count].T)


def fitted(method, name, features=FEATURES, **changes):
    method = method()
    method.fit(features, context_of(name, features, **changes))
    return method


def agree(found, wanted):
    """Columns (n, L) are the same up to sign and the scale of a whole matrix."""
    found, wanted = found / np.linalg.norm(found), wanted / np.linalg.norm(wanted)
    assert np.abs(np.abs((found * wanted).sum(0)) - (wanted**2).sum(0)).max() < 1e-8


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_cca_is_the_exact_solution(ridge):
    needs_cca_zoo()
    method = fitted(CCA, "cca", settings={"ridge": ridge}, dim=50)  # cut to the 9 columns of the narrower modality
    views = [Preparation().fit(FEATURES[name]) for name in NAMES]
    correlations, weights = exact(*views, ridge)
    for name, view, wanted in zip(NAMES, views, weights):
        projected = method.transform(name, FEATURES[name])
        assert projected.shape == (120, 9)
        agree(projected, view @ wanted)
    first, second = (method.transform(name, FEATURES[name]) for name in NAMES)
    found = (first * second).sum(0)  # so paired coordinates keep their common sign, and stand in order
    assert (np.diff(found) <= 0).all() and np.allclose(found / found[0], correlations / correlations[0])


def test_preparation_uses_training_statistics_alone():
    rows = FEATURES["GrayImg"] * np.array([1, 0, *[1] * 7])  # a column without variance
    prepared = Preparation()
    first = prepared.fit(rows)
    assert first.shape == (120, 8) and np.allclose(first.mean(0), 0)
    assert np.allclose(prepared.apply(rows[:3] * 5), first[:3])  # neither the scale of a row nor other test rows matter
    with pytest.raises(UserError, match="120 samples do not differ"):
        Preparation().fit(np.ones((120, 4)))


def test_without_the_library_a_user_is_told_how_to_get_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    context = context_of("cca", FEATURES)
    monkeypatch.setattr(cca_module.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install -r requirements-baselines.txt"):
        CCA().fit(FEATURES, context)


def test_mcca_of_two_is_cca_and_of_four_serves_every_pair():
    needs_cca_zoo()
    few = {name: rows[:8] for name, rows in FEATURES.items()}  # of rank 7
    for features, dim, width in ((FEATURES, 6, 6), (few, 9, 7)):
        joint, linear = fitted(MCCA, "mcca", features, dim=dim), fitted(CCA, "cca", features, dim=dim)
        for name in NAMES:
            assert joint.transform(name, features[name]).shape == (len(features[name]), width)
            agree(joint.transform(name, features[name]), linear.transform(name, features[name]))
    names = ("RGBImg", "GrayImg", "PointCloud", "Mesh")
    features, _ = pairs(120, widths=(9, 9, 12, 10), names=names)
    four = fitted(MCCA, "mcca", features, dim=6)
    strong = fitted(MCCA, "mcca", features, dim=6, settings={"ridge": 10.0})
    codes = [four.transform(name, features[name]) for name in names]
    for a in range(4):
        for b in range(a):
            assert np.corrcoef(codes[a][:, 0], codes[b][:, 0])[0, 1] > 0.8
    # Off(S) p = lambda Diag(S) p
    views = [Preparation().fit(features[name]) for name in names]
    own = [np.cov(view.T) for view in views]
    off = np.cov(np.concatenate(views, 1).T) - block_diag(*own)
    for method, ridge in ((four, 1e-3), (strong, 10.0)):
        diagonal = block_diag(*(s + ridge * s.trace() / len(s) * np.eye(len(s)) for s in own))
        weights = np.concatenate([method.weights[name] for name in names])
        values, vectors = eigh(off, diagonal)
        assert np.allclose(np.diag(weights.T @ off @ weights) / np.diag(weights.T @ diagonal @ weights), values[::-1][:6], rtol=1e-6)
        agree(weights[:, :1], vectors[:, ::-1][:, :1])


def test_kcca_with_a_linear_kernel_is_ridge_cca():
    needs_cca_zoo()
    kernel = fitted(KCCA, "kcca", dim=5, settings={"kernel": "linear", "ridge": 1e-2, "landmarks": 120})
    views = [Preparation().fit(FEATURES[name]) for name in NAMES]
    # the ridge is in units of the mean variance: of 120 Nystroem columns there, of 9 and 12 columns here
    _, weights = exact(*views, [1e-2 * view.shape[1] / 120 for view in views])
    for name, view, wanted in zip(NAMES, views, weights):
        agree(kernel.transform(name, FEATURES[name]), view @ wanted[:, :5])


def test_kcca_refuses_another_kernel():
    with pytest.raises(UserError, match="'rbf' or 'linear', found 'poly'"):
        fitted(KCCA, "kcca", settings={"kernel": "poly"})


def test_kcca_with_all_landmarks_is_the_exact_dual():
    needs_cca_zoo()
    method = fitted(KCCA, "kcca", dim=5, settings={"ridge": 0.1, "landmarks": 120})
    unseen, _ = pairs(7, seed=3, widths=(9, 12))
    centre = np.eye(120) - 1 / 120
    rows = [Preparation() for _ in NAMES]
    views = [p.fit(FEATURES[name]) for p, name in zip(rows, NAMES)]
    raw = [rbf_kernel(view, gamma=bandwidth(view)) for view in views]
    kernels = [centre @ k @ centre for k in raw]
    kappas = [0.1 * np.trace(k) / 120 for k in kernels]  # r (N - 1), r = 0.1 trace of the covariance / 120 columns
    lifted = [np.linalg.inv(k + kappa * np.eye(120)) for k, kappa in zip(kernels, kappas)]
    values, vectors = np.linalg.eig(lifted[0] @ kernels[1] @ lifted[1] @ kernels[0])
    alpha = vectors[:, np.argsort(-values.real)[:5]].real
    test = rbf_kernel(rows[0].apply(unseen["GrayImg"]), views[0], gamma=bandwidth(views[0]))
    wanted = (test - raw[0].mean(0)) @ centre @ alpha
    wanted /= np.sqrt(np.diag(alpha.T @ (kernels[0] @ kernels[0] + kappas[0] * kernels[0]) @ alpha))
    found = method.transform("GrayImg", unseen["GrayImg"])
    assert np.abs(np.abs(found) / np.abs(wanted) / np.sqrt(119) - 1).max() < 1e-3


def test_kcca_chooses_a_ridge_where_pairs_differ_most_from_shuffled_ones():
    needs_cca_zoo()
    draw = np.random.default_rng(0)
    shared = draw.normal(size=(60, 2))
    wide = [np.concatenate([shared @ draw.normal(size=(2, 3)), 0.3 * draw.normal(size=(60, 50))], 1) for _ in range(2)]
    assert widest_gap(wide, 10, seed=0) >= 0.1  # with almost as many columns as rows, small ridges let noise correlate fully
    assert widest_gap([view[:, :3] for view in wide], 3, seed=0) == 0.001
    maps = fitted(KCCA, "kcca", dim=5, settings={"landmarks": 20}).maps
    assert np.array_equal(*(maps[name].component_indices_ for name in NAMES)) and len(set(maps["GrayImg"].component_indices_)) == 20
    rows = draw.normal(size=(9, 3))
    between = [np.linalg.norm(rows[i] - rows[j]) for i in range(9) for j in range(i)]
    assert bandwidth(rows) == pytest.approx(1 / (2 * np.median(between) ** 2))


def test_total_correlation_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(15, 3, generator=generator, dtype=torch.float64)
    b = a @ torch.randn(3, 3, generator=generator, dtype=torch.float64) + torch.randn(15, 3, generator=generator, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: TotalCorrelation.apply(x, y, 1e-3), (a, b), eps=1e-6, atol=1e-5)
    centred = [(rows - rows.mean(0)).detach().numpy() for rows in (a, b)]
    sxx, syy = (rows.T @ rows / 14 + 1e-3 * np.eye(3) for rows in centred)
    roots = [np.linalg.inv(sqrtm(s).real) for s in (sxx, syy)]
    wanted = np.linalg.svd(roots[0] @ centred[0].T @ centred[1] @ roots[1] / 14, compute_uv=False).sum()
    assert TotalCorrelation.apply(a, b, 1e-3).item() == pytest.approx(wanted, rel=1e-12)
    twin = torch.ones(15, 3, dtype=torch.float64) * a[:, :1]  # equal eigenvalues, where the decomposition has no derivative
    slopes = torch.autograd.grad(TotalCorrelation.apply(twin, b, 1e-3), (a, b))
    assert all(torch.isfinite(slope).all() for slope in slopes)


def test_noise_saturates_the_correlation_of_a_small_batch():
    noise = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    assert TotalCorrelation.apply(*noise, 1e-9).item() == pytest.approx(49, abs=1e-3)


def test_dcca_ends_with_a_linear_cca_of_all_training_outputs(recwarn):
    needs_cca_zoo()
    with pytest.warns(UserWarning, match="batches of 255 pairs and 64 dimensions"):
        DCCA(context_of("dcca", FEATURES, batch_size=255))
    DCCA(context_of("dcca", FEATURES, batch_size=256))
    assert not recwarn.list
    method = DCCA(context_of("dcca", FEATURES, dim=6))
    outputs = {name: torch.as_tensor(FEATURES[name][:, :6], dtype=torch.float32) for name in NAMES}
    assert torch.equal(method.represent("GrayImg", outputs["GrayImg"]), outputs["GrayImg"])  # untrained: as they are
    method.finish(lambda: outputs)
    model = ridge_cca([outputs[name].double().numpy() for name in NAMES], 6, 1e-3)
    for name, mean, weights in zip(NAMES, model.means_, model.weights_):
        wanted = (outputs[name].double().numpy() - mean) @ weights
        assert np.allclose(method.represent(name, outputs[name]).numpy(), wanted, atol=1e-5)
    again = DCCA(context_of("dcca", FEATURES, dim=6))
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.represent("PointCloud", outputs["PointCloud"]), method.represent("PointCloud", outputs["PointCloud"]))


def test_dccae_adds_the_squared_error_of_standardised_features():
    needs_cca_zoo()
    method = DCCAE(context_of("dccae", FEATURES, dim=4, batch_size=30, settings={"reconstruction": 0.01}))
    index, outputs = torch.arange(30) * 3, {name: torch.randn(30, 4) for name in NAMES}
    wanted = -TotalCorrelation.apply(*outputs.values(), 1e-3)
    for name in NAMES:
        rebuilt = method.decoders[name](outputs[name]).detach().numpy()
        wanted = wanted + 0.01 * ((standard(FEATURES[name])[index] - rebuilt) ** 2).sum() / 30
    assert method(index, outputs, 1).item() == pytest.approx(wanted.item(), rel=1e-5)
