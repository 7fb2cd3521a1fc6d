"""After erasure no linear model beats a constant, and no affine map with that property changes the rows less."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from chassis_kernels import ConceptErasure


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def problem(n=600, d=10, classes=3):
    labels = torch.randint(classes, (n,))
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    return x + 2 * torch.randn(classes, d, dtype=torch.float64)[labels] + 5, labels


def test_linear_classifiers_and_ridge_are_left_with_chance():
    x, labels = problem()
    before = LogisticRegression(max_iter=2000).fit(x.numpy(), labels.numpy())
    assert before.score(x.numpy(), labels.numpy()) > 0.7
    eraser = ConceptErasure(n_classes=3).partial_fit(x[:250], labels[:250]).partial_fit(x[250:], labels[250:])
    erased = eraser.transform(x)
    after = LogisticRegression(C=1e6, max_iter=2000).fit(erased.numpy(), labels.numpy())
    chance = float(labels.bincount().max()) / len(labels)
    assert after.score(erased.numpy(), labels.numpy()) == pytest.approx(chance, abs=1e-9)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    assert Ridge(1e-6).fit(erased.numpy(), one_hot.numpy()).score(erased.numpy(), one_hot.numpy()) < 1e-10
    assert eraser.rank_ == 2  # three classes differ in two directions
    torch.testing.assert_close(erased.mean(0), x.mean(0))
    np.testing.assert_allclose(eraser.mean_, x.mean(0), rtol=1e-9)
    expected = x - (x - x.mean(0)) @ torch.as_tensor(eraser.projection_).T
    torch.testing.assert_close(erased, expected, rtol=1e-10, atol=1e-10)


def test_the_change_is_the_least_that_does_it():
    """The least tr(P S Pᵀ) under P C = C: feasible, and orthogonal in the metric S to every feasible direction."""
    x, labels = problem()
    concept = torch.nn.functional.one_hot(labels, 3).double()
    P = torch.as_tensor(ConceptErasure().fit(x, concept).projection_)
    centred = x - x.mean(0)
    S, C = centred.T @ centred, centred.T @ (concept - concept.mean(0))
    torch.testing.assert_close(P @ C, C, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(P @ P, P, rtol=1e-8, atol=1e-8)
    least = (P @ S @ P.T).trace()
    outside = torch.eye(10, dtype=torch.float64) - C @ torch.linalg.pinv(C, rtol=1e-9)
    for _ in range(20):
        direction = torch.randn(10, 10, dtype=torch.float64) @ outside  # direction @ C = 0
        assert abs(float((direction @ S @ P.T).trace())) < 1e-6 * float(least)
        other = P + 0.1 * direction
        assert (other @ S @ other.T).trace() > least
    basis = torch.linalg.qr(C[:, :2])[0]
    orthogonal = basis @ basis.T  # what removing the class means by an orthogonal projection would change
    assert (orthogonal @ S @ orthogonal.T).trace() > 1.01 * least


def test_concepts_in_numbers_singular_rows_and_nothing_to_erase():
    x, _ = problem()
    concept = x[:, :2] @ torch.randn(2, 1, dtype=torch.float64) + torch.randn(600, 1, dtype=torch.float64)
    singular = torch.cat([x, x[:, :3] - x[:, 3:6]], 1)
    for dtype, left in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        eraser = ConceptErasure().fit(singular.to(dtype), concept.to(dtype))
        erased = eraser.transform(singular.to(dtype)).double()
        assert eraser.rank_ == 1
        correlations = torch.corrcoef(torch.cat([erased, concept], 1).T)[-1, :-1]
        assert correlations.abs().max() < left
        torch.testing.assert_close(erased[:, 10:], erased[:, :3] - erased[:, 3:6], rtol=1e-2 * left**0.5, atol=left)
    torch.testing.assert_close(ConceptErasure().fit(x, torch.ones(600)).transform(x), x)


def test_class_ids_are_checked():
    x, labels = problem()
    for y in (labels + 1, labels - 1, labels + 0.5, torch.stack([labels, labels], 1)):
        with pytest.raises(ValueError, match="expected one class id per row, from 0 to 2"):
            ConceptErasure(3).fit(x, y)


@pytest.mark.filterwarnings("ignore:Estimator ConceptErasure does not inherit")
@parametrize_with_checks([ConceptErasure(), ConceptErasure(4)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
