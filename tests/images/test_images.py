"""Image files, data sets, labels, and the scores of samples."""

import numpy as np
import pytest
import torch
from PIL import Image

import fgm
from images import data as images
from images import scores

CPU = torch.device("cpu")
VALUES = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def refused(message):
    return pytest.raises(fgm.InputError, match=message)


# ---- Image files -------------------------------------------------------------------------------------------


def test_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(VALUES[:, :32]).save(tmp_path / "a.png", exif=exif)
    pixels = np.asarray(images.read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels, np.rot90(VALUES[:, :32], 3))


@pytest.mark.parametrize("name, mode", [("a.png", "RGBA"), ("a.gif", "P")])
def test_what_is_transparent_is_white_whatever_lies_below(name, mode, tmp_path):
    values = np.full((8, 8, 4), 102, np.uint8)  # a colour of the palette
    values[:4, :, 3], values[4:, :, 3], values[4:, :, :3] = 255, 0, 51
    image, options = Image.fromarray(values), {}
    if mode == "P":
        image = image.convert("RGB").convert(mode)
        options = {"transparency": image.getpixel((0, 7))}
    image.convert(mode).save(tmp_path / name, **options)
    pixels = np.asarray(images.read_image(tmp_path / name))
    assert (pixels[:4] == 102).all() and (pixels[4:] == 255).all()


def animated(path):
    Image.fromarray(VALUES).save(path, save_all=True, append_images=[Image.fromarray(255 - VALUES)])


@pytest.mark.parametrize("name, write, message", [
    ("a.jpg", lambda path: path.write_text("<html>not found</html>"), "cannot identify image file"),
    ("a.gif", animated, "it is animated or has pages"),
    ("a.png", lambda path: Image.fromarray(np.ones((8, 8), np.uint16)).save(path), "16 or more bits"),
])
def test_what_is_no_still_image_of_8_bits_is_named(name, write, message, tmp_path):
    path = tmp_path / "class" / name
    path.parent.mkdir()
    write(path)
    with refused(message) as refusal:
        images.load_images(str(tmp_path))
    assert str(path) in str(refusal.value)


# ---- Data sets ---------------------------------------------------------------------------------------------


def test_digits_keep_their_values():
    data = images.load_images("digits")
    assert data.pixels.shape == (1797, 1, 8, 8) and data.pixels.max() == 255 and len(data.classes) == 10
    assert torch.equal(images.to_uint8(images.to_float(data.pixels)), data.pixels)


