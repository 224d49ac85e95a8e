"""Training code of each library with one changed line: the same losses and the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcl


def test_lightly_simclr():
    """The SimCLR example, on a small backbone and noise for images."""
    from fastcl.compat.lightly import NTXentLoss  # was: from lightly.loss import NTXentLoss

    ours = simclr(NTXentLoss)
    from lightly.loss import NTXentLoss

    assert_same_training(ours, simclr(NTXentLoss))


def simclr(loss_class):
    import torchvision
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            resnet = torchvision.models.resnet18()
            self.backbone = nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = SimCLRProjectionHead(512, 512, 128)

        def forward(self, x):
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

    torch.manual_seed(0)
    model = SimCLR().double()  # batch normalisation makes much of rounding
    images = [
        torchvision.transforms.functional.to_pil_image(torch.rand(3, 32, 32)) for _ in range(8)
    ]
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    views = [transform(image) for image in images]
    criterion = loss_class()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    losses = []
    for _ in range(2):
        x0, x1 = (torch.stack(x).double() for x in zip(*views, strict=True))
        loss = criterion(model(x0), model(x1))
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, list(model.parameters())


def assert_same_training(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("siglip", [False, True])
def test_open_clip_training_step(siglip):
    theirs = clip_step(siglip)
    with fastcl.patch("open_clip"):
        ours = clip_step(siglip)
    assert type(ours[2]).__module__ == "fastcl.compat.open_clip"
    assert type(theirs[2]).__module__ == "open_clip.loss"
    assert_same_training(ours, theirs)


def clip_step(siglip):
    """open_clip's own training loop over one batch."""
    from types import SimpleNamespace

    import open_clip
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(
        16, vision, text, output_dict=True, init_logit_bias=-10.0 if siglip else None
    )
    args = SimpleNamespace(
        siglip=siglip, distill=False, model="tiny", local_loss=False, gather_with_grad=False,
        rank=0, world_size=1, horovod=False, loss_dist_impl=None, device="cpu",
        precision="fp32", accum_freq=1, skip_scheduler=True, grad_clip_norm=None, batch_size=4,
        log_every_n_steps=1, wandb=False, save_logs=False, distributed=False,
    )  # fmt: skip
    loss = open_clip.create_loss(args)
    seen = []
    loss.register_forward_hook(
        lambda module, inputs, result: seen.append(result["contrastive_loss"].detach())
    )
    batch = torch.randn(4, 3, 16, 16), torch.randint(1, 50, (4, 8))
    dataloader = type(
        "Batches", (list,), {"num_batches": 2, "num_samples": 8}
    )([batch, batch])  # fmt: skip
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=dataloader)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
    return seen, list(model.parameters()), loss


CORPUS = [
    "a", "red", "fox", "runs", "over", "the", "hill", "while", "some", "blue", "birds", "sing",
    "in", "tall", "green", "trees",
]  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT of random weights, without a download."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CORPUS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
@pytest.mark.parametrize("negatives", [False, True])
def test_sentence_transformers_trainer(bert, tmp_path, name, negatives):
    from sentence_transformers.sentence_transformer import losses as theirs

    from fastcl.compat import sentence_transformers as ours

    runs = [
        train_sentences(bert, tmp_path / str(i), getattr(losses, name), negatives)
        for i, losses in enumerate((ours, theirs))
    ]
    assert_same_training(*runs)
    assert len(runs[0][0]) == 3


def train_sentences(bert, folder, loss_class, negatives):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    word = Transformer(str(bert))
    model = SentenceTransformer(modules=[word, Pooling(16)], device="cpu")
    columns = ["anchor", "positive"] + ["negative"] * negatives
    dataset = Dataset.from_dict({
        column: [" ".join(CORPUS[i + k : i + k + 3]) for i in range(12)]
        for k, column in enumerate(columns)
    })  # fmt: skip
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if "Cached" in loss_class.__name__:
        options["mini_batch_size"] = 2
    loss = loss_class(model, **options)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        seed=0, data_seed=0,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=loss
    )
    trainer.train()
    logged = [torch.tensor(x["loss"]) for x in trainer.state.log_history if "loss" in x]
    return logged, [p.detach().clone() for p in model.parameters()]


