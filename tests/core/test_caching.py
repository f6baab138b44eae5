"""Gradient caching: the gradient of the whole batch from micro-batches; statistics once an image; the same dropout twice."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import training_samples as samples

from geomssl import checkpoint, training
from geomssl.caching import Cache
from geomssl.encoders.expanded import Expanded


def cache_of(made, micro_batch=5):
    return Cache(made.encoder, made.passes, micro_batch, made.autocast)


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "micro_batch"),
    [*((case, 5) for case in samples.CASES), *((c, n) for c in ("ciper", "hssl inputs") for n in (1, 12, 1000))],
)
def test_the_gradient_is_the_plain_one(case, micro_batch):
    """Encoders where rows do not meet: without norms, or with norms in eval mode."""
    plain, cached = samples.learner(case), samples.learner(case)
    expected, found = samples.step(plain), samples.step(cached, cache=cache_of(cached, micro_batch))
    close(found["figures"], expected["figures"], 1e-12)
    close(found["gradients"], expected["gradients"], 1e-10)
    if "frozen" not in case:
        assert all(p.grad.abs().max() > 0 for p in cached.encoder.parameters())


def test_no_graph_of_the_encoder_is_kept():
    """What the caching is for: between the two passes nothing of the encoder's insides is alive."""
    made = samples.learner("simclr nt-xent")
    cache, sizes = cache_of(made), []
    made.encoder.second.register_forward_hook(lambda _, given, out: sizes.append((len(given[0]), out.requires_grad)))
    losses, _, _ = made(samples.batch(made), cache)
    assert [graph for _, graph in sizes] == [False] * 5
    assert all(p.grad is None for p in made.encoder.parameters())
    losses.total.backward()
    assert all(p.grad is None for p in made.encoder.parameters())
    cache.replay()
    assert [graph for _, graph in sizes] == [False] * 5 + [True] * 5
    assert sorted(n for n, _ in sizes[:5]) == [4, 5, 5, 5, 5]
    assert sizes[:5] == [(n, False) for n, _ in sizes[5:]]


