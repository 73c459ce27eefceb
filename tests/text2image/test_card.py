"""The model card of an exported pipeline, read by the hub's own library."""

from huggingface_hub import ModelCard

from text2image.card import write_card

SETTINGS = dict(
    batch=192, lr=5e-6, flow_lr=5e-6, guidance=4.0, l1_weight=0.0, loss_scale=100.0, lora=None, seed=0,
    kimg=1920, height=1024, width=768, samples=8, real=None)
ROWS = {
    "teacher, 28 steps": {"following": 1.0, "seconds": 0.25},
    "one step": {"following": 0.5, "seconds": 0.0125}}


def card(tmp_path, model):
    (tmp_path / "pipeline").mkdir(exist_ok=True)
    write_card(tmp_path, SETTINGS | {"model": model}, {"t_star": 0.97, "c_in": 0.8}, 8192, ROWS, tmp_path)
    return ModelCard.load(tmp_path / "pipeline" / "README.md")


def test_card_of_a_model_with_a_licence(tmp_path):
    header = "license: other\nlicense_name: some-terms\nlicense_link: LICENSE.md\ntags: [x]"
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# SD3\n")
    found = card(tmp_path, "owner/some-model")
    assert found.data.to_dict() == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "other",
        "license_name": "some-terms", "license_link": "LICENSE.md", "base_model": "owner/some-model"}
    expected = (
        "# some-model in one step", "t* = 0.97", "8192 prompts", "1920 thousand", "height=1024, width=768",
        "num_inference_steps=1", "| one step | 0.5 | 0.0125 |", "no images", "guidance 4.0",
        "diffusers 0.33")
    for text in expected:
        assert text in found.text, text
    assert "lora" not in found.text


def test_card_of_a_folder_without_a_readme(tmp_path):
    found = card(tmp_path, str(tmp_path))
    assert found.data.to_dict() == {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
