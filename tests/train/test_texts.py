"""Text, two-tower and metric-learning methods: data, encoders, scores, steps, resuming."""

from __future__ import annotations

import dataclasses
import email
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fastcl.data import code_search
from fastcl.data.classes import ClassBalancedBatches
from fastcl.data.scenes import CAPTION_LENGTH, Scenes, load_scenes
from fastcl.data.tokens import PADDING, START, WordTokenizer, split_words
from fastcl.encoders import HuggingFaceEncoder, LSTMCaptioner, TextTransformer, TwoTower
from fastcl.evaluation.captions import listener_recall, self_retrieval
from fastcl.evaluation.mean_classifier import mean_classifier_accuracy
from fastcl.evaluation.retrieval import (
    alignment,
    retrieval_scores,
    uniformity,
    verification_auc,
)
from fastcl.trainers import METHODS, run, texts
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.methods import captions as caption_methods
from fastcl.trainers.methods import metric
from fastcl.trainers.methods import texts as text_methods
from fastcl.trainers.options import UsageError

NEW = [method.name for method in (*text_methods.METHODS, *metric.METHODS, *caption_methods.METHODS)]


# ------------------------------------------------------------------------------- code search

MODULE = '''
def transform(values, *, transform=None):
    """Return the values in
    another order.

    A second paragraph.
    """
    # a comment
    def inner(x):
        """The inner one says something too."""
        return transform(x)
    return [inner(v) for v in values]  # transform

def brief(x):
    """Two words."""
    return x

class Thing:
    """A class is not a function."""
    async def wait(self):
        """Wait for the thing to come."""
        await self.wait_more()

    def later(self):
        """Subclasses must implement this one."""
        raise NotImplementedError

    if True:
        def conditional(self):
            """Found below a condition as well."""
            return 1
'''


