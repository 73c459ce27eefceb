"""Stable Diffusion 3 pipelines from the hub: downloaded once, then taken from its cache, without network."""

from contextlib import suppress
from pathlib import Path

from fgm import InputError
from text2image.pipeline import COMPONENTS, check_kind, check_pipeline
from text2image.prompts import SUFFIXES
from training.files import reason
from training.run import read_json


def model_folder(model):
    """The local folder of a pipeline; of a hub id's, after its download, for which processes wait in turn.

    Raises InputError if it cannot be had or is not a whole SD3 flow-matching pipeline."""
    folder = Path(model) if Path(model).is_dir() else hub_folder(model)
    check_pipeline(folder, model)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("sigma_max") is not None and scheduler["sigma_max"] == scheduler.get("sigma_min"):
        raise InputError(f"{model} makes one step: as --model name the one that it was distilled from")
    return folder


def fetch(model, *ignored, **options):
    """The folder of a hub id's snapshot in the hub's cache, with the pipeline's files but those ignored."""
    from huggingface_hub import snapshot_download

    names = ["model_index.json", "README.md", "LICENSE*"]
    names += [f"{name}/*{suffix}" for name in COMPONENTS for suffix in SUFFIXES]
    ignored = ["*fp16*", *ignored]
    return Path(snapshot_download(model, allow_patterns=names, ignore_patterns=ignored, **options))


def hub_folder(model):
    """The folder of a hub id's pipeline, without network if the hub's cache holds all of it. Otherwise first
    what tells its kind is downloaded, then the weights."""
    with suppress(Exception):  # the hub's errors have no common base
        folder = fetch(model, local_files_only=True)
        check_pipeline(folder, model)
        return folder
    try:
        folder = fetch(model, "*.safetensors")
        check_kind(folder, model)
        fetch(model)
    except InputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise InputError(
            f"{model} is no folder here, and the hub does not give it ({why}); what has come is kept; "
            "without network, `python tiny_sd3.py --out runs/tiny-sd3` makes a small model") from error
    return folder
