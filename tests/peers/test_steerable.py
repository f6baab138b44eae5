"""e2cnn and escnn: their own transforms say what this package's say, of features, of networks and of filters."""

import pytest
import torch

from geomssl.data.rendered import Fields
from geomssl.encoders import GroupConv2d, wrap
from geomssl.probes.equivariance import assert_equivariant, equivariance_error, equivariance_errors
from geomssl.probes.filters import asymmetry
from geomssl.transforms import CyclicRotations, Dihedral

pytestmark = pytest.mark.peers
# of exact networks in float64: the basis of escnn is sampled in float32
ROUNDING = {"e2cnn": 1e-12, "escnn": 2e-6}
GROUPS = {"c4": CyclicRotations(4), "d4": Dihedral(4), "c8": CyclicRotations(8)}


def images(n=6, size=12, seed=0, channels=1, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def others(group):
    return GROUPS[group].elements()[1:]


def exact(group):
    """Elements that only permute pixels of square images."""
    return [k for k in range(GROUPS[group].order) if GROUPS[group].is_exact(torch.tensor([[float(k)]]), (9, 9))]


class TestTransforms:
    @pytest.mark.parametrize("group", GROUPS)
    def test_images_and_features_move_alike_element_by_element(self, library, group):
        space, ours = library.space(group), GROUPS[group]
        fibres = torch.randn(2, 3, ours.order, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        pixels = images(2, 9)
        elements = list(space.fibergroup.elements)
        assert len(elements) == ours.order
        for k in exact(group):
            params = torch.full((2, 1), float(k))
            theirs = library.moved(fibres.flatten(1, 2), library.regular(space, 3), elements[k]).view_as(fibres)
            assert float((ours.act(fibres, params) - theirs).abs().max()) < 1e-6
            theirs = library.moved(pixels, library.trivial(space), elements[k])
            assert float((ours(pixels, params) - theirs).abs().max()) < 1e-6

    @pytest.mark.parametrize("library", ["escnn"], indirect=True)
    def test_turns_by_45_degrees_are_the_same_bilinear_reading(self, library):
        space, ours = library.space("c8"), GROUPS["c8"]
        field = images(2, 21, channels=16).unflatten(1, (2, 8))
        y, x = torch.meshgrid(*2 * [torch.arange(21.0) - 10], indexing="ij")
        inside = (y**2 + x**2).sqrt() < 9
        for k in (1, 3, 5, 7):
            theirs = library.moved(field.flatten(1, 2), library.regular(space, 2), list(space.fibergroup.elements)[k], order=1)
            gap = (ours.act(field, torch.full((2, 1), float(k))) - theirs.view_as(field)).abs()
            # their rotation matrix is kept in half precision
            assert float(gap[..., inside].max()) < 0.01


class TestTies:
    @pytest.mark.parametrize(
        ("group", "moves"), [("c2", ["180°"]), ("c4", ["90°", "180°"]), ("c8", ["90°", "180°"]), ("d4", None)]
    )
    def test_the_reader_finds_the_ties_between_their_regular_fields(self, library, group, moves):
        space = library.space(group)
        fields = library.regular(space, 3)
        for before, after in ((library.trivial(space, 2), fields), (fields, fields), (fields, library.trivial(space, 2))):
            layer = library.conv(before, after, bias=False).eval()
            found = asymmetry(layer.filter)
            for move in moves or found:
                assert found[move] < 1e-5
            loose = layer.filter + 0.1 * torch.rand_like(layer.filter)
            assert min(asymmetry(loose).values()) > 1e-3
            if group == "c2":
                assert found["90°"] > 0.05


class TestNetworks:
    @pytest.mark.parametrize("group", ["c4", "d4"])
    def test_an_exact_network_measures_as_exact_and_passes(self, library, steerable, group):
        model = steerable(group)
        found = equivariance_error(model, images(), GROUPS[group], others(group), "regular")
        assert found.exact.all()
        assert not found.degenerate.any()
        assert float(found.total.max()) < ROUNDING[library.name]
        assert float(found.action_size.min()) > 0.3
        single = wrap(model.float(), in_channels=1)
        single = equivariance_error(single, images().float(), GROUPS[group], others(group), "regular")
        assert float(single.total.max()) < 5e-6
        assert_equivariant(model, GROUPS[group], 1e-5, in_channels=1, size=11)
        for element in model.elements:
            assert model.theirs(images().float(), element) < 5e-6

    @pytest.mark.parametrize("group", ["c4", "d4"])
    def test_the_error_of_a_broken_network_is_the_one_by_their_transforms(self, steerable, group):
        # stride 2 at an even size lies differently from both ends
        model = steerable(group, stride=2)
        found = equivariance_error(model, images(), GROUPS[group], others(group), "regular")
        assert float(found.total[0]) > 0.5
        theirs = [model.theirs(images(), element) for element in model.elements[1:]]
        # one mirror, along a diagonal, still fits: there is nothing relative to say of its error
        assert found.total.tolist() == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    def test_a_declaration_in_the_other_direction_fails_but_for_the_half_turn(self, steerable):
        group = GROUPS["c4"]

        def backwards(features, params, size):
            moved = group.act(features, group.inverse(params)).flatten(1, 2)
            return group(moved, group.compose(params, params)).view_as(features)

        backwards.permutes = True
        # the maps turn the right way, the orientations the wrong way
        found = equivariance_error(steerable("c4"), images(), group, others("c4"), backwards)
        assert float(found.total[1]) < 2e-6
        assert float(found.total[[0, 2]].min()) > 0.5

    def test_their_transform_as_an_action_of_ones_own(self, steerable):
        model = steerable("c4")

        def theirs(features, params, size):
            flat = features.flatten(1, 2)
            for element in range(1, 4):
                rows = params[:, 0] == element
                if rows.any():
                    flat = flat.clone()
                    flat[rows] = model.library.moved(flat[rows], model.after, model.elements[element])
            return flat.view_as(features)

        theirs.permutes = True
        found = equivariance_error(model, images(), GROUPS["c4"], others("c4"), theirs)
        assert found.exact.all()
        assert float(found.total.max()) < 5e-6
        assert float(found.action_size.min()) > 0.3

    def test_every_layer_of_a_library_is_measured_by_its_channels(self, steerable):
        def by_channel(features, params, size):
            return GROUPS["c4"].act(features.flatten(1, -3).unflatten(1, (-1, 4)), params).view_as(features)

        by_channel.permutes = True
        found = equivariance_errors(steerable("c4"), images(), GROUPS["c4"], others("c4"), by_channel, ["body.*"])
        assert sorted(found) == ["body.0", "body.1", "body.2"]
        assert max(float(layer.total.max()) for layer in found.values()) < 2e-6

    def test_a_measurement_leaves_no_filters_behind(self, steerable):
        model = steerable("c4").train()
        before = set(model.state_dict())
        equivariance_error(model, images(), GROUPS["c4"], others("c4"), "regular")
        assert set(model.state_dict()) == before
        with torch.no_grad():
            first = model(images())
            for weight in model.parameters():
                weight.mul_(2)
            assert not torch.allclose(model(images()), first)


def test_eighth_turns_of_pictures_that_are_formulas(library, steerable):
    """T_g is exact at 45°, the maps are turned by interpolation: theirs and ours agree, and the bounds hold finer readings."""
    group, fields, params = GROUPS["c8"], Fields(8, 1, 33, 0.12, seed=3), others("c8")[:2]

    def pictures(k):
        return fields.images(torch.arange(8), group, torch.full((8, 1), float(k)), dtype=torch.float64)

    # the mask keeps what no border has reached
    model = steerable("c8", mask=33, kernel=7)
    found = equivariance_error(model, fields, group, params, "regular", resamples=500)
    assert found.exact.tolist() == [False, True]
    eighth, quarter = found.total.tolist()
    assert quarter < (1e-12 if library.name == "e2cnn" else 2e-5)
    assert 0.1 < eighth < 0.7
    # e2cnn reads by quadratic splines, escnn as it is told
    assert float(found.bounds.low[0]) < model.theirs(pictures(0), model.elements[1], pictures(1), order=3)
    assert float(found.bounds.high[0]) > model.theirs(pictures(0), model.elements[1], pictures(1), order=3)
    if library.name == "escnn":
        assert eighth == pytest.approx(model.theirs(pictures(0), model.elements[1], pictures(1), order=1), rel=1e-3)
    wrong = equivariance_error(model, fields, group, params, "spatial", resamples=500).total
    assert float(wrong[0]) > 1.3 * eighth
    assert float(wrong[1]) > 0.5


class TestFilters:
    def pair(self, library, group, lifting):
        """Their layer, in eval mode and float64, and ours of the same shape."""
        space, order = library.space(group), GROUPS[group].order
        before = library.trivial(space, 2) if lifting else library.regular(space, 2)
        theirs = library.conv(before, library.regular(space, 3), bias=True).double()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.normal_()
        ours = GroupConv2d(2, 3, 3, GROUPS[group], lifting=lifting, padding=1).double()
        values = images(2, 9, channels=2 if lifting else 2 * order)
        return theirs.eval(), ours, values

    def outputs(self, library, theirs, ours, values):
        with torch.no_grad():
            given = values if ours.lifting else values.unflatten(1, (2, ours.order))
            return theirs(library.nn.GeometricTensor(values, theirs.in_type)).tensor, ours(given).flatten(1, 2)

    @pytest.mark.parametrize("lifting", [True, False])
    @pytest.mark.parametrize("group", ["c4", "d4"])
    def test_ours_with_their_filter_gives_their_output(self, library, group, lifting):
        theirs, ours, values = self.pair(library, group, lifting)
        with torch.no_grad():
            ours.weight.copy_(theirs.filter.view(3, ours.order, 2, -1, 3, 3)[:, 0])
            ours.bias.copy_(theirs.expanded_bias.view(3, ours.order)[:, 0])
        a, b = self.outputs(library, theirs, ours, values)
        # their basis is sampled in float32
        assert float((a - b).abs().max() / a.abs().max()) < 1e-6

    @pytest.mark.parametrize("lifting", [True, False])
    @pytest.mark.parametrize("group", ["c4", "d4"])
    def test_theirs_with_our_filter_gives_our_output(self, library, group, lifting):
        theirs, ours, values = self.pair(library, group, lifting)
        with torch.no_grad():
            theirs.filter.copy_(ours.filters())
            theirs.expanded_bias.copy_(ours.bias.repeat_interleave(ours.order))
        a, b = self.outputs(library, theirs, ours, values)
        assert float((a - b).abs().max()) < 1e-12

    @pytest.mark.parametrize(("group", "numbers"), [("c4", 24), ("d4", 48)])
    def test_their_default_basis_holds_two_thirds_of_the_equivariant_filters(self, library, group, numbers):
        space = library.space(group)
        kind = library.regular(space, 1)
        assert library.conv(kind, kind, bias=False).weights.numel() == numbers
        assert GroupConv2d(1, 1, 3, GROUPS[group], bias=False).weight.numel() == numbers * 3 // 2


def test_two_elements_have_the_same_product_in_theirs_and_ours(library):
    """Γ_g Γ_h = Γ_gh with their Γ and our table."""
    for name, ours in GROUPS.items():
        space = library.space(name)
        elements = list(space.fibergroup.elements)
        turn = [torch.as_tensor(space.regular_repr(element), dtype=torch.float64) for element in elements]
        table = ours.compose(*(torch.cartesian_prod(*2 * [torch.arange(float(ours.order))])[:, i : i + 1] for i in (0, 1)))
        for place, product in enumerate(table.flatten().long().tolist()):
            g, h = divmod(place, ours.order)
            assert torch.allclose(turn[g] @ turn[h], turn[product], atol=1e-6)
