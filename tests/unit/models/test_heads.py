"""Task heads by hand, and how they start."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.models.encoder import initial_std
from mhmoe_vl.models.heads import ClassificationHead, EmbeddingHead, Nlvr2Head, TokenHead, VqaHead
from tests.unit.models.builders import randomize


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_token_head_is_linear() -> None:
    head = TokenHead(16, 30).double()
    x = hidden(5, 16)
    assert_close(head(x), x @ head.linear.weight.T + head.linear.bias)
    assert head(x[:0]).shape == (0, 30)


def test_a_tied_head_shares_the_embedding() -> None:
    embedding = torch.nn.Embedding(30, 16)
    before = embedding.weight.clone()
    head = TokenHead(16, 30, embedding.weight)
    assert head.linear.weight is embedding.weight
    assert torch.equal(embedding.weight, before)
    head(torch.randn(2, 16)).sum().backward()
    assert embedding.weight.grad.any()


def test_the_vqa_head_by_hand() -> None:
    head = VqaHead(16, 7).double()
    randomize(head)
    p = dict(head.named_parameters())
    x = hidden(3, 16)
    pooled = F.layer_norm(x, (16,), p["pooler.0.weight"], p["pooler.0.bias"])
    pooled = torch.tanh(pooled @ p["pooler.1.weight"].T + p["pooler.1.bias"])
    y = pooled @ p["classifier.0.weight"].T + p["classifier.0.bias"]
    y = F.gelu(F.layer_norm(y, (32,), p["classifier.1.weight"], p["classifier.1.bias"]))
    assert_close(head(x), y @ p["classifier.3.weight"].T + p["classifier.3.bias"])


def test_the_nlvr2_head_tells_left_from_right_and_class_from_text() -> None:
    head = Nlvr2Head(16).double()
    randomize(head)
    left, right = hidden(2, 3, 2, 16)
    first = head.classifier[0]
    x = torch.cat([left[:, 0], left[:, 1], right[:, 0], right[:, 1]], dim=1)
    assert x.shape == (3, 64)
    expected = head.classifier[1:](x @ first.weight.T + first.bias)
    assert_close(head(left, right), expected)
    assert not torch.isclose(head(right, left), expected).all()


def test_the_nlvr2_head_may_normalise_its_input() -> None:
    plain, normed = Nlvr2Head(16).double(), Nlvr2Head(16, input_norm=True).double()
    randomize(normed)
    plain.load_state_dict(
        {name: tensor for name, tensor in normed.state_dict().items() if not name.startswith("norm.")}
    )
    left, right = hidden(2, 3, 2, 16)
    x = F.layer_norm(torch.cat([left.flatten(1), right.flatten(1)], dim=1), (64,), normed.norm.weight, normed.norm.bias)
    assert_close(normed(left, right), plain.classifier(x))
    assert not torch.isclose(normed(left, right), plain(left, right)).any()


def test_the_nlvr2_head_starts_near_zero() -> None:
    torch.manual_seed(0)
    assert Nlvr2Head(64)(torch.randn(9, 2, 64), torch.randn(9, 2, 64)).abs().max() < 0.01


def test_embeddings_lie_on_the_unit_sphere() -> None:
    head = EmbeddingHead(16).double()
    x = hidden(5, 16)
    projected = x @ head.linear.weight.T
    assert_close(head(x), projected / projected.square().sum(1, keepdim=True).sqrt())
    assert head.linear.bias is None
    # In 16 bits the length would be off by up to one in 250.
    with torch.autocast("cpu", torch.bfloat16):
        lengths = EmbeddingHead(16)(hidden(5, 16).float()).norm(dim=1)
    assert lengths.dtype == torch.float32
    assert_close(lengths, torch.ones(5))


def test_the_classification_head_by_hand() -> None:
    head = ClassificationHead(16, 7).double()
    randomize(head)
    x = hidden(3, 16)
    normed = F.layer_norm(x, (16,), head.norm.weight, head.norm.bias)
    assert_close(head(x), normed @ head.linear.weight.T + head.linear.bias)
    torch.manual_seed(0)
    assert ClassificationHead(64, 9)(torch.randn(5, 64)).abs().max() < 0.01


def test_initial_weights_follow_the_width() -> None:
    torch.manual_seed(0)
    assert initial_std(768) == 0.02
    for width in (192, 768):
        weight = VqaHead(width, 50).classifier[0].weight
        assert abs(weight.std().item() / initial_std(width) - 1) < 0.05
