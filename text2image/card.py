"""The model card of an exported pipeline: README.md with the header that diffusers and the hub read."""

from contextlib import suppress
from pathlib import Path

from training.files import atomically


def table(rows):
    """{sampler: {score: value}} as the lines of a Markdown table."""
    scores = list(next(iter(rows.values())))
    titles = " | ".join(name.replace("_", " ") for name in scores)
    lines = [f"| | {titles} |", "|---" * (len(scores) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in scores) + " |"
                    for name, row in rows.items()]


def write_card(folder, settings, generator, prompts, rows, out):
    """Write OUT/pipeline/README.md. folder: of the source pipeline; settings: the run's, {name: value}.

    generator: its coefficients; prompts: how many it was distilled on; rows: {sampler: {score: value}}."""
    from huggingface_hub import metadata_load, metadata_save

    found, model = {}, settings["model"]
    with suppress(Exception):  # there may be no card, or one that is damaged
        found = metadata_load(folder / "README.md") or {}
    if not Path(model).is_dir():  # a hub id
        found |= {"base_model": model}
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    kept = ("license", "license_name", "license_link", "base_model")
    header |= {name: found[name] for name in kept if name in found}
    names = ("batch", "lr", "flow_lr", "guidance", "l1_weight", "loss_scale", "lora", "seed")
    given = [f"{name.replace('_', ' ')} {settings[name]}" for name in names if settings[name] is not None]
    images = "real images for the GAN" if settings["real"] else "no images"
    height, width = settings["height"], settings["width"]
    text = f"""# {Path(model).name} in one step

{model}, distilled by Flow Generator Matching (arXiv 2410.19310): one network evaluation, no guidance.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("this folder")
image = pipe("a red fox in the snow", height={height}, width={width}, num_inference_steps=1,
             guidance_scale=0).images[0]
```

- t* = {generator['t_star']}, the scheduler's only sigma; c_in = {generator['c_in']}, in the weights of the
  patch embedding.
- Needs diffusers 0.33 or newer: 0.31 and older pass over the scheduler's sigma without a word.
- Trained on the velocities of {model} for {prompts} prompts, and on {images}: {settings['kimg']:g} thousand
  samples of {height} x {width} pixels; {', '.join(given)}.

Scores on {settings['samples']} prompts:
"""
    with atomically(out / "pipeline" / "README.md") as temporary:
        temporary.write_text("\n".join([text, *table(rows)]) + "\n", encoding="utf-8")
        metadata_save(temporary, header)
