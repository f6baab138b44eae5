"""Critics: the log-bilinear one against an explicit sum, where the gradients of BYOL and SimSiam stop, and the target's way."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import training_samples as samples

from geomssl import checkpoint, training
from geomssl.errors import GeomsslError
from geomssl.losses import bilinear_info_nce, cosine_regression, info_nce

DENOMINATORS = ("decoupled", "nt-xent", "pooled")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def by_sum(z1, z2, w, beta, denominator):
    views, n, total = (z1, z2), len(z1), 0.0
    for i in range(n):
        others = [k for k in range(n) if k != i]
        sides = itertools.product((0, 1), (0, 1)) if denominator == "pooled" else ((0, 0), (0, 1))
        below = [torch.exp(beta * views[j][i] @ w @ views[m][k]) for j, m in sides for k in others]
        positive = beta * z1[i] @ w @ z2[i]
        below += [positive.exp()] if denominator == "nt-xent" else []
        total = total + (torch.stack(below).sum().log() - positive) / n
    return total


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_bilinear_critic_is_its_sum(denominator, symmetric):
    """W without symmetry, so that the order of its arguments shows; the gradient of every argument too."""
    z1, z2, w = torch.randn(5, 3), torch.randn(5, 3), torch.randn(3, 3)
    found = bilinear_info_nce(z1, z2, w, 0.7, denominator, symmetric)
    expected = by_sum(z1, z2, w, 0.7, denominator)
    if symmetric:
        expected = (expected + by_sum(z2, z1, w, 0.7, denominator)) / 2
    torch.testing.assert_close(found, expected)
    given = [t.clone().requires_grad_() for t in (z1, z2, w)]
    assert torch.autograd.gradcheck(lambda a, b, m: bilinear_info_nce(a, b, m, 0.7, denominator, symmetric), given)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_the_identity_on_unit_rows_is_the_cosine(denominator):
    z1, z2 = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    torch.testing.assert_close(
        bilinear_info_nce(z1, z2, torch.eye(4), 3.0, denominator), info_nce(z1, z2, 3.0, denominator)
    )


def test_a_critic_of_another_width_is_refused():
    z = torch.randn(4, 3)
    with pytest.raises(GeomsslError, match=r"shape \(2, 3\); expected \(3, 3\), as z"):
        bilinear_info_nce(z, z, torch.randn(2, 3))
    with pytest.raises(GeomsslError, match=r"expected two matrices \(N, p\)"):
        cosine_regression(z, z[:2])


def test_cosine_regression_by_hand():
    p, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    found = cosine_regression(p, t)
    torch.testing.assert_close(found, -torch.stack([p[i] @ t[i] / (p[i].norm() * t[i].norm()) for i in range(5)]).mean())
    found.backward()
    assert p.grad.abs().max() > 0
    assert t.grad is None
    assert cosine_regression(p.half(), t.half()).dtype == torch.float32


def learner(method, **more):
    objective = {"name": "hssl", "method": method, "projector": [8, 6], "predictor": 7, **more}
    return samples.learner("", objective=objective, **samples.SMOOTH)


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("stop", [True, False])
def test_simsiam_stops_at_the_other_side(stop):
    """The gradient is that of the loss written out with detached targets, and not that without."""
    made = learner("simsiam")
    found = samples.step(made)
    by_hand = learner("simsiam")
    batch, objective = samples.batch(by_hand), by_hand.objective
    line = objective.line(by_hand.encoder.fibres(batch.views["plain"].images))
    place = (batch.draw * 4).long()
    z = objective.projector(torch.cat([line[torch.arange(12), :, place[:, k]] for k in (0, 1)]))
    q = unit(objective.critic.predictor(z))
    z1, z2 = unit(z.detach() if stop else z).chunk(2)
    q1, q2 = q.chunk(2)
    loss = -((q1 * z2).sum(dim=1).mean() + (q2 * z1).sum(dim=1).mean()) / 2
    torch.testing.assert_close(found["figures"]["loss"], loss.detach())
    loss.backward()
    apart = max(float((g - h).abs().max()) for (k, g), h in zip(found["gradients"].items(), samples.gradients(by_hand).values(),
                                                              strict=True) if not k.startswith("classifier"))  # fmt: skip
    assert (apart < 1e-12) == stop


def test_byol_reaches_the_online_network_alone():
    """The target's numbers are constants: moving its weights by hand changes the loss, but nothing is sent there."""
    made = learner("byol")
    target = made.objective.critic.target
    found = samples.step(made)
    for name, gradient in found["gradients"].items():
        inside = ".target." in name
        assert (gradient is None) == inside, name
        assert inside or gradient.abs().max() > 0, name
    assert not any(p.requires_grad for p in target.parameters())
    batch, objective = samples.batch(made), made.objective
    place = (batch.draw * 4).long()
    rows = torch.arange(12)
    lines = [objective.line(e.fibres(batch.views["plain"].images)) for e in (made.encoder, target["encoder"])]
    z, t = (
        head(torch.cat([line[rows, :, place[:, k]] for k in (0, 1)]))
        for head, line in zip((objective.projector, target["projector"]), lines, strict=True)
    )
    (q1, q2), (t1, t2) = unit(objective.critic.predictor(z)).chunk(2), unit(t).chunk(2)
    loss = ((q1 - t2) ** 2).sum(dim=1).mean() / 2 + ((q2 - t1) ** 2).sum(dim=1).mean() / 2
    torch.testing.assert_close(found["figures"]["loss"], loss)


def test_the_target_follows_once_a_step_and_only_in_training():
    made = learner("byol", momentum=0.9)
    critic = made.objective.critic
    names = [n for n, _ in made.encoder.named_parameters()]
    before = [p.clone() for p in critic.target["encoder"].parameters()]
    samples.step(made)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.target["encoder"].parameters(), strict=True))
    with torch.no_grad():
        for p in made.encoder.parameters():
            p.add_(1.0)
    made.eval()
    made(samples.batch(made))
    made.train()
    with torch.no_grad():
        made(samples.batch(made))
    assert all(torch.equal(a, b) for a, b in zip(before, critic.target["encoder"].parameters(), strict=True))
    made(samples.batch(made))
    for name, a, b in zip(names, before, critic.target["encoder"].parameters(), strict=True):
        torch.testing.assert_close(b, 0.9 * a + 0.1 * made.encoder.get_parameter(name))


def test_byol_resumes_as_if_it_had_not_stopped(tmp_path):
    """Target, predictor and schedule lie in the checkpoint; with gradient caching."""
    chosen = samples.recipe(
        "", epochs=2, batch_size=1024, micro_batch=600, **samples.SMOOTH,
        objective={"name": "hssl", "method": "byol", "projector": [8, 6], "predictor": 7},
    )
    training.start(chosen, tmp_path / "whole.pt", samples.CPU).run()
    training.start(chosen, tmp_path / "cut.pt", samples.CPU).run(stop_after=1)
    training.resume(tmp_path / "cut.pt", samples.CPU, [samples.SMOOTH]).run()
    one, two = (checkpoint.load(tmp_path / f"{name}.pt")["weights"] for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert any("critic.target.encoder" in name for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    moved = one["objective.critic.target.encoder.first.weight"], one["encoder.first.weight"]
    assert not torch.equal(*moved)
