"""Real images: every way in which captions are written is found, and what has none is told."""

import os
import unicodedata

import pytest
import torch
from PIL import Image

import fgm
from text2image import prompts, real

CPU = torch.device("cpu")
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path)


@pytest.mark.parametrize("image, captions, content", [
    ("1.png", "metadata.jsonl", '{"file_name": "1.png", "text": "a cat"}'),
    ("a/1.png", "metadata.jsonl", '{"file_name": "a/1.png", "text": "a cat"}'),
    ("a/1.png", "a/metadata.jsonl", '{"file_name": "1.png", "text": "a cat"}'),
    ("1.png", "metadata.jsonl", '{"file_name": "./1.png", "text": "a cat"}'),
    ("a/1.png", "metadata.jsonl", '{"file_name": "a\\\\1.png", "text": "a cat"}'),
    (f"{DECOMPOSED}.png", "metadata.jsonl", f'{{"file_name": "{COMPOSED}.png", "text": "a cat"}}'),
    (f"{COMPOSED}.png", "metadata.jsonl", f'{{"file_name": "{DECOMPOSED}.png", "text": "a cat"}}'),
    (f"{DECOMPOSED}.png", f"{COMPOSED}.txt", "a cat"),
    ("1.png", "metadata.csv", "file_name,text\n1.png,a cat\n"),
    ("a/1.png", "a/metadata.csv", '\ufefftext,file_name,more\r\n"a cat",1.png,7\r\n'),
    ("1.png", "1.TXT", "a cat\n"),
    ("1.png", "1.caption", "a cat"),
    ("1.PNG", "1.Caption", "a cat"),
    ("1.bmp", "1.txt", "a cat"),
])
def test_captions_are_found(tmp_path, capsys, image, captions, content):
    picture(tmp_path / image)
    (tmp_path / captions).write_text(content, encoding="utf-8")
    paths, found = real.load_real(str(tmp_path))
    assert paths == [tmp_path / image] and found == ["a cat"] and capsys.readouterr().out == ""


def test_a_caption_with_a_comma_and_a_line_break_in_a_table(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"a cat,\nand a dog"\n')
    assert real.load_real(tmp_path)[1] == ["a cat,\nand a dog"]


def test_images_without_a_caption_are_counted_and_the_first_is_named(tmp_path, capsys):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    with pytest.raises(fgm.InputError, match="none of the 4 images in --real .* has a caption"):
        real.load_real(tmp_path)
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "2.txt").write_text("")
    assert real.load_real(tmp_path)[1] == ["a cat", "", "", ""]
    printed = capsys.readouterr().out
    assert "3 of 4 images" in printed and f"{tmp_path / '1.png'} the first" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("content", [
    "file_name,caption\n1.png,a cat\n", 'file_name,text\n1.png,"a', "1.png\n2.png\n",
    "file_name,text\n1.png\n", b"file_name,text\n\xff,a"])
def test_a_bad_table_is_named(tmp_path, content):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(fgm.InputError, match="metadata.csv: every line must have the columns file_name"):
        real.load_real(tmp_path)


def test_a_pipe_among_the_images_is_not_waited_for(model, tmp_path):
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(fgm.InputError, match="1.png is no regular file"):
        real.encode_images(
            model, [tmp_path / "1.png"], (32, 32), (16, 4, 4), tmp_path / "cache", CPU, torch.float32)


def test_another_image_and_other_latents_of_the_same_name_and_size_are_noticed(model, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    for path, red in ((first, 0), (second, 200)):
        Image.new("RGB", (32, 32), (red, 0, 0)).save(path, compress_level=0)
    assert first.stat().st_size == second.stat().st_size
    cache = tmp_path / "cache"

    def latents():
        rows = real.encode_images(model, [first], (32, 32), (16, 4, 4), cache, CPU, torch.float32)
        return rows(torch.tensor([0]))["latents"], rows.names

    before, names = latents()
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    after, others = latents()
    assert not torch.equal(before, after) and names != others
    assert prompts.digest_of(names) != prompts.digest_of(others)
    old, new = cache / names[0], cache / others[0]
    assert old.stat().st_size == new.stat().st_size
    first.write_bytes(kept)
    old.write_bytes(new.read_bytes())
    with pytest.raises(fgm.InputError, match=f"{names[0]} is damaged .{others[0]}: .*it is made again"):
        latents()
