"""Golden runs of H-SSL's modes: CPU steps through the trainer, on digits, beside the same steps from the paper's equations.

As in test_objective_golden the reference owns nothing of the package but the views, the step's uniform numbers and the first
weights: group convolutions fibre by fibre, scale filters from scipy, places and bundles image by image, all in float64.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.special import eval_hermitenorm

sys.path.insert(0, str(Path(__file__).parent))
from test_objective_golden import WHOLE, Reference, batchnorm, follows_the_equations, head, is_the_equations, linear

from geomssl import training
from geomssl.recipe import build

C4, CNN = {"name": "c4-cnn", "widths": [2, 3, 4]}, {"name": "cnn", "widths": [3, 4, 6]}
SCALE = {
    "name": "hssl-mnist", "group": "scale", "scales": [1.0, 1.4, 1.75], "widths": [2, 3, 4], "size": None, "kernel_size": 5,
}  # fmt: skip
SHIFTS = {"group": "translation", "projector": [7, 6]}
CASES = {
    "H-SSL": (C4, {}),
    "A-SSL": (C4, {"positives": "inputs"}),
    "A-SSL over shifts, a patch": (CNN, {**SHIFTS, "positives": "inputs", "base": 2}),
    "hybrid, two fibres, a norm before the head": (
        C4, {"positives": "both", "base": 2, "fibres_weight": 0.7, "inputs_weight": 2.0, "input_norm": True},
    ),
    "matched draws of both": (C4, {"positives": "both", "draws": "matched", "denominator": "decoupled"}),
    "DIM(L)": (CNN, {**SHIFTS, "critic": "bilinear"}),
    "GIM, near places": (CNN, {**SHIFTS, "critic": "bilinear", "distance": 1.0, "wrap": False, "denominator": "nt-xent"}),
    "H-SSL over scales": (SCALE, {"group": "scale", "base": 2}),
    "A-SSL over scales": (SCALE, {"group": "scale", "positives": "inputs"}),
    "BYOL": (C4, {"method": "byol", "momentum": 0.8, "predictor": 9, "base": 3}),
    "BYOL of both": (C4, {"method": "byol", "momentum": 0.8, "predictor": 9, "positives": "both"}),
    "SimSiam": (CNN, {**SHIFTS, "method": "simsiam", "predictor": 9}),
    "SimSiam of inputs, near turns": (
        C4, {"method": "simsiam", "predictor": 9, "positives": "inputs", "draws": "matched", "distance": 1, "metric": "group"},
    ),
}  # fmt: skip


def c4_maps(w, x):
    """Lifting: the filter turned by each g. Then y_g = sum over h of x_h with the filter of h - g, turned by g."""
    x = (x - 0.5) / 0.5
    for k in range(3):
        weight = w[f"encoder.convs.{k}.weight"]
        if k:
            before = [F.avg_pool2d(part, 2) for part in x.unbind(dim=2)]
            conv = [
                sum(F.conv2d(part, weight[:, :, (h - g) % 4].rot90(g, (2, 3)), padding=1) for h, part in enumerate(before))
                for g in range(4)
            ]
        else:
            conv = [F.conv2d(x, weight[:, :, 0].rot90(g, (2, 3)), padding=1) for g in range(4)]
        x = batchnorm(w, f"encoder.norms.{k}", torch.stack(conv, dim=2)).clamp(min=0)
    return x, x.amax(dim=2).mean(dim=(2, 3))


def cnn_maps(w, x):
    x = (x - 0.5) / 0.5
    for k in range(3):
        x = F.conv2d(F.avg_pool2d(x, 2) if k else x, w[f"encoder.convs.{k}.weight"], padding=1)
        x = batchnorm(w, f"encoder.norms.{k}", x).clamp(min=0)
    return x[:, :, None], x.mean(dim=(2, 3))


def functions(size, orders, scales):
    """psi_nm(s; y, x) on size x size pixels, over its norm at the smallest scale; in float32, as the layer keeps them."""
    found = torch.zeros(orders, orders, len(scales), size, size, dtype=torch.float64)
    for i, s in enumerate(scales):
        half = int(size * s / max(scales)) // 2
        t = torch.arange(-half, half + 1, dtype=torch.float64)
        bell = torch.exp(-t * t / (2 * s * s)) / s
        one = torch.stack([torch.from_numpy(eval_hermitenorm(n, (t / s).numpy())) * bell for n in range(orders)])
        inside = slice(size // 2 - half, size // 2 + half + 1)
        found[:, :, i, inside, inside] = torch.einsum("ny,mx->nmyx", one, one)
    found /= found[:, :, :1].square().sum(dim=(3, 4), keepdim=True).sqrt()
    return found.flatten(0, 1).float().double()


BASES = {orders: functions(size, orders, SCALE["scales"]) for orders, size in ((11, 11), (3, 5))}


def scale_maps(w, x):
    """Three networks side by side: each layer's coefficients meet the functions of one scale."""
    fibres = [(x - 0.5) / 0.5] * 3
    for k, (orders, stride, padding) in enumerate(((11, 1, 5), (3, 2, 2), (3, 2, 2))):
        weight, basis = w[f"encoder.convs.{k}.weight"], BASES[orders]
        conv = [
            F.conv2d(part, torch.einsum("ocb,byx->ocyx", weight, basis[:, s]), stride=stride, padding=padding)
            for s, part in enumerate(fibres)
        ]
        x = batchnorm(w, f"encoder.norms.{k}", torch.stack(conv, dim=2)).clamp(min=0)
        fibres = x.unbind(dim=2)
    return x, x.amax(dim=2).mean(dim=(2, 3))


