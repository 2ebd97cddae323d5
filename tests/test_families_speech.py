"""A speech model: compressed with its encoder, loaded, generated from, saved, exported, resumed;
and what is done with models of text only."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, WhisperForCausalLM

import lillama
from lillama.checkpoint import read_config
from lillama.compress.plan import make_plan
from lillama.compress.speech import check_speech_options
from lillama.config import CompressConfig, PlanConfig
from lillama.errors import InputError
from lillama.families import family_of, is_speech_matrix
from lillama.hub_text import HubText
from lillama.loading import load_model
from lillama.modules.dense_linear import is_linear
from lillama.modules.pivot_low_rank_linear import PivotLowRankLinear
from lillama.report import report
from lillama.sample import sample
from lillama.skeleton import named_blocks, skeleton
from tests.compress.test_resume import content
from tests.tiny_whisper import POSITIONS, save_whisper, whisper_config, write_manifest

WHISPER = family_of("whisper")
CLIPS = 40


@pytest.fixture(scope="module")
def whisper(tokenizer, tmp_path_factory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper") / "whisper", tokenizer)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("clips"), CLIPS)


@pytest.fixture(scope="module")
def compressed(whisper, manifest, tmp_path_factory, device):
    """compressed(preset, **options) -> (folder, report); made once for a preset without options."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(preset: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        if options or preset not in made:
            out = tmp_path_factory.mktemp("out") / preset
            given: dict[str, Any] = {"reduction": 0.2, "device": str(device), **options}
            done = lillama.compress(whisper, out, text=manifest, preset=preset, **given)
            if options:
                return out, done
            made[preset] = out, done
        return made[preset]

    return of


def heard(model: Any) -> dict[str, torch.Tensor]:
    """Logits and greedy tokens for two clips of noise."""
    features = torch.randn(2, 80, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=ids).logits
        config = model.generation_config
        config.max_new_tokens, config.max_length, config.do_sample = 12, None, False
        mask = torch.ones(2, 2 * POSITIONS, dtype=torch.long)
        tokens = model.generate(input_features=features, attention_mask=mask)
    return {"logits": logits, "tokens": tokens}


def load(path: Path) -> Any:
    return AutoModelForSpeechSeq2Seq.from_pretrained(path).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", ["fast", "default", "whitened", "paper"])
def test_compressed_model_loads_generates_and_saves_again(preset, whisper, compressed, tmp_path):
    out, done = compressed(preset)
    assert done["params_before"] == sum(p.numel() for p in load(whisper).parameters())
    assert 0.2 <= done["reduction"] < 0.24
    assert done["clips"] == CLIPS - 8 and 0.3 * 32 < done["audio_seconds"] < 32
    assert [row["name"] for row in done["blocks"]] == [
        f"model.{half}.layers.{i}" for half in ("encoder", "decoder") for i in range(2)
    ]
    model, dense = load(out), load(whisper)
    found = heard(model)
    assert not torch.equal(found["logits"], heard(dense)["logits"])
    # what stays: biases of untrained factors, the tied head, convolutions
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    for name in ("model.encoder.conv1", "model.encoder.conv2", "model.decoder.embed_tokens"):
        weight = dense.get_submodule(name).weight
        assert torch.equal(model.get_submodule(name).weight, weight)
    ranks = model.config.quantization_config.ranks
    assert model.config.quantization_config.tokens == done["tokens"] < 9 * CLIPS
    assert any(".encoder_attn." in name for name in ranks)
    for name in ranks:
        new, old = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(new, PivotLowRankLinear) == (preset in ("fast", "default"))
        assert (new.bias is None) == (old.bias is None) == name.endswith("k_proj")
        if preset == "fast" and new.bias is not None:
            assert torch.equal(new.bias, old.bias)
    model.save_pretrained(tmp_path / "again")
    again = heard(load(tmp_path / "again"))
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.filterwarnings("ignore")
def test_exported_dense_it_needs_no_lillama(compressed, tmp_path):
    out, _ = compressed("fast")
    lillama.export(out, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    found, wanted = heard(load(tmp_path / "dense")), heard(load(out))
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found["tokens"], wanted["tokens"])
    for path in (out, tmp_path / "dense"):
        card = (path / "README.md").read_text()
        assert "AutoModelForSpeechSeq2Seq.from_pretrained" in card
        assert "pipeline_tag: automatic-speech-recognition" in card and "CausalLM" not in card
        assert (path / "preprocessor_config.json").is_file()


