"""Image files, data sets, and the scores of samples."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import fgm
from images import data as images
from images import scores


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
    a, b = (scores.raw_pixels(images.to_uint8(x)) for x in (a, b))
    expected = 2 * 0.2**2 + 0.1**2 + 0.05**2
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_judge_of_real_digits():
    data = images.load_images("digits")
    judge = scores.train_judge(data)
    features = scores.raw_pixels(data.pixels)
    assert 0.98 < judge.own_accuracy < 1
    assert scores.accuracy(judge, features, data.labels) == (1, 1)
    wrong = torch.where(data.labels == 7, 8, data.labels)  # every seven is taken for an eight
    share, worst = scores.accuracy(judge, features, wrong)
    assert share == pytest.approx(1 - 179 / 1797) and worst == pytest.approx(174 / (174 + 179))


# Labels as often as the data has them


@pytest.mark.parametrize("counts", [[95, 5], [999, 1], [1] * 1000, [10] * 7 + [133], [1], [50, 0, 7]])
def test_labels_are_drawn_as_often_as_the_data_has_them(counts):
    """Exactly after as many samples as there are data, and within 5 images of every class before that."""
    n, counts = sum(counts), torch.tensor(counts)
    for seed in (0, 3, 2**31 - 1):
        labels = images.labels_of(torch.arange(n), counts.tolist(), seed)
        drawn = torch.nn.functional.one_hot(labels, len(counts)).double().cumsum(0)
        assert torch.equal(drawn[-1].long(), counts)
        share = torch.arange(1, n + 1)[:, None] * counts.double() / n
        assert (drawn - share).abs().max() < 5


def draw_from_classes(z, class_labels):
    """A perfect sampler of images of two greys with noise, from noise z [B, 1, 8, 8]."""
    return (class_labels @ torch.tensor([-0.6, 0.6])).view(-1, 1, 1, 1) + 0.1 * z


def test_a_perfect_sampler_of_unequal_classes_scores_as_the_data_themselves(tmp_path):
    labels = (torch.arange(2000) % 20 == 0).long()  # 95 % and 5 %
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = images.to_uint8(draw_from_classes(noise, torch.eye(2)[labels]))
    real = images.Images(pixels, labels, ["often", "seldom"])
    scorer = scores.Scores(real, True, False, torch.device("cpu"), tmp_path / "judge.safetensors", 2000)

    def scored(counts):
        drawn = images.draw_images(draw_from_classes, 2000, (1, 8, 8), counts, torch.device("cpu"))
        return scorer.of(*drawn)

    right, floor = scored(real.class_counts()), scorer.of_data["pixel_frechet"]
    assert right["accuracy"] == right["worst_class"] == 1
    assert right["pixel_frechet"] == pytest.approx(floor, rel=0.15)
    assert scored([1890, 110])["pixel_frechet"] > 1.5 * floor
    assert scored([1, 1])["pixel_frechet"] > 100 * floor  # all classes alike


def test_what_fresh_data_would_score():
    """Against the mean over pairs of fresh draws, 400 against 1,000."""
    random = torch.Generator().manual_seed(0)
    scale = torch.tensor([3.0, 1.0, 0.3, 0.1])
    pairs = [[scale * torch.randn(n, 4, generator=random) for n in (400, 1000)] for _ in range(300)]
    expected = np.mean([scores.frechet_distance(*pair) for pair in pairs])
    found = np.mean([scores.fresh_distance(real, 1000) for real, _ in pairs])
    assert found == pytest.approx(expected, rel=0.1)


def test_noise_of_a_draw_is_the_spread_of_draws():
    draws = torch.randn(200, 500, 4, generator=torch.Generator().manual_seed(0))
    real = scores.Gaussian(torch.randn(100_000, 4, generator=torch.Generator().manual_seed(1)) + 0.5)
    spread = torch.tensor([real.distance(scores.Gaussian(draw)) for draw in draws]).std().item()
    found = [scores.noise_of_draw(real, draw) for draw in draws[:20]]
    assert np.mean(found) == pytest.approx(spread, rel=0.2)
    assert scores.noise_of_draw(real, draws[0][:19]) is None


# The judge of photographs


@pytest.fixture(scope="module")
def large_digits():
    """The digits, enlarged to 16x16."""
    real = images.load_images("digits")
    return real._replace(pixels=real.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.fixture(scope="module", params=[True, False], ids=["labels", "quarter turns"])
def judged(request, large_digits):
    cond, cpu = request.param, torch.device("cpu")
    return cond, scores.NetworkJudge.train(large_digits, cond, False, cpu, seen=6000, batch=50)


def test_judge_orders_images_as_an_eye_would(judged, large_digits):
    """The more blurred, noised, or poor in classes, the farther; any of them farther than held-out images."""
    cond, judge = judged
    assert judge.own_accuracy > (0.9 if cond else 0.75)
    pixels, labels = large_digits.pixels, large_digits.labels
    held, trained = scores.hold_out(labels)
    real = scores.Gaussian(judge.features(pixels))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))

    def blurred(size):
        means = torch.nn.functional.avg_pool2d(pixels.float(), size, 1, size // 2, count_include_pad=False)
        return means.to(torch.uint8)

    worse = {
        "blur": [blurred(3), blurred(5)],
        "noise": [(pixels + level * noise).clamp(0, 255).to(torch.uint8) for level in (40, 80)],
        "classes missing": [pixels[labels >= 4], pixels[labels >= 6]],
    }
    floor = real.distance(scores.Gaussian(judge.features(pixels[held])))
    for what, changed in worse.items():
        little, much = [real.distance(scores.Gaussian(judge.features(some))) for some in changed]
        assert floor < little < much, what


def test_judge_file_is_used_again_or_refused(judged, large_digits, tmp_path):
    cond, judge = judged
    path, cpu = tmp_path / "judge.safetensors", torch.device("cpu")
    judge.save(path)
    again = scores.NetworkJudge.load(path, large_digits, cond, cpu)
    some = large_digits.pixels[:50]
    assert torch.equal(again.features(some), judge.features(some)) and again.about == judge.about
    others = large_digits._replace(pixels=255 - large_digits.pixels)
    with pytest.raises(fgm.InputError, match="trained for other images; remove it"):
        scores.NetworkJudge.load(path, others, cond, cpu)
    with pytest.raises(fgm.InputError, match="trained for other classes"):
        scores.NetworkJudge.load(path, large_digits._replace(classes=list("abcdefghij")), True, cpu)
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(fgm.InputError, match="damaged"):
            scores.NetworkJudge.load(path, large_digits, cond, cpu)
    again.own_accuracy = "high"
    again.save(path)
    with pytest.raises(fgm.InputError, match="its accuracy must be"):
        scores.NetworkJudge.load(path, large_digits, cond, cpu)
    again.own_accuracy = None
    again.net[-1].bias.data[0] = math.nan
    again.save(path)
    with pytest.raises(fgm.InputError, match="not finite"):
        scores.NetworkJudge.load(path, large_digits, cond, cpu)


def test_judge_knows_every_class_whatever_is_held_out():
    """The only image of a class is never held out; where that leaves nothing, there is no own accuracy."""
    labels = torch.cat([torch.zeros(50, dtype=torch.long), torch.tensor([1, 2])])
    held, trained = scores.hold_out(labels)
    assert len(held) == 5 and torch.equal(torch.cat([held, trained]).sort()[0], torch.arange(52))
    assert set(labels[trained].tolist()) == {0, 1, 2}
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    four = images.Images(pixels, torch.arange(4), list("abcd"))
    judge = scores.NetworkJudge.train(four, True, True, torch.device("cpu"), seen=20)
    assert judge.own_accuracy is None and judge.features(pixels).shape == (4, 128)


def test_cifar10_is_shrunk_by_averaging(monkeypatch):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(images, "cifar10", lambda: images.Images(pixels, torch.arange(3), list("abc")))
    small = images.load_images("cifar10", 16).pixels
    means = pixels.double().reshape(3, 3, 16, 2, 16, 2).mean((3, 5))
    assert small.shape == (3, 3, 16, 16) and (small - means).abs().max() <= 0.5
    with pytest.raises(fgm.InputError, match="to shrink cifar10"):
        images.load_images("cifar10", 64)