def test_sentence_transformers_options(bert):
    """Options, copies and config are the peer's; another similarity is left to its code."""
    import pickle

    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from fastcl.compat import sentence_transformers as ours

    model = SentenceTransformer(modules=[Transformer(str(bert)), Pooling(16)], device="cpu")
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    for function in (util.cos_sim, util.dot_score, util.euclidean_sim):
        options = {"similarity_fct": function, "scale": 0.7, "directions": ("query_to_doc",)}
        mine, peer = (
            losses.MultipleNegativesRankingLoss(model, **options) for losses in (ours, theirs)
        )
        assert mine.get_config_dict() == peer.get_config_dict()
        assert isinstance(mine, theirs.MultipleNegativesRankingLoss)
        expected = peer.compute_loss_from_embeddings([a, b], None)
        for loss in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            torch.testing.assert_close(loss.compute_loss_from_embeddings([a, b], None), expected)


LOSSES = ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss")


@pytest.mark.parametrize("name", LOSSES)
def test_metric_learning_without_rows(name):
    """Nothing to learn from is a loss of 0; a batch that does not fit leaves the memory alone."""
    from pytorch_metric_learning import losses

    from fastcl.compat import pytorch_metric_learning as ours

    x, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) // 2
    for rows in ({}, {"ref_emb": x, "ref_labels": labels.clone()}):
        value = getattr(ours, name)()(x[:0], labels[:0], **rows)
        assert value == 0.0
        torch.autograd.grad(value, x)
    mine, theirs = (m.CrossBatchMemory(getattr(m, name)(), 4, 5) for m in (ours, losses))
    everything = torch.ones(5, dtype=torch.bool)
    for memory in (mine, theirs):
        assert memory(x[:5], labels[:5], enqueue_mask=everything) == 0.0
    assert torch.equal(mine.embedding_memory, theirs.embedding_memory)
    held = copy.deepcopy(mine.state_dict()), mine.queue_idx
    for bad in (
        {"labels": labels[:4]},
        {"embeddings": x[:5, :2]},
        {"enqueue_mask": everything[:2]},
        {"enqueue_mask": torch.arange(5)},
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(bad))} .*expected"):
            mine(**{"embeddings": x[:5], "labels": labels[:5], **bad})
    assert mine.queue_idx == held[1]
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), held[0].values(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_metric_learning_compiles_to_one_graph(name):
    """As subclasses of the library's, with its distances and reducers in the way."""
    from fastcl.compat import pytorch_metric_learning as ours

    loss, x, labels = getattr(ours, name)(), torch.randn(8, 4), torch.arange(8) // 3
    for module, second in (
        (loss, labels),
        (ours.SelfSupervisedLoss(loss), x.flip(0)),
        (ours.CrossBatchMemory(loss, 4, 20), labels),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
        for _ in range(2):  # a memory changes
            torch.testing.assert_close(compiled(x, second), module(x, second))


def test_metric_learning_wrappers_take_ours():
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    from fastcl.compat import pytorch_metric_learning as ours

    x, labels = F.normalize(torch.randn(12, 6)), torch.arange(12) // 3
    for name in LOSSES:
        mine, theirs = getattr(ours, name)(), getattr(losses, name)()
        DistributedLossWrapper(mine)
        pairs = miners.MultiSimilarityMiner()(x, labels)
        torch.testing.assert_close(mine(x, labels, pairs), theirs(x, labels, pairs))
        memory = losses.CrossBatchMemory(mine, 6, 40)
        both = losses.MultipleLosses([mine, losses.CircleLoss()])
        assert torch.isfinite(memory(x, labels) + both(x, labels))
        torch.testing.assert_close(
            ours.CrossBatchMemory(mine, 6, 40)(x, labels),
            losses.CrossBatchMemory(theirs, 6, 40)(x, labels),
        )
