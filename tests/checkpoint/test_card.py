"""The model card's metadata, as the Hub reads it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from lillama.checkpoint.card import card_metadata, card_text

SNAPSHOT = (
    "hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/fc7ac94680e38d7348cfa806e51218e6273104b0"
)


@pytest.mark.parametrize(
    ("folder", "hub_id"),
    [
        ("models/mamba-2.8b-hf", "mamba-2.8b-hf"),
        (SNAPSHOT, "mistralai/Mixtral-8x7B-v0.1"),
        ("hub/models--gpt2/snapshots/abc", "gpt2"),
        # YAML would read these as something else than text
        ("no", "no"),
        ("1e5", "1e5"),
        ("2026-11-21", "2026-11-21"),
        # these cannot be the name of a repository
        ("my model: the best", None),
        ("x\ntags: [evil]", None),
        ("a--b", None),
        ("-a", None),
        ("a" * 97, None),
    ],
)
def test_card_metadata_is_what_the_hub_takes(folder, hub_id):
    text = card_metadata(Path(folder), "lillama", "low-rank")
    found = ModelCard(f"{text}\n# a card\n").data.to_dict()
    assert found.pop("base_model", None) == hub_id
    if hub_id is not None:
        validate_repo_id(hub_id)
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lillama", "low-rank"],
    }


def test_card_text_is_one_line_without_tags():
    assert card_text("a\nb <script>") == "a b &lt;script&gt;"