def test_folder_converts_every_kind_of_image(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    for name, mode in (("10", "L"), ("9", "RGBA"), ("a", "P"), ("b", "RGB")):
        (tmp_path / name / "inside").mkdir(parents=True)
        Image.fromarray(values).convert(mode).save(tmp_path / name / "inside" / "0.png")
    data = images.load_images(str(tmp_path), cond=True)
    assert data.pixels.shape == (4, 3, 8, 8)
    assert data.labels.tolist() == [0, 1, 2, 3] and data.classes == ["10", "9", "a", "b"]
    for pixels in data.pixels:
        np.testing.assert_allclose(pixels[1].numpy(), values, atol=1)
    resized = images.load_images(str(tmp_path), resolution=4)
    assert resized.pixels.float().mean() == pytest.approx(values.mean(), abs=1)


def test_hidden_files_and_what_systems_leave_are_passed_over(tmp_path, capsys):
    left = ("cat/._0.png", "cat/.ipynb_checkpoints/0.png", ".ipynb_checkpoints/0.png", "cat/Thumbs.db",
            "cat/.DS_Store", "__MACOSX/cat/0.png", "cat/__MACOSX/0.png")
    for name in (*left, "cat/notes.txt", "cat/0.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(VALUES).save(tmp_path / "cat" / "0.png")
    data = images.load_images(str(tmp_path))
    assert data.classes == ["cat"] and len(data.pixels) == 1
    printed = capsys.readouterr().out
    assert f"2 files in {tmp_path / 'cat'} are of other kinds and left out, {tmp_path}/cat/0.heic" in printed


@pytest.mark.parametrize("sizes, cond, message", [
    ([8, 16], False, "16x16, not 8x8; --resolution"),
    ([8], True, "at least two classes"),
    ([], False, "no sub-folders"),
    ([8, None], False, "no images in its sub-folder 1"),
])
def test_folder_names_what_is_wrong(sizes, cond, message, tmp_path):
    """A folder of one black image of each size, each in its own class; None: no image."""
    for name, size in enumerate(sizes):
        (tmp_path / str(name)).mkdir()
        if size:
            Image.new("RGB", (size, size)).save(tmp_path / str(name) / "0.png")
    with refused(message):
        images.load_images(str(tmp_path), cond=cond)


def test_cifar10_is_shrunk_by_averaging(monkeypatch):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(images, "cifar10", lambda: images.Images(pixels, torch.arange(3), list("abc")))
    small = images.load_images("cifar10", 16).pixels
    means = pixels.double().reshape(3, 3, 16, 2, 16, 2).mean((3, 5))
    assert small.shape == (3, 3, 16, 16) and (small - means).abs().max() <= 0.5
    with refused("to shrink cifar10"):
        images.load_images("cifar10", 64)


def test_cifar10_that_cannot_be_downloaded_is_said(tmp_path, monkeypatch):
    def interrupted(*arguments, **settings):
        raise OSError("cut off")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", interrupted)
    with refused(f"cannot download CIFAR-10 to {tmp_path}/cifar10 .*cut off.*: try again"):
        images.load_images("cifar10")


@pytest.mark.parametrize("counts, n", [([2] * 5, 2), ([50, 0, 7], 19)])
def test_images_held_out_are_a_share_of_every_class(counts, n):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    held, others = images.split(labels, n)
    assert len(held) == n and torch.equal(torch.cat([held, others]).sort()[0], torch.arange(len(labels)))
    share = torch.tensor(counts) * n / len(labels)
    assert (labels[held].bincount(minlength=len(counts)) - share).abs().max() <= 1


@pytest.mark.parametrize("counts", [[1], [50, 0, 7]])
def test_labels_are_drawn_as_often_as_the_data_has_them(counts):
    labels = images.labels_of(torch.arange(2 * sum(counts)), counts)
    for half in labels.chunk(2):
        assert half.bincount(minlength=len(counts)).tolist() == counts


# ---- Fréchet distances -------------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    n = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double()
    a, b = n @ matrix, 1 + 2 * n
    root = torch.linalg.svdvals(matrix).sum()  # tr (A^T A)^(1/2)
    expected = 2 + (2 + 0.25) + 8 - 2 * 2 * root.item()
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_what_fresh_data_would_score():
    """Against the mean over pairs of fresh draws, 400 against 1,000."""
    random = torch.Generator().manual_seed(0)
    scale = torch.tensor([3.0, 1.0, 0.3, 0.1])
    pairs = [[scale * torch.randn(n, 4, generator=random) for n in (400, 1000)] for _ in range(300)]
    expected = np.mean([scores.frechet_distance(*pair) for pair in pairs])
    estimate = np.mean([scores.fresh_distance(real, 1000) for real, _ in pairs])
    assert estimate == pytest.approx(expected, rel=0.1)


def test_noise_of_a_draw_is_the_spread_of_draws():
    draws = torch.randn(200, 500, 4, generator=torch.Generator().manual_seed(0))
    real = scores.Gaussian(torch.randn(100_000, 4, generator=torch.Generator().manual_seed(1)) + 0.5)
    spread = torch.tensor([real.distance(scores.Gaussian(draw)) for draw in draws]).std().item()
    estimate = np.mean([scores.noise_of_draw(real, draw) for draw in draws[:20]])
    assert estimate == pytest.approx(spread, rel=0.2)
    assert scores.noise_of_draw(real, draws[0][:19]) is None


# ---- Copies ------------------------------------------------------------------------------------------------


def test_copy_ratio_is_1_for_fresh_images_and_less_for_copies():
    """Half of the samples copied, of 4 parts of the training images: 1 - 1 / 2 / 4."""
    draws = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    training, held_out, fresh = draws[:800], draws[800:1000], draws[1000:]
    assert scores.copy_ratio(fresh, training, held_out) == pytest.approx(1, abs=0.03)
    assert scores.copy_ratio(training, training, held_out) == pytest.approx(0.75, abs=0.03)
    half = torch.cat([training[:500], fresh[:500]])
    assert scores.copy_ratio(half, training, held_out) == pytest.approx(0.875, abs=0.03)


@pytest.mark.parametrize("flip, ratio", [(True, 0.75), (False, 1)])
def test_mirrored_copies_are_copies_where_networks_see_mirrored_images(flip, ratio):
    pixels = torch.randint(256, (1000, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    every = images.Images(pixels, torch.zeros(1000).long(), ["a"])
    training, held_out = every.rows(slice(200, None)), every.rows(slice(200))
    scorer = scores.Scores(training, False, None, 800, held_out=held_out, flip=flip)
    row = scorer.copies(training.pixels.flip(3))
    assert row["copy_ratio"] == pytest.approx(ratio, abs=0.03)


# ---- Judges ------------------------------------------------------------------------------------------------


def test_judge_of_real_digits():
    data = images.load_images("digits")
    judge, features = scores.train_judge(data), scores.coarse_pixels(data.pixels)
    assert 0.98 < judge.own_accuracy < 1
    assert scores.accuracy(judge, features, data.labels) == (1, 1)
    wrong = torch.where(data.labels == 7, 8, data.labels)  # every seven is taken for an eight
    share, worst = scores.accuracy(judge, features, wrong)
    assert share == pytest.approx(1 - 179 / 1797) and worst == pytest.approx(174 / (174 + 179))


def test_a_networks_judge_learns_the_classes_and_its_file_is_used_again_or_refused(tmp_path):
    """Of digits that are enlarged to 16x16."""
    path, digits = tmp_path / "judge.safetensors", images.load_images("digits")
    digits = digits._replace(pixels=digits.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))
    some = digits.rows(slice(60))
    judge = scores.NetworkJudge.train(digits, False, CPU, seen=6000, batch=50)
    assert judge.own_accuracy > 0.9
    judge.save(path)
    again = scores.NetworkJudge.load(path, digits, CPU)
    assert torch.equal(again.features(some.pixels), judge.features(some.pixels))
    assert again.own_accuracy == judge.own_accuracy

    assert scores.NetworkJudge.load(path, some, CPU) is None
    assert scores.judge_of(some, False, False, CPU, path).trained_on["images"] == some.fingerprint()
    assert scores.NetworkJudge.load(path, some, CPU) is not None
    path.write_bytes(path.read_bytes()[:-100])
    with refused("damaged"):
        scores.NetworkJudge.load(path, some, CPU)
