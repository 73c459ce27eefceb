"""What a U-Net's run needs of memory, against the allocator."""

import math

import pytest
import torch

import bench
import fgm
from images import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("l1_weight, two_graphs, graphs", [(1.0, False, 2), (0.0, False, 3), (0.0, True, 2)])
def test_memory_of_a_step_against_the_allocator(bf16, l1_weight, two_graphs, graphs):
    """The three networks lie there before."""
    subject = bench.digits(CPU, 64)
    weights = 4 * sum(p.numel() for p in subject.net.parameters())
    kept = memory.kept_per_image(subject.net, subject.shape, 10, bf16)
    estimate = memory.step_bytes(weights, kept, bf16, 64, graphs) - 3 * weights

    def step():
        fgm.distill(subject.teacher, fgm.OneStepGenerator(subject.net, 0.97), subject.flow, subject.shape,
                    steps=1, batch=64, conditions=subject.conditions, l1_weight=l1_weight,
                    two_graphs=two_graphs, precision="bf16" if bf16 else "fp32")

    assert bench.peak_bytes(step, CPU) == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_teachers_training_needs_less(dropout):
    subject = bench.unet(CPU, 64, 8, 1, model_channels=32, channel_mult=[1], num_blocks=1, dropout=dropout)
    weights = 4 * sum(p.numel() for p in subject.net.parameters())
    kept = memory.kept_per_image(subject.net, subject.shape, 10, False)
    data = torch.zeros(64, 1, 8, 8)

    def step():
        fgm.train_flow(
            subject.net.train(), lambda seeds: (data, subject.conditions(seeds)), steps=1, batch=64)

    assert bench.peak_bytes(step, CPU) < memory.step_bytes(weights, kept, False, 64, 2) - 3 * weights


def test_the_micro_batch_is_the_largest_divisor_that_fits():
    """Steps of 8 weights, three graphs an image and a tenth to spare."""
    available = {math.inf: 48, (8 + 3 * 24) / 0.9: 24, (8 + 3 * 23.9) / 0.9: 16, 1: 1}
    found = [memory.largest_micro_batch(48, free, 1.0, 1.0, False, graphs=3) for free in available]
    assert found == [*available.values()]
