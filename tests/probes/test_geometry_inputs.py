"""What the geometry probes say of input that they cannot use, or only in part: one line each, and no figure of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from geomssl.cli import main
from geomssl.errors import GeomsslError
from geomssl.probes import bound, kernel, local, rank, spectrum, tangent
from geomssl.probes.subject import Subject

PROBES = (rank, spectrum, bound, tangent, local, kernel)
PROJECTED = (bound, tangent, local, kernel)
# as little of each as says the same
QUICK = {
    rank: {"halves": 2, "views": 2}, spectrum: {"halves": 2}, bound: {"batches": 2}, tangent: {"halves": 2, "local": 8},
    local: {"local": 8}, kernel: {"draws": 20, "local": 8, "strengths": (1.0,)},
}


def ask(module: ModuleType, subject: Subject, **options: int):
    return module.probe(subject, module.Options(**{**QUICK[module], **options}))


def refused(module: ModuleType, subject: Subject, **options: int) -> GeomsslError:
    with pytest.raises(GeomsslError) as caught:
        ask(module, subject, **options)
    assert "\n" not in str(caught.value)
    return caught.value


class Planted(nn.Module):
    """Features by the mean of an image: changed where it is high, so that views are changed as well."""

    dim, in_channels, group = 12, 1, None

    def __init__(self, change: Callable[[Tensor], Tensor], threshold: float = 0.3) -> None:
        super().__init__()
        self.change, self.threshold = change, threshold
        self.mix = nn.Parameter(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        h = images.flatten(1) @ self.mix.to(images)
        where = images.flatten(1).mean(dim=1, keepdim=True) > self.threshold
        return torch.where(where, self.change(h), h)


@pytest.mark.parametrize("module", PROBES)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_by_name(module, number: float, make_subject) -> None:
    broken = Planted(lambda h: torch.full_like(h, number))
    error = refused(module, make_subject(encoder=broken))
    assert error.reason == "not-finite"
    # bound looks at the outputs alone
    assert ("projector outputs" if module is bound else "features h") in error.given
    assert "of 60 rows" in error.given


@pytest.mark.parametrize("module", PROBES)
def test_a_broken_projector_is_one_line(module, make_subject) -> None:
    error = refused(module, make_subject(projector=nn.Linear(9, 4)))
    assert error.reason == "bad-shape"
    assert "cannot take h of shape" in error.given
    assert error.expected == "a projector from h (n, 12) to z (n, p)"
    assert "outputs of shape (32, 12, 1)" in refused(module, make_subject(projector=nn.Unflatten(1, (12, 1)))).given
    holed = nn.Linear(12, 4)
    holed.weight.data[0] = math.nan
    error = refused(module, make_subject(projector=holed))
    assert error.reason == "not-finite"
    assert "features z" in error.given if module in (rank, spectrum) else "projector outputs" in error.given


class Root(nn.Module):
    """The identity by its values; the slope of a root at zero is infinite, times the slope 0 of what is in it."""

    def forward(self, h: Tensor) -> Tensor:
        return (0 * h).abs().sqrt() + h


@pytest.mark.parametrize("module", [tangent, local, kernel])
def test_a_projector_without_a_derivative_is_one_line(module, make_subject) -> None:
    error = refused(module, make_subject(projector=Root()))
    assert (error.reason, error.given) == ("not-finite", "a projector with a NaN or infinite derivative")


@pytest.mark.parametrize(("module", "least"), [(spectrum, 4), (tangent, 4), (local, 4), (kernel, 8)])
def test_too_few_images_are_refused_whether_the_split_or_n_is_small(module, least: int, make_subject) -> None:
    assert str(refused(module, make_subject(), n=least - 1)) == f"--n {least - 1}; expected at least {least} images"
    assert f"at least {least} for" in refused(module, make_subject(n=least - 1)).expected
    assert ask(module, make_subject(n=least)).metrics


@pytest.mark.parametrize("module", PROBES)
def test_images_whose_features_are_zero_are_counted(module, make_subject) -> None:
    subject = make_subject(encoder=Planted(torch.zeros_like), projector=nn.Linear(12, 5, bias=False), known=0)
    zero = int((subject.features(torch.arange(60), "h", view=None) == 0).all(dim=1).sum())
    seen = int((subject.features(torch.arange(60), "h", view=(subject.policy, 0, 1)) == 0).all(dim=1).sum())
    assert 0 < zero < 60 > seen > 0
    name, count = {
        rank: ("features h", zero), spectrum: ("h on plain images", zero), kernel: ("h", zero), tangent: ("h(1)", seen),
        local: ("h(1)", seen), bound: ("z(1)", seen),
    }[module]
    assert any(note.startswith(f"{name}: zero for {count} of 60 images") for note in ask(module, subject).notes)


@pytest.mark.parametrize("module", [tangent, local, kernel])
def test_collapsed_features_are_refused_by_the_name_of_the_layer(module, make_subject) -> None:
    flat = Planted(torch.ones_like, threshold=-1.0)
    assert refused(module, make_subject(encoder=flat)).given == "features h of 60 images, all equal"
    if module is not kernel:
        dead = nn.Sequential(nn.Linear(12, 4), nn.Threshold(1e9, 0.0))
        assert refused(module, make_subject(projector=dead)).given == "projector outputs of 60 images, all equal"


def test_collapse_is_said_of_few_images_too(make_subject) -> None:
    notes = ask(spectrum, make_subject(n=6, encoder=Planted(torch.ones_like, threshold=-1.0))).notes
    assert "h on plain images: the same for all images, up to rounding: collapsed to a point." in notes


def test_a_projector_that_is_constant_has_no_rank_and_all_of_h_for_its_kernel(make_subject) -> None:
    layer = nn.Linear(12, 5)
    layer.weight.data.zero_()
    found = ask(kernel, make_subject(projector=layer))
    assert (found.metric("nullity").value, found.metric("share_null").value, found.metric("share").value) == (12, 0, 0)
    assert found.metric("across").value is None
    assert "invariance" not in found.headline
    assert any("nothing passes" in note for note in found.notes)


def test_maps_that_are_zero_at_most_images_have_a_null_of_one(make_subject) -> None:
    """One unit that fires for few images: rank 0 at most h, so that a map of the mean rank explains nothing."""
    subject = make_subject()
    h = torch.cat([subject.features(torch.arange(60), view=(subject.policy, 0, k)) for k in (1, 2)])
    gate = nn.Linear(12, 1)
    gate.weight.data = torch.ones(1, 12)
    gate.bias.data = -h.sum(dim=1).quantile(0.8).reshape(1)
    found = ask(tangent, make_subject(projector=nn.Sequential(gate, nn.ReLU(), nn.Linear(1, 3))), local=60)
    null = found.metric("unexplained_null")
    assert 0 < found.metric("map_rank").value < 0.5
    assert (null.interval.low, null.interval.high) == (1.0, 1.0)
    assert found.metric("unexplained").value > 0.9


def test_views_that_lidar_cannot_divide_by_leave_the_rest_of_rank(make_subject) -> None:
    subject = make_subject(encoder=Planted(lambda h: 1e15 * h * (torch.arange(12) > 0), threshold=-1.0))
    found = ask(rank, subject)
    assert found.metric("effective_rank_h").value > 1
    assert found.metric("lidar_h").value is None
    assert "expected a larger delta" in found.metric("lidar_h").reason


def test_whose_batch_size_it_is_is_said(make_subject) -> None:
    subject = make_subject(n=40)
    assert "The batch size of the training is not known: batches of 40." in ask(bound, subject).notes
    subject.trained = {"batch_size": 64}
    assert any("training batch of 64 is larger than the 40 images" in note for note in ask(bound, subject).notes)
    subject.trained = {"batch_size": 16}
    assert not any("training batch" in note or "batch size" in note for note in ask(bound, subject).notes)


def test_every_probe_goes_on_past_one_that_features_are_too_poor_for(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("geomssl.commands.probing.names", lambda kind: ["tangent", "rank"])
    (tmp_path / "flat.py").write_text(
        "import torch\n"
        "class Flat(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.ones(len(x), 3)\n"
        "def made():\n"
        "    return Flat(), torch.nn.Linear(3, 2)\n"
    )
    words = ["probe", "all", "--model", f"{tmp_path}/flat.py:made", "--n", "20", "--quiet", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "tangent: left out: features h of 20 images, all equal" in said.err
    assert "rank of made" in said.out