@pytest.fixture
def sources(tmp_path):
    for name, text in {
        "alpha/__init__.py": MODULE,
        "alpha/test/cases.py": MODULE,
        "beta.py": "def other():\n    '''Wait for the thing to come.'''\n    return 0\n",
        "broken.py": "def broken(:\n",
        "site-packages/gamma.py": MODULE,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_pairs_hide_what_would_give_them_away(sources):
    pairs = list(code_search.function_pairs(sources))
    assert [(pair.module, pair.docstring) for pair in pairs] == [
        ("alpha", "Return the values in another order."),
        ("alpha", "Wait for the thing to come."),
        ("alpha", "Found below a condition as well."),
        ("beta", "Wait for the thing to come."),
    ]
    first, second = pairs[0].source, pairs[1].source
    words = " ".join(first.split())
    assert words.startswith("def _(values, *, _=None): def inner(x): return _(x) return")
    assert not re.search("transform|says something|comment|order", first)
    assert "wait_more" in second  # only the whole word is the name


def test_same_docstring_once_and_no_package_in_two_splits(sources):
    splits = code_search.load_code_search(sources)
    (sources / "site-packages" / "absent").mkdir()
    everything = [*splits.train, *splits.validation, *splits.test]
    assert sorted(pair.module for pair in everything) == ["alpha"] * 3
    with pytest.raises(FileNotFoundError, match="folder: expected Python sources"):
        code_search.load_code_search(sources / "site-packages" / "absent")


def test_standard_library_is_divided_by_package():
    splits = code_search.load_code_search()
    parts = [getattr(splits, name) for name in ("train", "validation", "test")]
    packages = [{pair.package for pair in part} for part in parts]
    for one, other in itertools.combinations(packages, 2):
        assert not one & other
    assert min(map(len, parts)) > 200
    assert len(parts[0]) > 2000
    docstrings = [pair.docstring.lower() for part in parts for pair in part]
    assert len(set(docstrings)) == len(docstrings)
    assert all(re.match(r"(@.*\n)*(async )?def _\(", pair.source) for pair in parts[2])


# ------------------------------------------------------------------------------------ tokens


def test_words_are_cut_alike_in_prose_and_code():
    assert split_words("getHTTPServer_2(maxSize, __x)") == [
        "get", "http", "server", "2", "max", "size", "x",
    ]  # fmt: skip
    assert split_words("Größe = naïve") == ["gr", "öß", "e", "na", "ï", "ve"]


def test_tokenizer_ids():
    tokenizer = WordTokenizer.of_texts(["b a a", "b c"], size=2, least=2, buckets=3)
    assert tokenizer.ids == {"a": 2, "b": 3}  # equally frequent: by the alphabet
    assert tokenizer.vocabulary_size == 7
    tokens = tokenizer.encode(["a b", "unseen a a a a a", ""], 4)
    assert tokens[0].tolist() == [START, 2, 3, PADDING]
    assert tokens[1, 0] == START
    assert 4 <= tokens[1, 1] < 7
    assert tokens[1, 2:].tolist() == [2, 2]
    assert tokens[2].tolist() == [START, PADDING, PADDING, PADDING]
    ended = tokenizer.encode(["a b", "a a a a"], 4, end=True)
    assert ended.tolist() == [[START, 2, 3, START], [START, 2, 2, START]]
    assert tokenizer.decode(ended) == ["a b", "a a"]
    with pytest.raises(ValueError, match="length: expected an integer >= 2"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(ValueError, match="words: expected distinct words, got 1 twice"):
        WordTokenizer(["a", "a"])


# ---------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("depth", [0, 2])
def test_padding_does_not_change_features(pooling, depth):
    torch.manual_seed(0)
    encoder = TextTransformer(20, width=8, depth=depth, heads=2, max_length=9, pooling=pooling)
    encoder.eval()
    tokens = torch.randint(2, 20, (3, 5))
    features = encoder(tokens)
    assert features.shape == (3, encoder.feature_dim)
    torch.testing.assert_close(encoder(F.pad(tokens, (0, 4))), features)
    changed = tokens.clone()
    changed[:, 4] = 1
    # without attention, the first token's state knows nothing of the others
    same = torch.allclose(encoder(changed), features)
    assert same == (pooling == "cls" and depth == 0)


def test_mean_pooling_is_the_mean_of_the_words():
    encoder = TextTransformer(5, width=4, depth=0, heads=1).eval()
    tokens = torch.tensor([[1, 3, 4, 0]])
    states = encoder.norm(encoder.embedding(tokens[:, :3]) + encoder.positions[:3])
    torch.testing.assert_close(encoder(tokens), states.mean(1))


def test_text_encoders_say_what_does_not_fit():
    encoder = TextTransformer(5, width=4, depth=0, heads=1, max_length=3)
    with pytest.raises(ValueError, match=r"tokens: expected at most 3 .*, got 4"):
        encoder(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B, L >= 1\], got torch.fl"):
        encoder(torch.rand(1, 3))
    with pytest.raises(ValueError, match="pooling: expected one of mean, cls, got 'max'"):
        TextTransformer(5, width=4, heads=1, pooling="max")
    with pytest.raises(ValueError, match="width: expected a multiple of heads = 3, got 4"):
        TextTransformer(5, width=4, heads=3)
    with pytest.raises(TypeError, match=r"config\.hidden_size, got Linear"):
        HuggingFaceEncoder(nn.Linear(2, 2))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_hugging_face_encoder_offline(pooling):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    encoder = HuggingFaceEncoder(transformers.BertModel(config), pooling).eval()
    assert encoder.feature_dim == 8
    tokens = torch.randint(1, 30, (3, 6))
    features = encoder(tokens)
    padded = F.pad(tokens, (0, 3))
    torch.testing.assert_close(encoder(padded), features)
    torch.testing.assert_close(encoder(padded, (padded != 0).long()), features)
    (encoder(tokens) * torch.arange(8)).sum().backward()  # a plain sum of normalised rows is flat
    assert encoder.model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_hugging_face_encoder_needs_only_a_models_shape():
    class Model(nn.Module):
        config = type("Config", (), {"hidden_size": 2, "pad_token_id": 7})

        def forward(self, input_ids, attention_mask):
            states = torch.stack([input_ids, attention_mask], 2).float()
            return type("Output", (), {"last_hidden_state": states})

    tokens = torch.tensor([[4, 2, 7]])
    assert HuggingFaceEncoder(Model(), "cls")(tokens).tolist() == [[4.0, 1.0]]
    assert HuggingFaceEncoder(Model(), "mean")(tokens).tolist() == [[3.0, 1.0]]
    every = torch.ones(1, 3, dtype=torch.long)
    assert HuggingFaceEncoder(Model(), "mean")(tokens, every)[0, 0].item() == pytest.approx(13 / 3)


def test_two_towers_project_and_hold_their_scale():
    torch.manual_seed(0)
    first = TextTransformer(5, width=4, depth=0, heads=1)
    towers = TwoTower(first, first, 3, temperature=0.07, bias=-2.0)
    left, right = towers(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))
    assert left.shape == right.shape == (1, 3)
    assert not torch.equal(left, right)  # one encoder, two projections
    assert towers.scale.item() == pytest.approx(1 / 0.07)
    assert towers.logit_bias.item() == -2.0
    towers.logit_scale.data.fill_(9.0)
    assert towers.scale.item() == pytest.approx(100.0)
    with pytest.raises(TypeError, match="expected encoders with a feature_dim, got Linear"):
        TwoTower(nn.Linear(2, 2), first)
    with pytest.raises(ValueError, match=r"temperature: expected at least 1 / max_scale = 0\.01"):
        TwoTower(first, first, temperature=0.001)


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


# ------------------------------------------------------------------------------------ scores


def test_retrieval_scores_against_sorting():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 6, generator=generator) for n in (30, 50))
    query_ids = torch.randint(12, (30,), generator=generator)  # some ids have no key, some several
    key_ids = torch.randint(12, (50,), generator=generator) + 2
    order = (F.normalize(queries) @ F.normalize(keys).T).argsort(1, descending=True)
    hits = key_ids[order] == query_ids[:, None]
    rank = torch.where(hits.any(1), hits.int().argmax(1) + 1, 10**6)
    found = retrieval_scores(
        queries, keys, query_ids=query_ids, key_ids=key_ids, ks=(1, 4), depth=3
    )
    assert found["recall@1"] == pytest.approx((rank <= 1).double().mean().item())
    assert found["recall@4"] == pytest.approx((rank <= 4).double().mean().item())
    expected = torch.where(rank <= 3, 1 / rank.double(), 0.0).mean().item()
    assert found["mrr"] == pytest.approx(expected)
    assert 0 < found["recall@1"] < found["recall@4"] < 1


