"""Subject: frozen and in eval mode, features computed once, views that do not depend on the batch size."""

import pytest
import torch
from torch import nn

from geomssl import data
from geomssl.encoders import wrap
from geomssl.errors import GeomsslError
from geomssl.probes.subject import Options, Subject
from geomssl.transforms import policy


class Counting(nn.Module):
    """Flattened pixels through a linear layer, BatchNorm and dropout, counting its images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.body(images)


def subject(**how):
    return Subject(wrap(Counting(), in_channels=1), data.load("digits", "test"), train=data.load("digits", "train"), **how)


def test_frozen_and_in_eval_mode():
    made = subject(projector=nn.Linear(5, 3))
    assert not any(m.training for m in (*made.encoder.modules(), *made.projector.modules()))
    assert not any(p.requires_grad for m in (made.encoder, made.projector) for p in m.parameters())


def test_features_are_computed_once():
    made = subject(projector=nn.Linear(5, 3))
    rows = torch.arange(50)
    counter = next(m for m in made.encoder.modules() if isinstance(m, Counting))
    h = made.features(rows)
    z = made.features(rows, "z")
    assert counter.seen == 50
    assert made.features(rows) is h
    torch.testing.assert_close(z, made.projector(h))
    assert made.features(rows, "pixels").shape == (50, 64)
    assert made.features(rows, "fibres").shape == (50, 5, 1, 1, 1)


def test_views_do_not_depend_on_the_batch_size():
    rows, drawn = torch.arange(40), policy("simclr")
    found = [subject(batch_size=b).features(rows, "pixels", view=(drawn, 3, 1)) for b in (7, 40)]
    torch.testing.assert_close(*found)
    other = subject().features(rows, "pixels", view=(drawn, 3, 2))
    assert not torch.allclose(other, found[0])


def test_views_of_another_policy_are_never_taken_from_the_cache():
    made, rows = subject(), torch.arange(20)
    found = [made.features(rows, "pixels", view=(policy(name), 0, 1)) for name in ("none", "simclr", "none", "small")]
    assert torch.equal(found[0], found[2])
    assert not any(torch.equal(found[0], other) for other in (found[1], found[3]))


def test_features_beyond_the_memory_limit_lie_on_disk_and_are_equal():
    rows = torch.arange(100)
    torch.manual_seed(0)
    small, large = subject(memory=100), subject()
    small.encoder.load_state_dict(large.encoder.state_dict())
    torch.testing.assert_close(small.features(rows), large.features(rows))
    assert small._spill is not None
    assert large._spill is None


def test_choose_is_seeded_sorted_and_without_repeats():
    made = subject()
    chosen = made.choose(Options(n=30, seed=1))
    assert torch.equal(chosen, made.choose(Options(n=30, seed=1)))
    assert torch.equal(chosen, chosen.unique())
    assert not torch.equal(chosen, made.choose(Options(n=30, seed=2)))
    assert len(made.choose(Options())) == 360


def test_what_is_missing_is_said():
    made = subject()
    made.train = None
    for ask, reason in [
        (lambda: made.need_projector("tangent"), "no-projector"),
        (lambda: made.need(1000, "an interval"), "too-few-images"),
        (lambda: made.choose(Options(n=1)), "too-few-images"),
        (lambda: made.features(torch.arange(3), part="train"), "no-split"),
    ]:
        with pytest.raises(GeomsslError) as caught:
            ask()
        assert caught.value.reason == reason
