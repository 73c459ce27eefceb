"""What several files of tests share: a run of toy2d.py, and the miniature of Stable Diffusion 3."""

import json
import shutil

import pytest
import torch
from helpers import TOY, json_lines, succeed

import tiny_sd3
import toy2d
from text2image.digits import PROMPTS
from text2image.prompts import cached_embeddings

NORMS = {"qk_norm": "rms_norm", "pos_embed_max_size": 8}  # larger than the latents, as SD3.5's 384
SHAPES = {
    "3-medium": tiny_sd3.TRANSFORMER,
    "3.5-medium": tiny_sd3.TRANSFORMER | NORMS | {"dual_attention_layers": (0, 1)},
    "3.5-large": tiny_sd3.TRANSFORMER | NORMS,
}


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """The folder of an uninterrupted run of toy2d.py, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, succeed(toy2d, *TOY, "--out", out)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of tiny_sd3.py, hardly trained, with digits held out; of its images the first 40 alone."""
    out = tmp_path_factory.mktemp("sd3") / "tiny"
    succeed(tiny_sd3, "--out", out, "--hold-out", "--vae-steps", 3, "--kimg", 0.064, "--samples", 2)
    table = out / "images" / "metadata.jsonl"
    records = json_lines(table)
    assert len(records) == len(list(table.parent.glob("*.png"))) == 1438
    for record in records[40:]:
        (table.parent / record["file_name"]).unlink()
    table.write_text("\n".join(map(json.dumps, records[:40])))
    return out


@pytest.fixture(scope="session")
def models(model, tmp_path_factory):
    """{shape: folder}: the same pipeline with transformers of SHAPES, those of SD3.5 with random weights."""
    from diffusers import SD3Transformer2DModel

    folders = {"3-medium": model}
    for shape in ("3.5-medium", "3.5-large"):
        folders[shape] = shutil.copytree(model, tmp_path_factory.mktemp(shape) / "tiny")
        torch.manual_seed(0)
        SD3Transformer2DModel(**SHAPES[shape]).save_pretrained(folders[shape] / "transformer")
    return folders


@pytest.fixture(scope="session")
def embeddings(model, tmp_path_factory):
    """Of the prompts, by the text encoders that all shapes share."""
    cache = tmp_path_factory.mktemp("embeddings")
    return cached_embeddings(model, PROMPTS, cache, torch.device("cpu"), torch.float32)