def test_training_helps_blocks_of_both_halves(compressed):
    """The held-out loss of a block of the encoder and of the decoder, the cross attention's
    matrices among those that train."""
    out, done = compressed("whitened", reduction=0.25)
    rows = {row["name"]: row for row in done["blocks"]}
    for half in ("encoder", "decoder"):
        row = rows[f"model.{half}.layers.1"]
        assert row["held_out_loss_after"] < 0.99 * row["held_out_loss_before"]
        assert row["best_step"] > 0
    untrained, _ = compressed("whitened", reduction=0.25, train=False)
    for name in ("encoder.layers.1.fc1", "decoder.layers.1.encoder_attn.v_proj"):
        before, after = (load(p).get_submodule(f"model.{name}").lr_A for p in (untrained, out))
        assert not torch.equal(before, after)


def test_ranks_by_the_loss_cost_less_than_uniform_ones(compressed):
    _, chosen = compressed("fast")
    _, uniform = compressed("fast", strategy="uniform")
    assert 0 < chosen["predicted_loss_increase"] < uniform["predicted_loss_increase"]


class _KillAt:
    """A progress that ends the process at the `count`-th tick of a stage."""

    def __init__(self, stage: str, count: int) -> None:
        self.stage, self.left = stage, count

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert done <= total
        self.left -= stage == self.stage
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("stage", ["block 2 sensitivity", "block 1 train", "block 3 train"])
def test_killed_and_taken_up_it_ends_bit_for_bit_the_same(
    stage, whisper, manifest, tmp_path, device, compressed
):
    if device.type == "cuda":
        pytest.skip("a process with CUDA cannot be forked")
    options = {"reduction": 0.2, "text": manifest, "device": "cpu", "checkpoint_seconds": 0}
    whole, out = compressed("default")[0], tmp_path / "killed"
    pid = os.fork()
    if pid == 0:
        try:
            lillama.compress(whisper, out, progress=_KillAt(stage, 2), **options)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL and not out.exists()
    assert out.with_name("killed.unfinished").is_dir()
    lillama.compress(whisper, out, **options)
    assert content(out) == content(whole)


def test_progress_counts_positions_and_tokens(whisper, manifest, tmp_path):
    last: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        last[stage.split()[-1]] = done, total

    options = {"reduction": 0.2, "text": manifest, "device": "cpu", "tokens": 8 * POSITIONS}
    lillama.compress(whisper, tmp_path / "out", progress=progress, **options)
    assert last.keys() == {"sensitivity", "teacher", "student", "train"}
    assert last["sensitivity"][0] == last["sensitivity"][1]
    assert last["train"][0] == last["train"][1] > 8 * 2 * 3 * POSITIONS


def test_targets_are_every_linear_layer_of_both_halves():
    model = skeleton(whisper_config())
    blocks = named_blocks(model)
    assert list(blocks)[0] == "model.encoder.layers.0" and len(blocks) == 4
    found = {n for block in blocks.values() for n, m in block.named_modules() if is_linear(m)}
    assert found == set(WHISPER.targets.values())
    assert set(WHISPER.default_targets) == set(WHISPER.targets)
    own = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    outside = {n for n in own if not n.startswith(tuple(f"{path}." for path in blocks))}
    behind = {"model.decoder.layer_norm", WHISPER.embedding}
    # the head has no weight of its own: it is tied
    assert outside - {WHISPER.head} == {*WHISPER.before_blocks, *behind}


