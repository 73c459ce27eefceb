"""Prompts, captions and digits: read from files, made by a grammar, encoded once into files."""

import os
import re

import pytest
import torch
from PIL import Image

import fgm
from images.data import to_uint8
from text2image import digits, prompts, real
from text2image.pipeline import ENCODERS, load_pipeline

CPU = torch.device("cpu")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (colour, 0, 0)).save(path)


# ---- Prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "caf\xe9".encode("latin-1"), "as text in UTF-8"),
    ("a.txt", "\ufeff\n \n", "holds no prompts"),
    ("a.jsonl", '{"prompt": 5}', 'a text as "prompt"'),
    ("a.jsonl", '{"prompt": "a"', "must be a JSON object"),
])
def test_bad_prompts_are_named(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(fgm.InputError, match=message) as error:
        prompts.read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "\ufeffa cat\r\ncaf\xe9\u2028au lait\r\n", ["a cat", "caf\xe9\u2028au lait"]),
    ("a.JSONL", '\ufeff{"prompt": "a cat"}\n{"text": "one\u2028line"}', ["a cat", "one\u2028line"]),
])
def test_prompts_are_utf8(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    assert prompts.read_prompts(tmp_path / name) == expected


def test_grammar_makes_different_prompts_and_the_same_ones_again():
    texts = prompts.grammar(500)
    assert len(set(texts)) == 500 and texts == prompts.grammar(500) and texts != prompts.grammar(500, seed=1)
    assert not [text for text in texts if re.search(r"\ba [aeiou]|foxs|benchs|buss|sheeps", text)]


# ---- Embeddings --------------------------------------------------------------------------------------------


def test_embeddings_are_the_pipelines_own_and_resume(model, tmp_path):
    texts = digits.PROMPTS[:200] + ["x " * 100]
    rows = prompts.cached_embeddings(model, texts, tmp_path, CPU, torch.float32)
    pipe = load_pipeline(model, ENCODERS, CPU, torch.float32)
    expected = pipe.encode_prompt(texts[150], None, None, do_classifier_free_guidance=False)
    hidden_states = rows(torch.tensor([3, 150]))["encoder_hidden_states"]
    torch.testing.assert_close(hidden_states[1:], expected[0], rtol=1e-5, atol=1e-5)
    empty = pipe.encode_prompt("", None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(rows.null["pooled_projections"], empty[2], rtol=1e-5, atol=1e-5)

    present, lost = sorted(tmp_path.iterdir())
    content, when = lost.read_bytes(), present.stat().st_mtime_ns
    lost.unlink()
    prompts.cached_embeddings(model, texts, tmp_path, CPU, torch.float32)
    assert lost.read_bytes() == content and present.stat().st_mtime_ns == when


def test_embeddings_are_made_again_for_other_prompts_precision_and_encoders(model, tmp_path, monkeypatch):
    """And not for another spelling of a path."""
    def files_with(folder, prompt, dtype):
        prompts.cached_embeddings(folder, [prompt], tmp_path, CPU, dtype)
        return len(list(tmp_path.iterdir()))

    monkeypatch.chdir(model.parent)
    assert files_with(model, "7", torch.float32) == 1
    assert files_with(model / ".." / model.name, "7", torch.float32) == 1
    assert files_with(model, "8", torch.float32) == 2
    assert files_with(model, "7", torch.bfloat16) == 3
    weights = model / "text_encoder/model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    assert files_with(model, "7", torch.float32) == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"half")
    with pytest.raises(fgm.InputError, match="is damaged or no cache of sd3.py; remove it"):
        files_with(model, "7", torch.float32)


# ---- Real images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image, table, content", [
    ("a/1.png", "metadata.jsonl", '{"file_name": "a/1.png", "text": "a caf\xe9"}'),
    ("1.png", "metadata.csv", '\ufefftext,file_name,more\r\n"a caf\xe9",1.png,7\r\n'),
    ("a/1.png", "a/1.txt", "a caf\xe9\n"),
])
def test_captions_are_found(tmp_path, capsys, image, table, content):
    picture(tmp_path / image)
    write(tmp_path / table, content)
    assert real.load_real(str(tmp_path)) == ([tmp_path / image], ["a caf\xe9"])
    assert capsys.readouterr().out == ""


def test_images_without_a_caption_are_counted_and_the_first_is_named(tmp_path, capsys):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    with pytest.raises(fgm.InputError, match="none of the 4 images in --real .* has a caption"):
        real.load_real(tmp_path)
    write(tmp_path / "0.txt", "a cat")
    write(tmp_path / "2.txt", "")
    assert real.load_real(tmp_path)[1] == ["a cat", "", "", ""]
    printed = capsys.readouterr().out
    assert "3 of 4 images" in printed and f"{tmp_path / '1.png'} the first" in printed


def test_a_bad_table_of_captions_is_named(tmp_path):
    picture(tmp_path / "1.png")
    write(tmp_path / "metadata.csv", b"file_name,text\n\xff,a")
    with pytest.raises(fgm.InputError, match=r"cannot read .*metadata.csv as a table in UTF-8"):
        real.load_real(tmp_path)


def test_latents_are_made_again_for_another_image_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "ROWS_PER_FILE", 2)
    paths, cache = [tmp_path / f"{i}.png" for i in range(5)], tmp_path / "latents"
    for i, path in enumerate(paths):
        picture(path, 40 * i)

    def encode():
        """The latents, and the files that hold them."""
        rows = real.cached_latents(model, paths, (32, 32), cache, CPU, torch.float32)
        return rows(torch.arange(5))["latents"], {path.name for path in cache.iterdir()}

    first, files = encode()
    again, files_again = encode()
    assert torch.equal(again, first) and files_again == files and len(files) == 3
    picture(paths[4], 255)
    again, files_again = encode()
    assert torch.equal(again[:4], first[:4]) and not torch.equal(again[4], first[4])
    assert len(files_again) == 4
    Image.new("RGB", (48, 48)).save(paths[0])
    with pytest.raises(fgm.InputError, match="0.png is 48x48, the run makes 32x32"):
        encode()


# ---- Digits ------------------------------------------------------------------------------------------------


def test_judge_reads_real_digits():
    images, labels, styles = digits.captioned_digits()
    pixels, pairs = to_uint8(images), zip(styles.tolist(), labels.tolist(), strict=True)
    texts = [digits.captions(style, label)[i % 8] for i, (style, label) in enumerate(pairs)]
    following, distance = digits.judge(pixels, texts)
    assert following > 0.99 and distance < 0.01
    shifted = [digits.captions(0, (label + 1) % 10)[0] for label in labels.tolist()]
    assert digits.judge(pixels, shifted)[0] < 0.01
    with pytest.raises(fgm.InputError, match="does not name one digit"):
        digits.judge(pixels[:1], ["a cat"])


def test_copies_are_told_from_digits_that_nobody_has_seen():
    """A fifth is held out, a fixed choice. A copy is at distance 0 of one of four parts as large as that."""
    images = to_uint8(digits.captioned_digits()[0])
    training, held_out = (images[rows] for rows in digits.split_rows())
    assert torch.equal(to_uint8(digits.digits_to_train_on(hold_out=True)[0]), training)
    assert len(held_out) == 359
    assert 0.7 < digits.copy_scores(training)["copy_ratio"] < 0.8
    assert digits.copy_scores(held_out)["copy_ratio"] > 10
