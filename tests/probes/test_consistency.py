"""Consistency: agreement, chance and kappa by hand; the constant network is called out; answers of all three kinds."""

import math

import pytest
import torch
from torch import nn

from geomssl import artifact, data, encoders
from geomssl.data.base import Resident
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.probes.consistency import Options, consistency, probe
from geomssl.probes.linear import wilson
from geomssl.probes.subject import Subject


def test_agreement_chance_and_kappa_by_hand():
    plain = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    moved = torch.tensor([[0, 0, 1, 1, 1, 2, 0, 0], [0, 0, 0, 1, 1, 2, 2, 2]])
    found = consistency(plain, moved)
    assert found.agreement.tolist() == [5 / 8, 1]
    chance = [(3 * 4 + 2 * 3 + 3 * 1) / 64, (9 + 4 + 9) / 64]
    assert found.chance.tolist() == pytest.approx(chance)
    kappa = [(5 / 8 - chance[0]) / (1 - chance[0]), 1]
    assert found.kappa.tolist() == pytest.approx(kappa)
    assert found.mean == pytest.approx(sum(kappa) / 2)
    assert (found.low[0], found.high[0]) == pytest.approx(wilson(5, 8))
    assert found.overall == pytest.approx((5 / 8 + 1) / 2)
    assert found.overall_low < found.overall < found.overall_high < 1
    assert found.kappa_low[0] <= kappa[0] <= found.kappa_high[0]
    assert not found.constant


def test_kappa_is_that_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    draw = torch.Generator().manual_seed(0)
    plain, moved = torch.randint(0, 7, (300,), generator=draw), torch.randint(2, 9, (4, 300), generator=draw)
    moved[0, ::2] = plain[::2]
    expected = [cohen_kappa_score(plain.numpy(), row.numpy()) for row in moved]
    assert consistency(plain, moved).kappa.tolist() == pytest.approx(expected)


def test_answers_drawn_apart_have_kappa_zero_and_the_interval_covers_it():
    draw, missed = torch.Generator().manual_seed(0), 0
    for seed in range(60):
        plain, moved = torch.randint(0, 4, (150,), generator=draw), torch.randint(0, 4, (1, 150), generator=draw)
        found = consistency(plain, moved, seed, resamples=300)
        missed += not float(found.kappa_low[0]) <= 0 <= float(found.kappa_high[0])
    # at 5 % a count of 11 or more has a chance below 1e-3
    assert missed <= 10


def test_names_of_answers_do_not_matter():
    draw = torch.Generator().manual_seed(0)
    plain, moved = torch.randint(0, 4, (80,), generator=draw), torch.randint(0, 4, (3, 80), generator=draw)
    names = torch.tensor([17, 3, 900, 42])
    one, two = consistency(plain, moved), consistency(names[plain], names[moved])
    assert one.kappa.tolist() == pytest.approx(two.kappa.tolist())
    assert one.mean_low == pytest.approx(two.mean_low)


@pytest.mark.parametrize("others", [0, 1, 4])
def test_one_answer_for_nearly_all_is_constant_and_never_consistent(others):
    plain = torch.zeros(100, dtype=torch.long)
    plain[:others] = 1
    found = consistency(plain, plain.expand(3, -1))
    assert found.agreement.tolist() == [1, 1, 1]
    assert found.constant
    assert found.largest == 1 - others / 100
    assert found.kappa.isnan().all() == (others == 0)
    spread = torch.arange(100) % 5
    assert consistency(spread, torch.zeros(3, 100, dtype=torch.long)).constant
    assert not consistency(spread, torch.stack([torch.zeros(100, dtype=torch.long), spread])).constant