def test_plan_counts_both_halves_and_chosen_targets(whisper):
    found = lillama.plan(whisper, 0.1)
    assert found["params_before"] == 66_752 and found["peak_memory_bytes"]["peak"] > 0
    options: dict[str, Any] = {"model": whisper, "reduction": 0.02}
    plan = make_plan(PlanConfig(**options, targets=("encoder_attn_v_proj", "fc1")))
    assert [matrix.name for matrix in plan.matrices] == [
        "model.encoder.layers.0.fc1",
        "model.encoder.layers.1.fc1",
        "model.decoder.layers.0.encoder_attn.v_proj",
        "model.decoder.layers.0.fc1",
        "model.decoder.layers.1.encoder_attn.v_proj",
        "model.decoder.layers.1.fc1",
    ]
    assert plan.outside == (-1, 4) and plan.head is plan.embedding is None
    with pytest.raises(InputError, match="proj_out: the embeddings and the output head of a spe"):
        make_plan(PlanConfig(**options, targets=("proj_out",)))


def test_report_has_a_row_for_every_block(compressed):
    out, _ = compressed("fast")
    page = report(out)[0].read_text()
    assert all(f"block {index}" in page for index in range(4))


def test_what_is_for_models_of_text_is_refused_in_one_line(whisper, compressed, manifest, tmp_path):
    out, _ = compressed("fast")
    new = tmp_path / "new"
    text = {"text": manifest}
    calls = {
        "eval": lambda: lillama.eval(out, text=manifest),
        "generate": lambda: lillama.generate(out, "a"),
        "finetune": lambda: lillama.finetune(out, new, base=whisper, **text),
        "sample": lambda: sample(whisper, new),
        "load_model": lambda: load_model(out, torch.device("cpu")),
    }
    for call in calls.values():
        said = r"is a speech model \(model_type 'whisper'\)"
        with pytest.raises(InputError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value) and not new.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ()}, "cannot write its own calibration data; give --text MANIFEST.jsonl"),
        ({"preset": "best"}, "preset best trains the whole model on text"),
        ({"tokens": 10**6}, "the manifests have 40 clips, needed are 20000 to train"),
    ],
)
def test_options_for_models_of_text_are_refused(options, message, whisper, manifest, tmp_path):
    with pytest.raises(InputError, match=message):
        given = {"reduction": 0.2, "text": manifest, "device": "cpu", **options}
        lillama.compress(whisper, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_the_hub_is_refused(whisper, tmp_path):
    text = (HubText(dataset="org/clips"),)
    options = CompressConfig(model=whisper, out=tmp_path / "out", reduction=0.2, text=text)
    with pytest.raises(InputError, match="of the Hub; of a speech model clips are read from files"):
        check_speech_options(options)


def test_several_processes_are_refused(whisper, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="compressed by one process; start the command without to"):
        lillama.compress(whisper, tmp_path / "out", reduction=0.2, text=manifest)


def test_a_decoder_alone_is_refused(tmp_path, manifest):
    config = whisper_config()
    WhisperForCausalLM(config).save_pretrained(tmp_path / "decoder")
    assert read_config(tmp_path / "decoder").model_type == "whisper"
    with pytest.raises(InputError, match="WhisperForCausalLM cannot be compressed: of model_type"):
        lillama.plan(tmp_path / "decoder", 0.2)


def test_a_matrix_of_a_speech_model_is_known_by_its_name(whisper):
    plan = make_plan(PlanConfig(model=whisper, reduction=0.1))
    assert {m.name for m in plan.matrices if is_speech_matrix(m.name)} == {
        m.name for m in plan.matrices if "encoder." in m.name or "encoder_attn" in m.name
    }
    assert not is_speech_matrix("model.decoder.layers.0.fc1")