def test_train_mode_norms_see_micro_batches_and_move_once_an_image():
    """The same as each micro-batch by itself in train mode, with the loss of all: written out here with plain autograd."""
    objective = {"objective": {"name": "simclr", "projector": [8, 6]}}
    cached, plain = (samples.learner("", encoder={"name": "cnn"}, **objective) for _ in range(2))
    before = {k: v.clone() for k, v in cached.encoder.state_dict().items()}
    found = samples.step(cached, cache=cache_of(cached, 8))

    made = samples.batch(plain)
    images = torch.cat([made.views["1"].images, made.views["2"].images])
    parts = [plain.encoder(images[i::3]) for i in range(3)]
    h = torch.stack([parts[i % 3][i // 3] for i in range(24)])
    from geomssl.losses import info_nce

    loss = info_nce(*plain.objective.projector(h).chunk(2), 2.0, "nt-xent", symmetric=True)
    loss.backward()
    close({"loss": found["figures"]["loss"]}, {"loss": loss.detach()}, 1e-12)
    wanted = {k: g for k, g in samples.gradients(plain).items() if not k.startswith("classifier")}
    close({k: found["gradients"][k] for k in wanted}, wanted, 1e-10)
    after = plain.encoder.state_dict()
    close(cached.encoder.state_dict(), after, 1e-12)
    assert cached.encoder.norms[0].num_batches_tracked - before["norms.0.num_batches_tracked"] == 3
    assert not torch.equal(after["norms.0.running_mean"], before["norms.0.running_mean"])


@pytest.mark.parametrize("encoder", ["c4-cnn", "hssl-mnist"])
def test_expanded_filters_are_worked_out_once_a_step_and_their_gradient_goes_back_once(encoder, monkeypatch):
    """In eval-mode norms it is the plain gradient to rounding; and a second step sees the weights of the first."""
    parts = {"widths": (2, 3, 4), **({"readout": "conv"} if encoder == "hssl-mnist" else {})}
    objective = {"objective": {"name": "hssl", "projector": [6, 4], "group": "rotation"}}
    cached, plain = (samples.learner("", encoder={"name": encoder, **parts}, **objective) for _ in range(2))
    calls, reals = [], []
    for name in ("expand", "collect"):
        for module in (m for m in cached.encoder.modules() if isinstance(m, Expanded)):
            key, real = (name, len(reals)), getattr(module, name)
            monkeypatch.setattr(module, name, lambda t, real=real, key=key: calls.append(key) or real(t))
            reals.append(real)
    for made in (cached, plain):
        for norm in (m for m in made.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.eval()
    for _ in range(2):
        calls.clear()
        found, expected = samples.step(cached, cache=cache_of(cached, 3)), samples.step(plain)
        close(found["gradients"], expected["gradients"], 1e-9)
        assert sorted(Counter(calls).values()) == [1] * len(calls)
        assert len(calls) == 2 * sum(isinstance(m, Expanded) for m in cached.encoder.modules())
        with torch.no_grad():
            for made in (cached, plain):
                for parameter in made.parameters():
                    parameter.mul_(0.9)
                made.zero_grad()
    assert all(m._held is None for m in cached.encoder.modules() if isinstance(m, Expanded))


def test_dropout_draws_the_same_twice_and_the_heads_draw_after_it():
    """Plain autograd over the same micro-batches from the same generator state gives the same gradient."""
    dropped = {"encoder": {"name": "training_samples:Smooth", "dropout": 0.5}}
    cached, plain = (samples.learner("simclr nt-xent", **dropped) for _ in range(2))
    for made in (cached, plain):
        made.objective.projector.append(nn.Dropout(0.3))
    torch.manual_seed(5)
    found = samples.step(cached, cache=cache_of(cached, 8))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    encoder = plain.encoder

    class Parts(nn.Module):
        def forward(self, images):
            parts = [encoder(images[i::3]) for i in range(3)]
            return torch.stack([parts[i % 3][i // 3] for i in range(len(images))])

    expected = samples.step(plain, model=lambda batch, _: plain(batch, Parts()))
    close(found["gradients"], expected["gradients"], 1e-10)
    assert torch.equal(state, torch.get_rng_state())


def test_what_the_proxy_does_not_define_is_the_encoders_own():
    made = samples.learner("hssl fibres")
    cache = cache_of(made)
    assert cache.dim == made.encoder.dim
    assert cache.second is made.encoder.second
    assert not list(cache.parameters())
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = cache.nothing_of_this_name


@pytest.mark.parametrize(
    "case",
    ["simclr norms in the head", "hssl fibres", "ciper", "essl", "vicreg", "sie", "reconstruction", "supervised", "frozen"],
)
def test_half_precision_reaches_the_encoder_and_its_losses_are_float32(case):
    """bf16 keeps 8 bits: gradients agree with float32 to a few per cent, cached and plain, and are not lost in the cast."""
    full, plain, cached = (samples.learner(case).float() for _ in range(3))
    plain.lower = cached.lower = torch.bfloat16
    types = []
    plain.encoder.second.register_forward_hook(lambda _, __, out: types.append(out.dtype))

    def step(made, cache=None):
        drawn = samples.batch(made)
        views = {k: v._replace(images=v.images.float(), params=v.params.float()) for k, v in drawn.views.items()}
        losses, classifier_loss, _ = made(type(drawn)(views, drawn.labels, drawn.indices, drawn.draw.float()), cache)
        assert losses.total.dtype == classifier_loss.dtype == torch.float32
        assert all(term.dtype == torch.float32 for term in losses.terms.values())
        (losses.total + classifier_loss).backward()
        if cache is not None:
            cache.replay()
        return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])

    expected, by_half, by_cache = step(full), step(plain), step(cached, cache_of(cached))
    assert set(types) == {torch.bfloat16}
    assert (by_half - expected).norm() < 0.1 * expected.norm()
    assert (by_cache - by_half).norm() < 0.1 * expected.norm()
    assert not torch.equal(by_half, expected)


def test_a_training_in_micro_batches_is_the_training(tmp_path, monkeypatch):
    """Through the trainer, and resumed in the middle; the size of the passes is on record."""
    chosen = {"epochs": 2, "batch_size": 512}
    plain = samples.recipe("simclr nt-xent", **chosen)
    cached = samples.recipe("simclr nt-xent", micro_batch=300, **chosen)
    torch.set_default_dtype(torch.float64)
    try:
        training.start(plain, tmp_path / "plain.pt", samples.CPU).run()
        training.start(cached, tmp_path / "cached.pt", samples.CPU).run(stop_after=1)
        training.resume(tmp_path / "cached.pt", samples.CPU, [{"encoder": {"name": plain.encoder.name}}]).run()
    finally:
        torch.set_default_dtype(torch.float32)
    one, two = checkpoint.load(tmp_path / "plain.pt"), checkpoint.load(tmp_path / "cached.pt")
    close(two["weights"], one["weights"], 1e-9)
    assert [row["micro_batch"] for row in two["history"]] == [300, 300]
    assert two["config"]["micro_batch"] == 300
    assert "micro_batch" not in one["history"][0]