def test_retrieval_among_themselves_and_of_rows_that_are_all_alike():
    rows = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05]])
    ids = torch.tensor([0, 0, 1, 1, 2])
    scores = retrieval_scores(rows, query_ids=ids, ks=(1, 2))
    assert scores["recall@1"] == pytest.approx(2 / 5)  # the last row stands between the first two
    assert scores["recall@2"] == pytest.approx(4 / 5)
    # a collapsed encoder is worth what chance is
    alike = retrieval_scores(torch.ones(40, 3), torch.ones(40, 3), ks=(10,))
    assert alike["recall@10"] == pytest.approx(10 / 40)


def test_retrieval_arguments_are_checked():
    rows = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"query_ids and key_ids: expected both, .*, got neither"):
        retrieval_scores(rows, torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"key_ids: expected shape \[4\], got \[3\]"):
        retrieval_scores(rows, torch.rand(4, 2), query_ids=torch.arange(3), key_ids=torch.arange(3))
    with pytest.raises(ValueError, match="query_ids: expected alone, and always"):
        retrieval_scores(rows)
    with pytest.raises(ValueError, match=r"ks: expected integers >= 1, got \[0\]"):
        retrieval_scores(rows, rows, ks=(0,))


def test_alignment_and_uniformity_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 4, generator=generator) for _ in range(2))
    a, b = F.normalize(x), F.normalize(y)
    assert alignment(x, y) == pytest.approx(((a - b) ** 2).sum(1).mean().item(), rel=1e-5)
    distances = torch.pdist(a.double())
    expected = (-2 * distances**2).exp().mean().log().item()
    assert uniformity(x) == pytest.approx(expected, rel=1e-5)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-5)


def test_verification_auc():
    labels = torch.arange(40) % 4
    clusters = F.one_hot(labels).float()
    assert verification_auc(clusters, labels) == 1.0
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert 0.4 < verification_auc(noise, labels) < 0.6
    with pytest.raises(ValueError, match="expected pairs of equal and of different labels"):
        verification_auc(clusters, torch.arange(40))


