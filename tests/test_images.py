"""Image files, data sets, and the scores of samples."""

import numpy as np
import pytest
import torch
from PIL import Image

import fgm
from parts import images, scores


def test_digits_keep_their_values():
    data = images.load_images("digits")
    assert data.pixels.shape == (1797, 1, 8, 8) and data.pixels.max() == 255 and len(data.classes) == 10
    assert torch.equal(images.to_uint8(images.to_float(data.pixels)), data.pixels)


def test_folder_converts_every_kind_of_image(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    for name, mode in (("a", "L"), ("b", "RGBA"), ("c", "P"), ("d", "RGB")):
        (tmp_path / name).mkdir()
        Image.fromarray(values).convert(mode).save(tmp_path / name / "0.png")
    data = images.load_images(str(tmp_path), cond=True)
    assert data.pixels.shape == (4, 3, 8, 8)
    assert data.labels.tolist() == [0, 1, 2, 3] and data.classes == list("abcd")
    for pixels in data.pixels:
        np.testing.assert_allclose(pixels[1].numpy(), values, atol=1)
    resized = images.load_images(str(tmp_path), resolution=4)
    assert resized.pixels.float().mean() == pytest.approx(values.mean(), abs=1)


def folder(tmp_path, sizes):
    """A folder of one black image of each (width, height), each in its own class."""
    for i, size in enumerate(sizes):
        (tmp_path / f"class{i}").mkdir(parents=True)
        Image.new("RGB", size).save(tmp_path / f"class{i}" / "0.png")
    return tmp_path


def test_folder_names_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    hollow = folder(tmp_path / "hollow", [(8, 8), (8, 8)])
    (hollow / "class1" / "0.png").unlink()
    cut = folder(tmp_path / "cut", [(8, 8), (8, 8)])
    (cut / "class1" / "0.png").write_bytes((cut / "class0" / "0.png").read_bytes()[:40])
    cases = [
        (folder(tmp_path / "mixed", [(8, 8), (16, 16)]), "16x16, not 8x8; --resolution", False),
        (folder(tmp_path / "oblong", [(8, 9)]), "not square", False),
        (folder(tmp_path / "one", [(8, 8)]), "at least two classes", True),
        (tmp_path / "none", "neither cifar10, digits nor a folder", False),
        (tmp_path / "empty", "no sub-folders", False),
        (hollow, "no images in its sub-folder class1", False),
        (cut, "cut/class1/0.png", False),
    ]
    for path, message, cond in cases:
        with pytest.raises(fgm.InputError, match=message):
            images.load_images(str(path), cond=cond)


def test_frechet_distance_of_known_gaussians():
    n = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double()
    a, b = n @ matrix, 1 + 2 * n
    root = torch.linalg.svdvals(matrix).sum()  # tr (A^T A)^(1/2)
    expected = 2 + (2 + 0.25) + 8 - 2 * 2 * root.item()
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_pixel_frechet_of_known_gaussians():
    """Shifted, and scaled along axes: |shift|^2 + sum (s - s')^2. Rounding to uint8 adds 1e-5 per pixel."""
    n = torch.randn(200_000, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    a, b = 0.1 * n, 0.2 + torch.tensor([0.2, 0.05]).view(1, 2, 1) * n
    a, b = images.to_uint8(a), images.to_uint8(b)
    expected = 2 * 0.2**2 + 0.1**2 + 0.05**2
    assert scores.pixel_frechet(a, b) == pytest.approx(expected, rel=0.01)
    assert scores.pixel_frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_judge_of_real_digits():
    data = images.load_images("digits")
    judge = scores.train_judge(data)
    features = scores.raw_pixels(data.pixels)
    assert 0.98 < judge.own_accuracy < 1
    assert scores.accuracy(judge, features, data.labels) == (1, 1)
    wrong = torch.where(data.labels == 7, 8, data.labels)  # every seven is taken for an eight
    share, worst = scores.accuracy(judge, features, wrong)
    assert share == pytest.approx(1 - 179 / 1797) and worst == pytest.approx(174 / (174 + 179))
