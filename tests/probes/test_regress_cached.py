"""R² is fitted on cached features alone: every image and every view passes the encoder once, however often it is asked."""

import torch

from geomssl.probes.regress import Options, probe


def test_the_encoder_sees_every_image_and_every_view_once(make_subject):
    subject = make_subject(n=40, known=90)
    twin, seen = subject.random_twin(), {"own": [], "twin": []}
    for name, encoder in (("own", subject.encoder), ("twin", twin.encoder)):
        encoder.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].detach().clone()))
    options = Options(of="transform", steps=4)
    first = probe(subject, options)
    for name in seen:
        images = torch.cat(seen[name])
        # both splits, plain and as the view that is regressed
        assert len(images) == 2 * (40 + 90)
        assert len(images.flatten(1).unique(dim=0)) == len(images)
    again = probe(subject, Options(of="transform", steps=4, hidden=16))
    assert sum(len(images) for images in seen["own"] + seen["twin"]) == 4 * (40 + 90)
    assert [m.name for m in again.metrics] == [m.name for m in first.metrics]
