"""Code search, words as tokens, and the encoders of text and of two towers."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcl.data import code_search
from fastcl.data.tokens import PADDING, START, WordTokenizer, split_words
from fastcl.encoders import HuggingFaceEncoder, TextTransformer, TwoTower

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