def test_mean_classifier():
    train = torch.tensor([[2.0, 0], [4, 0], [0, 1], [0, 1], [-1, -1]])
    labels = torch.tensor([5, 5, 7, 7, 9])
    test = torch.tensor([[1.0, 0], [1, 2], [-1, 0], [0, 3]])
    truth = torch.tensor([5, 7, 9, 7])
    # means (3, 0), (0, 1), (-1, -1), not normalised: the second row goes to class 5
    assert mean_classifier_accuracy(train, labels, test, truth) == 0.75
    pairs = mean_classifier_accuracy(train, labels, test, truth, pairs=True)
    assert pairs == pytest.approx((2 / 3 + 1 + 1) / 3)


# -------------------------------------------------------------------------------------- data


def test_class_balanced_batches():
    labels = torch.tensor([0] * 7 + [1] * 9 + [2] * 8 + [3] * 12)
    batches = ClassBalancedBatches(torch.arange(36), labels, 3, 4, seed=1)

    def epoch(number):
        batches.set_epoch(number)
        return list(batches)

    first = epoch(0)
    assert len(first) == len(batches) == 3
    for data, classes in first:
        assert torch.equal(labels[data], classes)
        assert len(data.unique()) == 12
        groups = classes.view(3, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 3
    again, other = epoch(0), epoch(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match=r"classes: expected from 2 to 4, got 5"):
        ClassBalancedBatches(torch.arange(36), labels, 5, 4, 0)
    with pytest.raises(ValueError, match=r"per_class: expected from 2 to 7 .*, got 8"):
        ClassBalancedBatches(torch.arange(36), labels, 4, 8, 0)


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


# ------------------------------------------------------------------------------------- steps


def test_word_dropout_keeps_first_token_and_other_inputs():
    from fastcl.trainers.clip import drop_words

    torch.manual_seed(0)
    tokens = torch.full((50, 40), 3)
    dropped = drop_words(tokens, 0.3)
    assert (dropped[:, 0] == 3).all()
    assert 0.25 < (dropped[:, 1:] == PADDING).float().mean() < 0.35
    images = torch.rand(2, 3)
    assert drop_words(images, 0.3) is images
    assert drop_words(tokens, 0.0) is tokens


def test_hard_negatives_come_from_the_same_module():
    from fastcl.trainers.simcse import hard_negatives

    pairs = tuple(
        code_search.CodePair(module, str(index), "") for index, module in enumerate("aabacb")
    )
    assert hard_negatives(pairs).tolist() == [1, 3, 5, 0, 5, 2]


def test_block_step_takes_the_next_class_as_negatives(monkeypatch):
    from fastcl.trainers import block

    monkeypatch.setattr(block, "log_batch", lambda *args: None)
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = block.Block(nn.Identity(), block=2)
    loss = module.training_step((features, None), 0)
    groups = features.view(3, 3, 4)
    means = groups[:, 1:].mean(1)
    margins = (groups[:, 0] * (means - means[[2, 0, 1]])).sum(1)
    torch.testing.assert_close(loss, torch.log2(1 + (-margins).exp()).mean())


def test_caption_negatives_are_other_images_captions():
    module = METHODS["captioning"].experiment(tiny("captioning"), 0).module
    captions = torch.arange(16)[:, None].expand(16, 3)
    torch.manual_seed(0)
    others = module._others(captions)
    assert others.shape == (16, module.negatives, 3)
    for own, row in enumerate(others[:, :, 0].tolist()):
        assert own not in row
        assert len(set(row)) == len(row)


# ----------------------------------------------------------------------------------- methods

TINY = {
    "clip": {"batch_size": 16, "width": 16},
    "clip_scenes": {"batch_size": 128, "width": 16, "cnn_width": 2, "drawings": 1},
    "simcse": {"batch_size": 16, "width": 16, "depth": 1, "supervised": True},
    "siamese": {"batch_size": 320},
    "triplet": {"width": 2, "out_features": 8},
    "block": {"width": 2},
    "captioning": {
        "batch_size": 384, "width": 8, "cnn_width": 2, "drawings": 1, "mle_epochs": 2, "epochs": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_corpus():
    """Functions of the package email alone: its modules stand for packages."""
    splits = code_search.load_code_search(Path(email.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "load_code_search", lambda: splits)
        patch.setattr(texts, "LEAST_OF_PACKAGE", 4)
        yield


def tiny(name, **options):
    common = {"epochs": 2, "warmup_epochs": 0, "report_on": "test", "checkpoint_every": 1}
    return METHODS[name].options(**{**common, **TINY[name], **options})


@pytest.mark.parametrize("name", NEW)
def test_every_method_runs_and_reports(tmp_path, name):
    run(name, tiny(name), seeds=[0], out=tmp_path, console=Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    scores = results["scores"]
    assert results["headline"]["metric"] in scores["trained"]
    assert scores["trained"] != scores["untrained"]
    for who in scores.values():
        assert all(0 <= entry["mean"] <= 1 for entry in who.values())
    assert math.isfinite(results["seeds"]["0"]["last_epoch"]["loss"])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", NEW)
def test_resumed_run_is_bit_identical(tmp_path, monkeypatch, name):
    options = tiny(name)
    last_epoch = options.epochs - 1

    def train(folder, resume=False):
        folder.mkdir(exist_ok=True)
        experiment = METHODS[name].experiment(options, 7)
        fit(
            experiment, options, 7, folder=folder, callbacks=[EpochLog(folder / "log.csv")],
            checkpoint=folder / "last.ckpt" if resume else None,
        )  # fmt: skip
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]

    whole = train(tmp_path / "whole")
    kind = type(METHODS[name].experiment(options, 7).module)
    training_step = kind.training_step

    def stop(module, batch, index):
        if (module.current_epoch, index) == (last_epoch, 1):
            raise Interrupted
        return training_step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", stop)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts")
    torch.manual_seed(99)  # whatever else the process drew must not matter
    parts = train(tmp_path / "parts", resume=True)
    for (key, expected), found in zip(whole[0].items(), parts[0].values(), strict=True):
        assert torch.equal(expected, found), key
    for key, expected in whole[1].items():
        for part, value in expected.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts[1][key][part])), key
    logs = [(tmp_path / place / "log.csv").read_text() for place in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_reference_is_the_captioner_after_maximum_likelihood(tmp_path):
    options = tiny("captioning", mle_epochs=1, epochs=2)
    snapshots = []
    experiment = METHODS["captioning"].experiment(options, 0)
    module = experiment.module
    start = module.on_train_epoch_start

    def watch():
        snapshots.append({k: v.clone() for k, v in module.captioner.state_dict().items()})
        start()

    module.on_train_epoch_start = watch
    fit(experiment, options, 0, folder=tmp_path, callbacks=[])
    reference, trained = module.reference.state_dict(), module.captioner.state_dict()
    assert all(torch.equal(reference[key], value) for key, value in snapshots[1].items())
    assert not torch.equal(reference["words.weight"], trained["words.weight"])
    assert not torch.equal(reference["words.weight"], snapshots[0]["words.weight"])
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


@pytest.mark.parametrize("name", NEW)
def test_fast_and_default_options_are_in_range(name):
    METHODS[name].options().check()
    METHODS[name].options(**METHODS[name].fast).check()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("clip", {"loss": "softmax"}, "loss: expected clip or siglip, got 'softmax'"),
        ("clip", {"docstring_length": 1}, "docstring_length: expected an integer >= 2, got 1"),
        ("simcse", {"pooling": "max"}, "pooling: expected mean or cls, got 'max'"),
        ("triplet", {"batch_size": 100}, "batch_size: expected a multiple, .* of the 12 samples"),
        ("triplet", {"mining": "hard"}, "mining: expected batch_hard, .* got 'hard'"),
        ("block", {"block": 0}, "block: expected an integer >= 1, got 0"),
        ("captioning", {"negatives": 64}, "negatives: expected fewer than batch_size = 64, got 64"),
    ],
)  # fmt: skip
def test_options_out_of_range(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        dataclasses.replace(METHODS[name].options(), **options).check()


def test_more_classes_than_there_are():
    with pytest.raises(ValueError, match=r"classes: expected from 2 to 10, got 20"):
        METHODS["block"].experiment(METHODS["block"].options(batch_size=120), 0)
