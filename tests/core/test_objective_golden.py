"""Golden runs: four CPU steps of every objective through the trainer, on digits, beside the same steps from the equations.

The reference owns nothing of the package but the views and the first weights: encoder, heads, losses and optimizer are
functions of a dictionary of float64 tensors, and only autograd is torch's.
"""

import math
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F

from geomssl import training
from geomssl.recipe import build

SETTINGS = {
    "simclr": {}, "supervised": {}, "predictive": {"predictor": 24},
    "ciper": {"predictor": 24, "projector": [12, 10], "alpha": 0.7},
    "essl": {"projector": [12, 10], "predictor": [16]},
    "vicreg": {"projector": [16, 8]},
    "sie": {"half": 8, "projector": [16, 8]},
    "reconstruction": {"half": 8, "projector": [16, 8], "width": 16, "heads": 2, "depth": 2},
    "frozen": {},
}  # fmt: skip
OPTIMIZERS = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}, "adamw": {"lr": 1e-3, "weight_decay": 0.1},
}
WHOLE = slice(None)
# of parameters that the loss does not depend on: a key's bias adds one number to a whole row of a softmax
IDLE = {"reconstruction": {
    "objective.decoder.cross.kv.bias": slice(0, 16), "objective.decoder.blocks.0.attn.qkv.bias": slice(16, 32),
}}


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def standard(x, axes, eps):
    mean = x.mean(dim=axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=axes, keepdim=True) + eps).sqrt()


