"""The linear probe: head, loss, views by epoch, LARS; values worked out by hand."""

import pytest
import torch

from milan.data import seeding
from milan.evaluation.linear import FeatureViews, LinearHead, ProbeLoss, probe_top1
from milan.training import optim


def test_in_training_the_head_uses_batch_statistics_and_updates_the_running_ones():
    head = LinearHead(2, 3)
    features = torch.tensor([[0.0, 10], [2, 10], [4, 40]])
    normalised = head.train().norm(features)
    # First feature: mean 2, variance (4 + 0 + 4) / 3. Second: mean 20, variance (100 + 100 + 400) / 3.
    assert normalised[:, 0].tolist() == pytest.approx([-2 / (8 / 3) ** 0.5, 0, 2 / (8 / 3) ** 0.5], abs=1e-5)
    assert normalised[:, 1].tolist() == pytest.approx([-10 / 200**0.5, -10 / 200**0.5, 20 / 200**0.5], abs=1e-5)
    # Momentum 0.1, starting from mean 0 and variance 1; the running variance is the unbiased one.
    assert head.norm.running_mean.tolist() == pytest.approx([0.2, 2.0])
    assert head.norm.running_var.tolist() == pytest.approx([0.9 + 0.4, 0.9 + 30])


def test_in_evaluation_the_head_uses_the_running_statistics():
    head = LinearHead(2, 1).eval()
    head.norm.running_mean.copy_(torch.tensor([1.0, 2]))
    head.norm.running_var.copy_(torch.tensor([4.0, 9]))
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[10.0, 100]]))
        head.linear.bias.fill_(7)
    assert head(torch.tensor([[3.0, 5]])).item() == pytest.approx(10 * (3 - 1) / 2 + 100 * (5 - 2) / 3 + 7, rel=1e-5)
    assert head.norm.eps == 1e-6


def test_the_head_starts_small_and_only_its_linear_layer_is_trained():
    torch.manual_seed(0)
    head = LinearHead(512, 100)
    assert sorted(name for name, _ in head.named_parameters()) == ["linear.bias", "linear.weight"]
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(head.linear.weight.mean().item()) < 2e-4
    assert (head.linear.bias == 0).all()


def test_the_loss_is_the_cross_entropy_of_the_head():
    head = LinearHead(2, 2).eval()
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
    loss = ProbeLoss(head)(torch.tensor([[3.0, 1]]).half(), torch.tensor([1]))
    assert loss.item() == pytest.approx(torch.log(1 + torch.tensor(2.0).exp()).item(), abs=1e-4)


def test_epoch_e_uses_view_e_mod_v():
    views = [(torch.arange(4.0)[:, None] + 10 * view, torch.tensor([5, 6, 7, 8]) + 10 * view) for view in range(3)]
    data = FeatureViews(views)
    assert len(data) == 4
    for epoch, index, expected in ((0, 1, 1), (1, 1, 11), (2, 3, 23), (3, 0, 0), (7, 2, 12)):
        assert data[epoch, index]["features"].item() == expected
        assert data[epoch, index]["label"] == 5 + expected


def test_the_quick_probe_learns_informative_features_and_not_noise():
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 8, generator=seeding.generator(0, "noise"))
    informative = torch.cat([torch.nn.functional.one_hot(labels, 4) * 4.0, noise], dim=1)
    assert probe_top1(informative[:300], labels[:300], informative[300:], labels[300:]) == 100
    assert probe_top1(noise[:300], labels[:300], noise[300:], labels[300:]) < 50


def test_lars_adapts_the_rate_of_matrices_and_not_of_vectors():
    """One step without momentum moves a matrix by lr x 0.001 |w| / |g| x g and a bias by lr x g."""
    head = LinearHead(2, 2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[3.0, 0], [0, 4]]))
    optimizer = optim.lars(head, momentum=0.0, weight_decay=0.0)
    optim.set_lr(optimizer, 2.0)
    head.linear.weight.grad = torch.tensor([[0.0, 6], [8, 0]])
    head.linear.bias.grad = torch.tensor([0.5, -1])
    optimizer.step()
    assert head.linear.weight.flatten().tolist() == pytest.approx([3, -2 * 0.001 * 0.5 * 6, -2 * 0.001 * 0.5 * 8, 4], abs=1e-5)
    assert head.linear.bias.tolist() == pytest.approx([-1, 2])
