"""Stable Diffusion 3 pipelines from the hub: downloaded once, then taken from its cache, without network."""

import os
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

import fgm
from fgm import InputError
from parts.pipeline import COMPONENTS, check_kind, check_pipeline, read_object
from parts.processes import first_process


def model_folder(model):
    """The local folder of a pipeline; of a hub id's, after its download. A collective call.

    Raises InputError if it cannot be had or is not a whole SD3 flow-matching pipeline."""
    if Path(model).is_dir():
        check_pipeline(Path(model), model)
        scheduler = read_object(Path(model) / "scheduler" / "scheduler_config.json")
        if scheduler.get("sigma_max") is not None and scheduler["sigma_max"] == scheduler.get("sigma_min"):
            raise InputError(f"{model} makes one step: as --model name the one that it was distilled from")
        return Path(model)
    folder = first_process(lambda: in_the_cache(model) or download(model))
    if int(os.environ.get("LOCAL_WORLD_SIZE", fgm.world_size())) < fgm.world_size():  # on other machines, too
        if int(os.environ["LOCAL_RANK"]) == 0:
            folder = in_the_cache(model) or download(model)
        dist.barrier()
    return folder or in_the_cache(model)


SMALL = ["model_index.json"]
SMALL += [f"{name}/*{suffix}" for name in COMPONENTS for suffix in (".json", ".txt", ".model")]
ALL = SMALL + [f"{name}/*.safetensors" for name in COMPONENTS]


def fetch(model, names, **options):
    """The folder of a hub id's snapshot in the hub's cache, with the files of these names."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=names, ignore_patterns=["*fp16*"], **options))


def in_the_cache(model):
    """The folder of a hub id's pipeline if the hub's cache holds all of it, else None; without network."""
    with suppress(Exception):  # the hub's errors have no common base
        folder = fetch(model, ALL, local_files_only=True)
        check_pipeline(folder, model)
        return folder


def download(model):
    """model_folder for a hub id that is not in the cache: first what tells its kind, then the weights."""
    try:
        folder = fetch(model, [*SMALL, "README.md", "LICENSE*"])
        check_kind(folder, model)
        fetch(model, ALL)
    except InputError:
        raise
    except Exception as error:  # the hub's errors have no common base
        raise InputError(why_not(model, error)) from error
    check_pipeline(folder, model)
    return folder


def why_not(model, error):
    """One line on a download that failed: which, why, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{model} is no folder, and no model's name on the hub, which is OWNER/NAME"
    if isinstance(error, errors.GatedRepoError):
        return (f"{model} is gated: accept its licence on https://huggingface.co/{model} "
                "and log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"{model} is neither a folder nor a model on the hub; "
                "for a private one log in with `hf auth login`")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (f"{model} is no folder, not whole in the hub's cache, and the hub cannot be reached: run "
                "again with network; without, `python tiny_sd3.py --out runs/tiny-sd3` makes a small model")
    reason = " ".join(str(error).split())[:200]
    return (f"the download of {model} stopped ({type(error).__name__}: {reason}); what has come is kept: "
            "see to the network or the disk, and run again")