def norm(w, name, x, eps=1e-5):
    """LayerNorm over the last axis."""
    return standard(x, -1, eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def batchnorm(w, name, x):
    shape = (1, -1) + (1,) * (x.dim() - 2)
    axes = (0, *range(2, x.dim()))
    return standard(x, axes, 1e-5) * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def maps(w, x):
    x = (x - 0.5) / 0.5
    for k in range(3):
        x = F.avg_pool2d(x, 2) if k else x
        x = batchnorm(w, f"encoder.norms.{k}", F.conv2d(x, w[f"encoder.convs.{k}.weight"], padding=1)).clamp(min=0)
    return x


def encode(w, *views):
    return maps(w, torch.cat(views)).mean(dim=(2, 3)).split([len(v) for v in views])


def head(w, name, x, last_norm):
    """Linear, BatchNorm, ReLU, Linear, and BatchNorm again where last_norm."""
    x = linear(w, f"{name}.3", batchnorm(w, f"{name}.1", linear(w, f"{name}.0", x)).clamp(min=0))
    return batchnorm(w, f"{name}.4", x) if last_norm else x


def hidden(w, name, x):
    """Linear, LayerNorm, ReLU, Linear."""
    return linear(w, f"{name}.3", norm(w, f"{name}.1", linear(w, f"{name}.0", x)).clamp(min=0))


def nt_xent(z1, z2, beta=2.0):
    z = torch.cat([z1, z2])
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    n, scores = len(z1), beta * z @ z.T
    exponents = scores.exp() * (1 - torch.eye(2 * n))
    return -(scores[range(2 * n), [*range(n, 2 * n), *range(n)]] - exponents.sum(dim=1).log()).mean()


def entropy(logits, labels):
    return -(logits - logits.exp().sum(dim=1, keepdim=True).log())[range(len(labels)), labels].mean()


def spread(z):
    return (1 - (z.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean()


def vicreg(z1, z2):
    """The three terms of the authors' code."""
    covariance = sum((torch.cov(z.T) * (1 - torch.eye(z.shape[1]))).square().sum() / z.shape[1] for z in (z1, z2))
    return (z1 - z2).square().mean(), (spread(z1) + spread(z2)) / 2, covariance


def targets(view):
    """The parameters that act on one channel (crop, flip, brightness, contrast), standardised over the batch."""
    r = view.params[:, :7]
    deviation = r.std(dim=0, correction=0)
    return torch.where(deviation > 1e-6, (r - r.mean(dim=0)) / deviation.clamp(min=1e-6), 0)


def prediction(w, h0, h1, h2, v):
    errors = [hidden(w, "objective.predictor", h0 - h) - targets(v[k]) for h, k in ((h1, "1"), (h2, "2"))]
    return torch.cat(errors).square().mean()


def simclr(w, v, labels):
    h1, h2 = encode(w, v["1"].images, v["2"].images)
    return nt_xent(linear(w, "objective.projector.0", h1), linear(w, "objective.projector.0", h2)), h1


def supervised(w, v, labels):
    h = encode(w, v["1"].images)[0]
    return entropy(linear(w, "objective.classifier", h), labels), h


def predictive(w, v, labels):
    h0, h1, h2 = encode(w, *(v[k].images for k in ("plain", "1", "2")))
    return prediction(w, h0, h1, h2, v), h0


def ciper(w, v, labels):
    h0, h1, h2 = encode(w, *(v[k].images for k in ("plain", "1", "2")))
    z1, z2 = head(w, "objective.projector", torch.cat([h1, h2]), True).chunk(2)
    return nt_xent(z1, z2) + 0.7 * prediction(w, h0, h1, h2, v), h0


def essl(w, v, labels):
    turned = [v["turned"].images.rot90(k, (2, 3)) for k in range(4)]
    h1, h2, *others = encode(w, v["1"].images, v["2"].images, *turned)
    z1, z2 = head(w, "objective.projector", torch.cat([h1, h2]), True).chunk(2)
    told = [entropy(hidden(w, "objective.predictor", h), torch.full((len(h),), k)) for k, h in enumerate(others)]
    return nt_xent(z1, z2) + 0.4 * sum(told) / 4, h1


def vicregs(w, v, labels):
    h1, h2 = encode(w, v["1"].images, v["2"].images)
    invariance, variance, covariance = vicreg(*head(w, "objective.projector", torch.cat([h1, h2]), False).chunk(2))
    return 25 * invariance + 25 * variance + covariance, h1


def code(r, size=8):
    """The parameters of `equivariant` that act on one channel, 0 at the identity."""
    y, x, height, width, flip, angle, dy, dx, brightness, contrast, _, _, sigma = r.T
    sides = [torch.where(side == 0, 0.0, side / size - 1) for side in (height, width)]
    rest = [flip, angle / 90, dy / size, dx / size, (brightness - 1) / 0.4, (contrast - 1) / 0.4, sigma / 2]
    return torch.stack([y / size, x / size, *sides, *rest], dim=1)


def sie(w, v, labels):
    h1, h2 = encode(w, v["1"].images, v["2"].images)
    y = torch.cat([h1, h2]) @ w["objective.projector.halves.map.weight"].T
    i1, i2 = head(w, "objective.projector.head", y[:, :8], False).chunk(2)
    e1, e2 = head(w, "objective.equivariant", y[:, 8:], False).chunk(2)
    matrices = torch.eye(8) + hidden(w, "objective.predictor.net", code(v["2"].params)).view(-1, 8, 8)
    moved = torch.einsum("nij,nj->ni", matrices, e1)
    _, variance, covariance = vicreg(torch.cat([i1, e1], dim=1), torch.cat([i2, e2], dim=1))
    pulled = 25 * (i1 - i2).square().mean() + 25 * (moved - e2).square().mean()
    return pulled + 25 * (variance + spread(moved) / 2) + covariance, h1


def attention(q, k, v):
    """Two heads of eight numbers each."""
    parts = [torch.softmax(q[..., a] @ k[..., a].mT / math.sqrt(8), dim=2) @ v[..., a] for a in (slice(0, 8), slice(8, 16))]
    return torch.cat(parts, dim=2)


def gelu_mlp(w, name, x):
    x = linear(w, f"{name}.fc1", x)
    return linear(w, f"{name}.fc2", x * (1 + torch.erf(x / math.sqrt(2))) / 2)


def places(side=2, width=16):
    """Sines and cosines of the column, then of the row; kept in float32, as the decoder keeps them."""
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [[at / 10000 ** (k / (width // 4)) for k in range(width // 4)] for at in (column, row)]
            rows.append([f(a) for part in angles for f in (math.sin, math.cos) for a in part])
    return torch.tensor(rows)


def reconstruction(w, v, labels):
    seen = v["2"].images
    x = maps(w, torch.cat([v["1"].images, seen]))
    h1, h2 = x.mean(dim=(2, 3)).chunk(2)
    split = w["objective.projector.halves.map.weight"]
    z1, z2 = head(w, "objective.projector.head", torch.cat([h1, h2]) @ split[:8].T, False).chunk(2)
    invariance, variance, covariance = vicreg(z1, z2)
    e1, e2 = hidden(w, "objective.equivariant", x.flatten(2).mT @ split[8:].T).chunk(2)
    d, b = "objective.decoder", "objective.decoder.blocks.0"
    keys, values = linear(w, f"{d}.cross.kv", e1).chunk(2, dim=2)
    t = linear(w, f"{d}.cross.proj", attention(linear(w, f"{d}.cross.q", e2), keys, values)) + places()
    t = t + gelu_mlp(w, f"{d}.mlp", norm(w, f"{d}.norm", t))
    t = t + linear(w, f"{b}.attn.proj", attention(*linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", t, 1e-6)).chunk(3, dim=2)))
    t = t + gelu_mlp(w, f"{b}.mlp", norm(w, f"{b}.norm2", t, 1e-6))
    patches = linear(w, f"{d}.pixels", norm(w, f"{d}.last", t)).view(-1, 2, 2, 4, 4)
    painted = torch.cat([torch.cat(list(row.unbind(dim=1)), dim=2) for row in patches.unbind(dim=1)], dim=1)[:, None]
    return 25 * invariance + 25 * variance + covariance + 25 * (painted - seen).square().mean(), h1


def frozen(w, v, labels):
    # running statistics as they start: the encoder stays in eval mode
    x = (v["plain"].images - 0.5) / 0.5
    for k in range(3):
        x = F.avg_pool2d(x, 2) if k else x
        x = (F.conv2d(x, w[f"encoder.convs.{k}.weight"], padding=1) / math.sqrt(1 + 1e-5)).clamp(min=0)
    return torch.zeros(()), x.mean(dim=(2, 3))


EQUATIONS = {
    "simclr": simclr, "supervised": supervised, "predictive": predictive, "ciper": ciper, "essl": essl, "vicreg": vicregs,
    "sie": sie, "reconstruction": reconstruction, "frozen": frozen,
}


class Reference:
    """The weights of a run and the state of its optimizers; one step at a time."""

    def __init__(self, name, learner, optim, steps=4):
        self.loss, self.optim, self.steps, self.t = EQUATIONS[name], optim, steps, 0
        self.w = {key: p.detach().double().clone().requires_grad_() for key, p in learner.named_parameters()}
        self.m = {key: torch.zeros_like(p) for key, p in self.w.items()}
        self.v = {key: torch.zeros_like(p) for key, p in self.w.items()}
        self.trained = [key for key in self.w if name != "frozen" or key.startswith("classifier.")]

    def gradients(self, batch):
        """The loss, and the gradient of every trained weight: the classifier's from its own loss on h as it is."""
        total, h = self.loss(self.w, batch.views, batch.labels)
        whole = total + entropy(linear(self.w, "classifier", h.detach()), batch.labels)
        found = torch.autograd.grad(whole, [self.w[key] for key in self.trained], allow_unused=True)
        return float(total.detach()), dict(zip(self.trained, found, strict=True))

    @torch.no_grad()
    def step(self, batch):
        with torch.enable_grad():
            total, found = self.gradients(batch)
        cosine = (1 + math.cos(math.pi * self.t / self.steps)) / 2
        self.t += 1
        for key, g in found.items():
            w, m, v = self.w[key], self.m[key], self.v[key]
            if key.startswith("classifier."):
                m.copy_(0.9 * m + g)
                w -= 0.1 * cosine * m
            elif self.optim == "sgd":
                m.copy_(0.9 * m + g + 5e-4 * w)
                w -= 0.01 * cosine * m
            else:
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                w *= 1 - 1e-3 * cosine * 0.1
                w -= 1e-3 * cosine * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return total


def doubled(batch):
    views = {name: v._replace(images=v.images.double(), params=v.params.double()) for name, v in batch.views.items()}
    return type(batch)(views, batch.labels, batch.indices, batch.draw, batch.factors)


def follow(made, tell, change=lambda batch: batch):
    """Let `tell` see every batch that the trainer makes, after `change`."""
    make = made._batch

    def batch(*args, **given):
        found = change(make(*args, **given))
        tell(found)
        return found

    made._batch = batch


def trainer(name, optim="sgd"):
    settings = {
        "epochs": 2, "batch_size": 512, "seed": 3,
        "encoder": {"name": "cnn", "widths": [4, 8, 8]}, "optim": {"name": optim, **OPTIMIZERS[optim]},
        "objective": {"name": name} | SETTINGS[name],
    }
    made = training.Trainer(build([settings]), "never.pt", torch.device("cpu"))
    made.save = lambda: None
    return made


def follows_the_equations(made, reference):
    """As a user trains, in float32: each epoch's mean loss is that of the reference in float64 on the same views."""
    totals = []
    follow(made, lambda batch: totals.append(reference.step(doubled(batch))))
    rows = made.run()
    assert len(totals) == 4
    assert [row["loss"] for row in rows] == pytest.approx([sum(totals[:2]) / 2, sum(totals[2:]) / 2], rel=2e-5)
    return rows


def is_the_equations(made, reference, n=256, idle=MappingProxyType({})):
    """In float64: the gradient of every parameter, zeros included, and all weights after four steps."""
    follow(made, lambda batch: None, doubled)
    batch = made._batch(torch.arange(n), 0, 0)
    losses, classifier_loss, _ = made.learner(batch)
    total, expected = reference.gradients(batch)
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-12)
    (losses.total + classifier_loss).backward()
    for key, parameter in made.learner.named_parameters():
        if key not in reference.trained:
            assert parameter.grad is None, key
            continue
        scale = float(expected[key].abs().max())
        if idle.get(key) == WHOLE:
            assert max(scale, float(parameter.grad.abs().max())) < 1e-12, f"something reaches {key}"
            continue
        assert scale > 1e-9, f"nothing reaches {key}"
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-8, atol=1e-10 * scale, msg=f"gradient of {key}")
        assert not parameter.grad[idle.get(key, slice(0, 0))].abs().gt(1e-10 * scale).any()
    made.learner.zero_grad()
    totals = []
    follow(made, lambda batch: totals.append(reference.step(batch)))
    for _ in range(2):
        made._epoch()
        made.epoch += 1
    assert len(totals) == 4
    for key, parameter in made.learner.named_parameters():
        torch.testing.assert_close(parameter.detach(), reference.w[key].detach(), rtol=1e-7, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_equations_step_by_step(name):
    made = trainer(name)
    rows = follows_the_equations(made, Reference(name, made.learner, "sgd"))
    if name != "frozen":
        assert rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("name", "optim"), [*((name, "sgd") for name in SETTINGS), ("sie", "adamw"), ("reconstruction", "adamw")]
)
def test_gradients_and_steps_are_those_of_the_equations(name, optim):
    made = trainer(name, optim)
    made.learner.double().train()
    is_the_equations(made, Reference(name, made.learner, optim), idle=IDLE.get(name, {}))
