"""Scenes and their captions: what is drawn, what is said, and who understands it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcl.data.scenes import CAPTION_LENGTH, Scenes, load_scenes
from fastcl.data.tokens import PADDING, START
from fastcl.encoders import LSTMCaptioner
from fastcl.evaluation.captions import listener_recall, self_retrieval


def test_scenes_are_distinct_and_described():
    splits = load_scenes(2)
    parts = [
        {tuple(scene.flatten().tolist()) for scene in part.objects}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert [len(part) for part in parts] == [1152, 128, 256]
    assert len(splits.train) == 2 * 1152
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    images, objects = splits.test.images[:20], splits.test.objects[:20]
    captions = splits.test.captions()
    colours = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}
    for image, scene, caption in zip(images, objects, captions, strict=False):
        for part, (_, _, place) in zip(caption.split(" and "), scene.tolist(), strict=True):
            _, colour, _, vertical, horizontal = part.split()
            assert (vertical == "bottom", horizontal == "right") == divmod(place, 2)
            rows, columns = (slice(8 * n, 8 * n + 8) for n in divmod(place, 2))
            bright = image[:, rows, columns].amax((1, 2)) > 0.5
            assert tuple(bright.nonzero()[:, 0].tolist()) == colours[colour]
    vague = splits.test.captions(0.0)
    assert all(len(caption.split()) == 5 for caption in vague)
    assert max(len(caption.split()) for caption in captions) + 2 == CAPTION_LENGTH


def scenes_of(*scenes):
    return Scenes(torch.zeros(len(scenes), 3, 16, 16), torch.tensor(scenes))


def test_listener_picks_among_what_fits():
    scenes = scenes_of(  # shape, colour, place
        [[0, 0, 0], [1, 1, 1]], [[0, 2, 0], [1, 1, 2]], [[3, 0, 2], [1, 1, 3]],
    )  # fmt: skip
    exact = scenes.captions()
    assert exact[0] == "a red square top left and a green circle top right"
    assert listener_recall(exact, scenes) == 1.0
    vague = ["a square and a circle"] * 2 + ["a triangle and a circle"]
    assert listener_recall(vague, scenes) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    wrong = ["a blue square and a circle", "nothing", "a and a circle"]
    assert listener_recall(wrong, scenes) == 0.0


def test_self_retrieval_counts_own_images_found():
    class Speaker:
        def __call__(self, features, captions):
            return -(features[:, 0] - captions[0, 0]).abs()

    features = torch.tensor([[0.0], [5.0], [5.0], [9.0]])
    captions = torch.tensor([[1], [5], [5], [4]])  # the last is nearer to 5; two images are alike
    assert self_retrieval(Speaker(), features, captions) == pytest.approx((1 + 0.5 + 0.5) / 4)


def test_captioner_says_its_likeliest_words_and_knows_how_likely():
    torch.manual_seed(0)
    encoder = nn.Identity()
    encoder.feature_dim = 3
    captioner = LSTMCaptioner(encoder, 7, width=5)
    features = 3 * torch.randn(6, 3)
    spoken = captioner.generate(features, 8)
    assert (spoken[:, 0] == START).all()
    for row in spoken.tolist():
        end = row.index(START, 1)
        assert row[end + 1 :] == [PADDING] * (7 - end)
    likelihood = captioner(features, spoken)
    # by hand, word by word
    hidden, cell = captioner.start(features).chunk(2, 1)
    state = (hidden.tanh()[None], cell[None].contiguous())
    total = torch.zeros(6)
    for step in range(7):
        output, state = captioner.lstm(captioner.embedding(spoken[:, step : step + 1]), state)
        log_p = F.log_softmax(captioner.words(output[:, 0]), 1)
        word = spoken[:, step + 1]
        inside = word != PADDING
        total += torch.where(inside, log_p.gather(1, word[:, None])[:, 0], 0.0)
        best = log_p[:, 1:].argmax(1) + 1
        if step < 6:
            assert torch.equal(best[inside], word[inside])
    torch.testing.assert_close(likelihood, total)
    with pytest.raises(ValueError, match=r"captions: expected \[6, L\], .* got \[2, 8\]"):
        captioner(features, spoken[:2])
