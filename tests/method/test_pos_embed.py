"""Position embeddings: compared with numbers of the official release (golden case I) and with their plain definition."""

import math
import zlib

import numpy as np
import pytest
import torch

from milan.method.pos_embed import interpolate_pos_embed, sincos_pos_embed


def test_sincos_table_by_definition():
    table = sincos_pos_embed(dim=8, grid=3)[0]
    assert table.dtype == torch.float32
    assert table.shape == (10, 8)
    assert table[0].eq(0).all()
    for row in range(3):
        for column in range(3):
            halves = []
            for position in (column, row):
                angles = [position / 10000 ** (k / 2) for k in range(2)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.allclose(table[1 + 3 * row + column], torch.tensor(halves), atol=1e-7)


def test_sincos_table_of_the_release():
    row = sincos_pos_embed(dim=512, grid=14)[0, 100]
    official = [0.8414709568023682, 0.8019617795944214, 0.5403022766113281, 0.6569865942001343, 0.22877486050128937]
    assert row[[0, 1, 128, 256, 257]].tolist() == official


def test_sincos_table_needs_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_pos_embed(dim=6, grid=2)


def test_interpolation_of_the_release():
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(b"0:input:pos_embed")))
    before = torch.from_numpy(generator.standard_normal((1, 197, 768)).astype(np.float32))
    after = interpolate_pos_embed(before, grid=32)
    assert after.shape == (1, 1025, 768)
    official = torch.tensor([0.46412014961242676, -0.37810373306274414, 0.12436455488204956, 0.7133961915969849])
    assert torch.allclose(after[0, 500, :4], official, atol=1e-6)
    assert after.double().norm().item() == pytest.approx(773.6391794142021, rel=1e-6)
    assert after[:, 0].equal(before[:, 0])


def test_interpolation_keeps_an_equal_grid_and_the_axes():
    table = sincos_pos_embed(dim=16, grid=5)
    assert interpolate_pos_embed(table, grid=5).equal(table)
    larger = interpolate_pos_embed(table, grid=10)[0, 1:].reshape(10, 10, 16)
    assert torch.allclose(larger[0, :, :8], larger[7, :, :8], atol=1e-6)  # columns do not depend on the row
    assert not torch.allclose(larger[:, 0, 8:], larger[:, 0, 8:].flip(0), atol=0.1)  # rows do


@pytest.mark.parametrize("shape", [(1, 7, 4), (2, 5, 4), (5, 4)])
def test_interpolation_refuses_a_table_of_no_square_grid(shape):
    with pytest.raises(ValueError, match="pos_embed"):
        interpolate_pos_embed(torch.zeros(shape), grid=4)