class Lopsided(nn.Module):
    """Answers 0 for all but bright images, whatever is done to them."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3)) - 56.5 * 3 / 255], dim=1)


def test_agreement_stands_beside_chance_and_a_lopsided_network_is_told_to_be_judged_by_kappa():
    pixels = (torch.arange(64).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) * 3).to(torch.uint8)
    source = Resident("grey", "test", pixels, None)
    made = Subject(encoders.wrap(Lopsided(), in_channels=1), source, batch_size=64)
    found = probe(made, Options(answer="argmax"))
    assert found.metric("agreement").value == found.metric("kappa").value == 1
    assert found.metric("chance").value == pytest.approx((57 / 64) ** 2 + (7 / 64) ** 2)
    assert any("would stay by chance alone: judge by kappa" in note for note in found.notes)


def subject(name="c4-cnn", kind="phantoms", module=None, **parts):
    torch.manual_seed(0)
    made = {split: data.load(kind, split, size=16, n=60, bandwidth=0.4) for split in ("train", "test")}
    encoder = module or encoders.build(name, in_channels=1, widths=(4, 6, 8))
    return Subject(encoder, made["test"], train=made["train"], batch_size=16, provenance={"run": name}, **parts)


def columns(found):
    return found.table("elements").columns


def test_an_invariant_network_keeps_every_answer_and_a_plain_one_does_not(tmp_path):
    found = probe(subject(), Options())
    assert columns(found)["element"] == ["90°", "180°", "270°"]
    assert columns(found)["agreement"] == [1, 1, 1]
    assert (found.metric("kappa").value, found.metric("agreement_worst").value) == (1, 1)
    assert found.metric("agreement_worst").interval.low < 1
    assert found.metric("accuracy").value == found.metric("accuracy_moved").value == columns(found)["accuracy"][0]
    assert "accuracy" in found.headline
    again = artifact.load(found.save(tmp_path))
    assert again.to_json() == found.to_json()
    plain = probe(subject("cnn"), Options())
    assert plain.metric("kappa").value < 0.9
    assert plain.metric("agreement_worst").value == min(columns(plain)["agreement"])
    assert plain.metric("kappa").interval.low < plain.metric("kappa").value < plain.metric("kappa").interval.high


def test_the_answer_without_labels_is_the_nearest_training_image():
    made = subject("cnn")
    found = probe(made, Options(answer="neighbour", transform="rotate(5, 170)"))
    assert found.metric("kappa").value == pytest.approx(sum(columns(found)["kappa"]) / 2)
    index = torch.arange(60)
    gallery = nn.functional.normalize(made.features(index, "h", "train").double())
    plain = (nn.functional.normalize(made.features(index, "h").double()) @ gallery.T).argmax(1)
    turned = made.source.rendered.images(index, *spelled("rotate(5)", 60))
    moved = (nn.functional.normalize(made.encoder(turned).double()) @ gallery.T).argmax(1)
    assert columns(found)["agreement"][0] == pytest.approx(float((plain == moved).double().mean()), abs=1e-9)
    assert columns(found)["agreement"][0] > columns(found)["agreement"][1]
    assert any("neighbours are no classes" in note for note in found.notes)
    fields = subject("cnn", "fields")
    assert "cosine-similar" in probe(fields, Options(transform="rotate(5)")).definition


def spelled(text, n):
    from geomssl.transforms import parse

    found = parse(text)
    return found.transform, found.grid.expand(n, -1)


class Fixed(Encoder):
    """Outputs that do not depend on the image but by `slope`."""

    in_channels, dim = 1, 6

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def fibres(self, images):
        first = torch.arange(6, dtype=images.dtype).view(1, 6, 1, 1, 1)
        return first + self.slope * images[:, :, None, :1, :1]

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


@pytest.mark.parametrize("answer", ["linear", "neighbour", "argmax"])
def test_a_constant_network_is_called_out(answer, tmp_path):
    found = probe(subject(module=Fixed(0.0)), Options(answer=answer))
    assert columns(found)["agreement"] == [1, 1, 1]
    assert found.metric("kappa").value is None
    assert found.metric("agreement").value is found.metric("agreement_worst").value is None
    assert "nothing can be told" in found.headline
    assert "100% of the images get one" in found.metric("kappa").reason
    assert any("counts as constant" in note for note in found.notes)
    assert artifact.load(found.save(tmp_path)).to_json() == found.to_json()


class Brightest(Encoder):
    """The class is the quadrant with the most light: under a turn by 90 degrees the answer moves on by one."""

    in_channels, dim = 1, 4

    def fibres(self, images):
        quadrants = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return quadrants[:, [0, 2, 3, 1], None, None, None]

    def pool(self, fibres):
        return fibres.flatten(1)


def test_an_equivariant_answer_is_not_consistent():
    pixels = torch.randint(0, 256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = Resident("noise", "test", pixels, torch.zeros(80), [str(i) for i in range(4)])
    found = probe(Subject(Brightest(), source, provenance={"run": "r"}), Options(answer="argmax"))
    assert columns(found)["agreement"] == [0, 0, 0]
    assert found.metric("kappa").value < 0
    assert all(math.isfinite(v) for v in columns(found)["kappa"])


def test_more_outputs_than_classes_give_no_accuracy():
    made = subject(module=Brightest())
    made.source.classes = ("a", "b")
    found = probe(made, Options(answer="argmax"))
    assert [m.name for m in found.metrics] == ["kappa", "agreement", "agreement_worst", "chance", "largest_answer"]
    assert any("more outputs than" in note for note in found.notes)


def test_figures_do_not_depend_on_the_batch_and_follow_n_and_seed():
    one = probe(subject("cnn"), Options(n=30))
    made = subject("cnn")
    made.batch_size = 5
    assert columns(probe(made, Options(n=30))) == columns(one)
    assert one.metric("kappa").n == 30
    assert columns(probe(subject("cnn"), Options(n=30, seed=1))) != columns(one)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probe(subject(), Options(transform="rotat(3)")), "did you mean 'rotate'"),
        (lambda: probe(subject(), Options(transform="hue(0.1)")), "1 channels, which it leaves alone"),
        (lambda: probe(subject(), Options(transform="rotate(0)")), "besides the identity"),
        (lambda: probe(Subject(Fixed(1.0), subject().source), Options(answer="neighbour")), "--answer argmax"),
        (lambda: probe(subject(kind="fields"), Options(answer="linear")), "no labels"),
        (lambda: consistency(torch.zeros(1), torch.zeros(2, 1)), "at least 2"),
        (lambda: consistency(torch.zeros(3), torch.zeros(2, 2)), "(E, n)"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
