"""config.json of a folder, and what is none."""

import json

import pytest

from lillama.errors import InputError
from lillama.models.config_json import read_config


def test_read_config_returns_the_config(mixtral):
    config = read_config(mixtral)
    assert (config.model_type, config.hidden_size) == ("mixtral", 32)


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_read_config_not_a_folder(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("x")
    with pytest.raises(InputError, match=f"{path} is not a checkpoint folder"):
        read_config(path)


def test_read_config_missing(tmp_path):
    with pytest.raises(InputError, match=r"is not a checkpoint: it has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"model_type": ', b"[1, 2]", b'{"a": "\xff"}'])
def test_read_config_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "no-such-thing", None, ["mixtral"]])
def test_read_config_unknown_architecture(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match="unknown architecture: .*supported are .*mamba, mamba2"):
        read_config(tmp_path)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"dtype": "nonsense"}])
def test_read_config_values_of_the_wrong_kind(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **values}))
    with pytest.raises(InputError, match=r"config\.json is not a config of mixtral") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
