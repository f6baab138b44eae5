"""Layers in one pass: tokens, maps, vectors and groups of one model, pooling, padding and strides against closed forms."""

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.data.base import Resident
from geomssl.encoders import GroupConv2d, wrap
from geomssl.errors import GeomsslError
from geomssl.probes import power
from geomssl.probes.equivariance import Options, equivariance_error, equivariance_errors, probe
from geomssl.probes.looks import plan
from geomssl.probes.subject import Subject
from geomssl.reports.gate import Rule, Rules, evaluate
from geomssl.transforms import CyclicRotations, Translate, Translations

C4, SHIFT = CyclicRotations(4), Translations()
TURNS = C4.elements()[1:].double()


def images(n=6, size=8, channels=1, seed=0, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shifts(*rows):
    return torch.tensor(rows, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 5)
        self.double()

    def forward(self, x):
        x = self.conv2(self.pool(self.act(self.norm(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


class TinyViT(nn.Module):
    """Patches of 4x4, a class token and a register, one pre-norm block of attention; a position embedding if wanted."""

    def __init__(self, position=False, size=16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, 2, 8))
        self.position = nn.Parameter(torch.randn(1, (size // 4) ** 2 + 2, 8)) if position else None
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), self.embed(x).flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens if self.position is None else tokens + self.position
        return self.head(self.block(tokens)[:, 0])


class TestOnePass:
    def test_every_layer_has_the_figures_that_it_has_alone(self):
        net, x = Net(), images()
        params = shifts([2, 0], [1, 3])
        found = equivariance_errors(net, x, SHIFT, params, layers=["conv1", "norm", "pool", "conv2", "head"])
        assert list(found) == ["conv1", "norm", "pool", "conv2", "head"]
        for name, one in found.items():
            alone = equivariance_error(
                encoders.wrap(net, name, in_channels=1), x, SHIFT, params, "trivial" if name == "head" else "spatial"
            )
            for key in ("total", "floor", "action_size", "variance_share"):
                assert torch.allclose(getattr(one, key), getattr(alone, key), rtol=1e-9, atol=1e-13), (name, key)
            assert torch.allclose(one.interval.high, alone.interval.high, atol=1e-12)
            assert (one.low_any <= alone.low_any + 1e-12).all()

    def test_the_model_runs_as_often_for_all_layers_as_for_one(self):
        counts = []
        for layers in (["conv2"], ["all"]):
            net, seen = Net(), []
            net.conv1.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
            equivariance_errors(net, images(), SHIFT, shifts([2, 0], [4, 2]), layers=layers)
            counts.append(sum(seen))
        # A look at one image, a second look since a ReLU overwrites its input, and one pass plain and one an element.
        assert counts[0] == 1 + 6 * 3
        assert counts[1] == counts[0] + 1

    def test_keeping_no_features_changes_nothing(self):
        data = Resident("noise", "test", (images(n=9) * 255).to(torch.uint8), None)
        kept, again = (
            probe(Subject(Net(), data, dtype=torch.float64, batch_size=4, memory=memory), Options(layer=("conv*",)))
            for memory in (2**31, 0)
        )
        assert kept.table("elements").columns == again.table("elements").columns

    def test_all_layers_once_each_and_what_gives_no_feature_is_left_out(self):
        class Odd(Net):
            def __init__(self):
                super().__init__()
                self.never = nn.Linear(2, 2)
                self.drop = nn.Dropout(0.5)
                self.windows = nn.Flatten(0, 1)

            def forward(self, x):
                self.windows(x.repeat(1, 2, 1, 1))
                return self.drop(super().forward(x))

        data = Resident("noise", "test", (images() * 255).to(torch.uint8), None)
        found = probe(Subject(encoders.wrap(Odd(), in_channels=1), data), Options(layer="all"))
        layers = found.table("layers").columns
        assert layers["layer"] == ["conv1", "norm", "act", "pool", "conv2", "head"]
        assert layers["features"] == ["map"] * 5 + ["vector"]
        assert layers["stride"][:5] == [1.0, 1.0, 1.0, 2.0, 2.0]
        assert layers["field"][:5] == [3.0, 3.0, 3.0, 4.0, 8.0]
        assert any("left out" in note and "never" in note and "windows" in note for note in found.notes)
        assert len(found.table("elements")) == 6 * 3
        for layer, said in (("never", "never ran"), ("windows", "gives"), ("konv2", "'conv2'")):
            with pytest.raises(GeomsslError, match=said):
                probe(Subject(encoders.wrap(Odd(), in_channels=1), data), Options(layer=layer))


    def test_layers_of_which_the_crop_leaves_nothing_are_left_out_unless_they_were_named(self):
        data = Resident("noise", "test", (images() * 255).to(torch.uint8), None)
        made = Subject(encoders.wrap(Net(), in_channels=1), data)
        found = probe(made, Options(layer=("conv?", "head"), boundary="crop"))
        assert found.table("layers").columns["layer"] == ["conv1", "head"]
        assert found.table("layers").columns["kept"] == [36 / 64, 1.0]
        assert any("leaves nothing: conv2" in note for note in found.notes)
        for layers in (("conv1", "conv2"), ("conv2*",)):
            with pytest.raises(GeomsslError, match="leaves nothing of conv2"):
                probe(made, Options(layer=layers, boundary="crop"))


class TestTokens:
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
    def test_without_position_embedding_patches_move_with_wrapped_shifts_by_whole_patches(self, dtype, most):
        net = TinyViT().to(dtype)
        params = shifts([4, 0], [8, 4], [1, 0]).to(dtype)
        found = equivariance_errors(net, images(size=16, dtype=dtype), SHIFT, params, layers=["block", "embed", "head"])
        assert list(found) == ["embed", "block", "block[prefix]", "head"]
        for name in ("embed", "block"):
            assert found[name].exact.tolist() == [True, True, False]
            assert float(found[name].total[:2].max()) < most
            assert float(found[name].action_size[:2].min()) > 0.5
        # Class token and register, and what is read off them, do not move.
        for name in ("block[prefix]", "head"):
            assert float(found[name].total[:2].max()) < most
            assert float(found[name].total[2]) > 0.01

    def block(self, net, layer="block*"):
        """Artifact of the block's layers under shifts by whole patches, and what a gate says of it."""
        data = Resident("noise", "test", (images(size=16) * 255).to(torch.uint8), None)
        options = Options(layer=layer, transform="translations", draws=2, step=4)
        found = probe(Subject(wrap(net, in_channels=1), data, dtype=torch.float64), options)
        return found, evaluate([found], Rules(rule=(Rule(name="all", probe="equivariance", limit=0.01),)))[0]

    def test_a_class_token_that_has_seen_no_patch_is_told_apart_and_a_gate_over_all_layers_can_pass(self):
        for layer in ("block*", "all"):
            found, verdict = self.block(TinyViT(), layer)
            judged = set(found.table("elements").columns["layer"])
            assert found.table("unmixed").columns == {"layer": ["block.norm1[prefix]"], "shape": ["16"]}
            assert judged >= {"block", "block[prefix]", "block.norm1", "block.norm2[prefix]"}
            assert "block.norm1[prefix]" not in judged
            assert not any(found.table("elements").columns["degenerate"])
            assert any("constant by construction" in note and "block.norm1[prefix]" in note for note in found.notes)
            assert verdict.verdict == "pass"

    def test_tokens_that_are_constant_by_their_weights_are_no_such_tokens_and_never_pass(self):
        """Attention that gives nothing leaves the class token as it was; but a path is there, and no weight hides it."""
        net = TinyViT()
        for part in (net.block.self_attn.out_proj.weight, net.block.self_attn.out_proj.bias):
            nn.init.zeros_(part)
        found, verdict = self.block(net)
        assert found.table("unmixed").columns["layer"] == ["block.norm1[prefix]"]
        rows = found.table("elements").columns
        bad = {layer for layer, flat in zip(rows["layer"], rows["degenerate"], strict=True) if flat}
        assert {"block[prefix]", "block.norm2[prefix]"} <= bad
        assert (verdict.verdict, verdict.reason) == ("inconclusive", "degenerate")

    def test_the_power_of_a_gate_over_all_layers_is_told_without_them(self):
        data = Resident("noise", "test", (images(size=16) * 255).to(torch.uint8), None)
        subject = Subject(wrap(TinyViT(), in_channels=1), data, dtype=torch.float64)
        options = Options(layer="block*", transform="translations", draws=2, step=4, n=6)
        rows = power.measure(subject, options, 0.1, plan(6), 0.95, trials=4)
        assert rows.columns["trials"] == [4, 4, 4]

    @pytest.mark.parametrize("ruin", ["patches", "cleaned", "refused"])
    def test_nothing_is_set_apart_where_the_patches_are_constant_or_nothing_is_known(self, ruin):
        class Ruined(TinyViT):
            def forward(self, x):
                if ruin == "refused" and not bool(x.isfinite().all()):
                    raise ValueError("finite images only")
                return super().forward({"patches": 0 * x, "cleaned": x.nan_to_num(), "refused": x}[ruin])

        found, verdict = self.block(Ruined())
        assert "unmixed" not in [t.name for t in found.tables]
        assert (verdict.verdict, verdict.reason) == ("inconclusive", "degenerate")

    def test_with_position_embedding_they_do_not(self):
        found = equivariance_errors(
            TinyViT(position=True).double(), images(size=16), SHIFT, shifts([4, 0], [8, 4]), layers=["block", "head"]
        )
        assert float(found["block"].total.min()) > 0.3
        assert float(found["head"].total.min()) > 0.1


class TestPaddingPoolingAndStride:
    """What keeps equivariance and what breaks it, at sizes where each happens."""

    @pytest.mark.parametrize(("size", "kept"), [(8, True), (7, False)])
    def test_max_pooling_keeps_turns_where_its_windows_fill_the_image(self, size, kept):
        found = equivariance_error(nn.MaxPool2d(2), images(size=size), C4, TURNS, "spatial")
        assert (float(found.total.max()) == 0) is kept
        assert kept or float(found.total.min()) > 0.3
        wrapped = equivariance_error(nn.MaxPool2d(2), images(), SHIFT, shifts([2, 4], [1, 0]), "spatial")
        assert wrapped.exact.tolist() == [True, False]
        assert float(wrapped.total[0]) == 0 < float(wrapped.total[1])

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize(("padding", "kept"), [(0, True), (1, True), ("same", False)])
    def test_an_even_kernel_keeps_turns_unless_its_padding_is_one_sided(self, padding, kept):
        box = nn.Conv2d(1, 1, 2, padding=padding, bias=False).double()
        nn.init.ones_(box.weight)
        found = equivariance_error(box, images(), C4, TURNS, "spatial")
        assert (float(found.total.max()) < 1e-13) is kept
        assert kept or float(found.total.min()) > 0.2

    def test_zero_padding_is_felt_with_a_bias_and_not_without_where_the_object_stays_off_the_border(self):
        x = torch.nn.functional.pad(images(size=6), (5, 5, 5, 5))
        params = shifts([1, -1], [2, 0])
        for bias, kept in ((False, True), (True, False)):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, bias=False))
            if bias:
                nn.init.ones_(net[0].bias)
            found = equivariance_error(net.double(), x, Translate(), params, "spatial")
            assert (float(found.total.max()) < 1e-13) is kept
            cropped = equivariance_error(net.double(), x, Translate(), params, "spatial", boundary="crop")
            assert float(cropped.total.max()) < 1e-13
            assert float(cropped.kept.max()) < 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_strided_network_is_exact_at_multiples_of_its_stride_whatever_the_ratio_of_sizes_says(self, dtype):
        """33 pixels become 17: a shift by 2 is one feature pixel. Measured away from the border, it is exact."""
        torch.manual_seed(0)
        net = nn.Conv2d(1, 3, 3, stride=2, padding=1).to(dtype)
        x = images(size=33, dtype=dtype)
        found = equivariance_error(net, x, Translate(), shifts([2, 0], [-4, 2], [1, 0]).to(dtype), "spatial", boundary="crop")
        assert float(found.total[:2].max()) < (1e-13 if dtype == torch.float64 else 1e-6)
        assert float(found.total[2]) > 0.3

    def test_groups_are_found_at_the_layers_that_carry_them(self):
        encoder = encoders.build("c4-cnn", in_channels=1, widths=(2, 3, 4)).double()
        found = equivariance_errors(encoder, images(), C4, TURNS, layers=["convs.*", "fibres", "h"])
        assert list(found) == ["convs.0", "convs.1", "convs.2", "fibres", "h"]
        for name, one in found.items():
            assert float(one.total.max()) < 1e-12, name
        assert float(found["h"].action_size.max()) == 0 < float(found["convs.1"].action_size.min())

    def test_a_lifting_layer_of_the_wrong_direction_is_seen(self):
        class Wrong(nn.Module):
            group = C4

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.lift = GroupConv2d(1, 3, 3, C4, lifting=True, padding=1).double()

            def forward(self, x):
                return self.lift(x).flip(2)

        found = equivariance_errors(Wrong(), images(), C4, TURNS, layers=["fibres", "lift"])
        assert float(found["lift"].total.max()) < 1e-13
        assert float(found["fibres"].total[[0, 2]].min()) > 0.7