MAPS = {"c4-cnn": c4_maps, "cnn": cnn_maps, "hssl-mnist": scale_maps}


def bundle(line, start, base, group):
    """z(p g0) of one image, line (C, places): on a ring, on a list, or a row of a map of 2 x 2 that goes over its edge."""
    if group == "translation":
        at = [start // 2 * 2 + (start % 2 + k) % 2 for k in range(base)]
    else:
        at = [(start + k) % line.shape[1] for k in range(base)]
    return torch.cat([line[:, p] for p in at])


def pair(u, places, config, grid):
    """Two places of an image from two numbers: any, or one by its share of the allowed pairs and one among its partners."""
    if config.distance is None:
        return [int(float(v) * places) for v in u]
    if grid:
        def apart(p, q):
            return (p // 2 - q // 2) ** 2 + (p % 2 - q % 2) ** 2
    else:
        def apart(p, q):
            return min((p - q) % places, (q - p) % places)
    allowed = [(p, q) for p in range(places) for q in range(places) if apart(p, q) <= config.distance]
    first = allowed[int(float(u[0]) * len(allowed))][0]
    own = [q for p, q in allowed if p == first]
    return first, own[int(float(u[1]) * len(own))]


def contrast(z1, z2, weight, config):
    """InfoNCE image by image, s(a, b) = cos(a, b) or a' W b; the denominators' terms one by one."""
    if weight is None:
        z1, z2 = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (z1, z2))
        weight = torch.eye(z1.shape[1], dtype=z1.dtype)
    views, n = (z1, z2), len(z1)
    s = {(j, m): config.beta * views[j] @ weight @ views[m].T for j in (0, 1) for m in (0, 1)}
    sides = [(0, 0), (0, 1)] + ([(1, 0), (1, 1)] if config.denominator == "pooled" else [])
    total = 0.0
    for i in range(n):
        others = torch.arange(n) != i
        below = torch.cat([s[side][i, others] for side in sides])
        if config.denominator == "nt-xent":
            below = torch.cat([below, s[0, 1][i, i][None]])
        total = total - (s[0, 1][i, i] - below.exp().sum().log()) / n
    return total


def cosine(a, b):
    return ((a * b).sum(dim=1) / (a.square().sum(dim=1).sqrt() * b.square().sum(dim=1).sqrt())).mean()


class Equations:
    """The loss of one mode, as a function of a dictionary of weights; `rows`: the draws of the step."""

    def __init__(self, encoder, config):
        self.maps, self.config = MAPS[encoder["name"]], config
        self.name = "objective.projector" if config.fibres == 1 else "objective.head"
        self.draw = None

    def projected(self, w, x):
        if not self.config.input_norm:
            return head(w, self.name, x, True)
        x = linear(w, f"{self.name}.1", batchnorm(w, f"{self.name}.0", x))
        x = linear(w, f"{self.name}.4", batchnorm(w, f"{self.name}.2", x).clamp(min=0))
        return batchnorm(w, f"{self.name}.5", x)

    def sides(self, n, places):
        """By loss: the rows of the pass of each view, and where their bundles start."""
        config, found, grid = self.config, {}, self.config.group == "translation"
        matched = config.draws == "matched"
        # on a list of scales a bundle starts where it ends inside
        places, u = places - (config.fibres - 1 if config.group == "scale" else 0), self.draw
        home = {"both": 2, "inputs": 0, "fibres": 0}[config.positives] if not matched else 0
        pairs = [pair(row[1:] if matched else row[:2], places, config, grid) for row in u] if u.shape[1] > 1 else []
        homes = [int(float(row[home]) * places) for row in u]
        if config.positives != "inputs":
            starts = [[(p[k] + g) % 4 if matched else p[k] for p, g in zip(pairs, homes, strict=True)] for k in (0, 1)]
            found["fibres"] = [(0, starts[0]), (0, starts[1])]
        if config.positives != "fibres":
            first = 0 if config.positives == "inputs" else n
            found["inputs"] = [(first, homes), (first + n, homes)]
        return found, pairs

    def __call__(self, w, views, labels):
        config = self.config
        names = {"fibres": ["plain"], "inputs": ["1", "2"], "both": ["plain", "1", "2"]}[config.positives]
        n = len(views["plain" if "plain" in views else "1"].images)
        if config.draws == "matched":
            x = views["plain"].images
            _, pairs = self.sides(n, 4)
            turned = [torch.stack([image.rot90(-p[k], (1, 2)) for image, p in zip(x, pairs, strict=True)]) for k in (0, 1)]
            images = torch.cat([*([x] if config.positives == "both" else []), *turned])
        else:
            images = torch.cat([views[name].images for name in names])
        if config.method == "byol":
            within = "objective.critic.target."
            aims = {k: k.removeprefix(within).replace("projector.", f"{self.name}.") for k in w if k.startswith(within)}
            with torch.no_grad():
                for key, own in aims.items():
                    w[key].copy_(config.momentum * w[key] + (1 - config.momentum) * w[own])
            target = {own: w[key].detach() for key, own in aims.items()}
        maps, pooled = self.maps(w, images)

        def line(z):
            return z.amax(dim=2).flatten(2) if config.group == "translation" else z.mean(dim=(3, 4))

        def pairs_of(z, sides):
            return torch.cat([
                torch.stack([bundle(z[first + i], start, config.fibres, config.group) for i, start in enumerate(starts)])
                for first, starts in sides
            ])

        fibres, total = line(maps), 0.0
        weights = {"fibres": config.fibres_weight, "inputs": config.inputs_weight}
        for name, sides in self.sides(n, fibres.shape[2])[0].items():
            z = self.projected(w, pairs_of(fibres, sides))
            if config.method == "infonce":
                loss = contrast(*z.chunk(2), w.get("objective.critic.weight"), config)
            else:
                q1, q2 = head(w, "objective.critic.predictor", z, False).chunk(2)
                if config.method == "simsiam":
                    t1, t2 = z.detach().chunk(2)
                    loss = -(cosine(q1, t2) + cosine(q2, t1)) / 2
                else:
                    t1, t2 = self.projected(target, pairs_of(line(self.maps(target, images)[0]), sides)).chunk(2)
                    loss = 2 - cosine(q1, t2) - cosine(q2, t1)
            total = total + (weights[name] if config.positives == "both" else 1.0) * loss
        return total, pooled[:n]


class Written(Reference):
    """The reference of one mode; a step's draws are told to it with the views."""

    def __init__(self, equations, learner, steps):
        super().__init__("simclr", learner, "sgd", steps)
        self.loss = equations
        self.trained = [key for key in self.w if ".target." not in key]

    def gradients(self, batch):
        self.loss.draw = batch.draw
        return super().gradients(batch)


def golden(case, double):
    encoder, objective = CASES[case]
    settings = {
        "epochs": 2, "batch_size": 40, "seed": 3, "train_share": 0.075, "encoder": encoder,
        "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
        "objective": {"name": "hssl", "projector": [6, 5], "beta": 2.0, **objective},
    }  # fmt: skip
    made = training.Trainer(build([settings]), "never.pt", torch.device("cpu"))
    made.save = lambda: None
    if double:
        made.learner.double().train()
    return made, Written(Equations(encoder, made.learner.objective.config), made.learner, 4)


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_every_mode_is_the_equations_step_by_step(case):
    follows_the_equations(*golden(case, False))


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_steps_of_every_mode_are_those_of_the_equations(case):
    made, reference = golden(case, True)
    config = made.learner.objective.config
    # what a BatchNorm after the next Linear takes away: of the norm before the head, and of the head before a predictor
    idle = {"objective.head.0.bias": WHOLE} if config.input_norm else {}
    if config.method != "infonce":
        idle[f"{reference.loss.name}.4.bias"] = WHOLE
    is_the_equations(made, reference, 40, idle)
