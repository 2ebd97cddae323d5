"""Blocks of an encoder and of the decoder behind it: inputs, statistics, gradients and training
against transformers' own model."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperForConditionalGeneration

import lillama
from lillama.checkpoint import read_config
from lillama.compress.activations import ActivationMemory, stored
from lillama.compress.blocks import TeacherBlocks, block_output
from lillama.compress.calibrate import MomentCollector
from lillama.compress.distill import Stream, batch_loss
from lillama.compress.encoder import STATES, Encoded, EncoderDecoderBlocks, teacher_blocks
from lillama.compress.factorize import Moment, moment_side, shrunk, whitened_svd
from lillama.compress.gradients import MatrixSensitivity
from lillama.compress.plan import make_plan
from lillama.compress.sensitivity import measure_sensitivity
from lillama.compress.speech import speech_calibration
from lillama.config import PRESETS, CompressConfig, PlanConfig
from lillama.data import TokenBlocks
from lillama.families import family_of
from tests.tiny_whisper import POSITIONS, save_whisper, write_manifest

SEED = 5


@pytest.fixture(scope="module")
def whisper(tokenizer, tmp_path_factory) -> Path:
    """Three blocks of the encoder and two of the decoder, unlike published ones."""
    path = tmp_path_factory.mktemp("whisper") / "whisper"
    return save_whisper(path, tokenizer, encoder_layers=3)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("clips"), 16)


@pytest.fixture(scope="module")
def part(whisper, manifest) -> TokenBlocks:
    """8 clips with padded transcripts."""
    options = CompressConfig(model=whisper, out=whisper, reduction=0.1, text=(manifest,))
    train, _ = speech_calibration(options, read_config(whisper))
    assert train.mask is not None and not bool(train.mask.all())
    return train


def teacher_of(path: Path, device: torch.device) -> EncoderDecoderBlocks:
    found = teacher_blocks(path, read_config(path), family_of("whisper"), device, torch.float32)
    assert isinstance(found, EncoderDecoderBlocks)
    return found


def whole(path: Path, part: TokenBlocks, device: torch.device, **given):
    """transformers' own model on these rows."""
    model = WhisperForConditionalGeneration.from_pretrained(path).to(device)
    assert part.clips is not None and part.mask is not None
    features = part.clips.features(range(len(part.input_ids))).to(device)
    return model, {
        "input_features": features,
        "decoder_input_ids": part.input_ids.to(device),
        "decoder_attention_mask": part.mask.long().to(device),
        "use_cache": False,
        **given,
    }


def test_teacher_blocks_is_the_plain_class_for_other_models(mamba, device):
    config = read_config(mamba)
    found = teacher_blocks(mamba, config, family_of("mamba"), device, torch.float32)
    assert type(found) is TeacherBlocks and found.num_encoder == 0


@torch.no_grad()
def test_one_block_at_a_time_equals_the_model(whisper, part, device):
    teacher = teacher_of(whisper, device)
    assert teacher.num_encoder == 3 and len(teacher.blocks) == 5
    assert teacher.block_paths[2:4] == ["model.encoder.layers.2", "model.decoder.layers.0"]
    clips, rows = teacher.rows_of(part, 2), torch.arange(len(part.input_ids))
    assert clips is part.clips and teacher.rows_of(part, 3) is part
    assert clips.shape == (8, POSITIONS)
    hidden = teacher.first_states(clips, rows)
    for index in range(3):
        with teacher.block(index) as block:
            kwargs = teacher.arguments_of(index, clips.shape, None)
            hidden = block_output(block, hidden, kwargs)
    states = teacher.encoded(hidden)
    model, given = whole(whisper, part, device)
    wanted = model(**given)
    torch.testing.assert_close(states, wanted.encoder_last_hidden_state, rtol=1e-4, atol=1e-4)
    with teacher.embeddings():
        hidden = teacher.first_states(part, rows)
    for index in (3, 4):
        kwargs = teacher.arguments_of(index, part.shape, part.mask)
        assert STATES not in kwargs
        with teacher.block(index) as block:
            hidden = block_output(block, hidden, {**kwargs, STATES: states})
    with teacher.head():
        found = teacher.logits(hidden, part.mask)
    assert part.mask is not None
    kept = part.mask.to(device)
    torch.testing.assert_close(found[kept], wanted.logits[kept], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def inputs_of(path: Path, part: TokenBlocks, names: list[str], device) -> dict[str, Tensor]:
    """{matrix: everything that goes into it [n, K], fp64}, padding of transcripts left out."""
    model, given = whole(path, part, device)
    kept: dict[str, Tensor] = {}
    for name in names:

        def hook(module, args, output, name: str = name):
            kept[name] = args[0].double()

        model.get_submodule(name).register_forward_hook(hook)
    model(**given)
    assert part.mask is not None
    mask = part.mask.to(device)
    return {
        name: x.flatten(0, 1) if x.shape[1] == POSITIONS else x[mask] for name, x in kept.items()
    }


@torch.no_grad()
def test_untrained_factors_are_those_by_hand(whisper, manifest, tmp_path, device):
    """Of an encoder's fc1, of the decoder's fc2 (padding left out) and of a matrix that reads the
    encoder's states (nothing left out), each in the first block of its half: everything before it
    is the teacher's."""
    names = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.v_proj"]
    names += ["model.decoder.layers.0.fc2"]
    options = {"reduction": 0.2, "preset": "whitened", "train": False, "device": str(device)}
    lillama.compress(whisper, tmp_path / "out", text=manifest, **options)
    compressed = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    config = CompressConfig(model=whisper, out=whisper, reduction=0.1, text=(manifest,))
    part, _ = speech_calibration(config, read_config(whisper))
    dense = WhisperForConditionalGeneration.from_pretrained(whisper)
    for name, x in inputs_of(whisper, part, names, device).items():
        new = compressed.get_submodule(name)
        W = dense.get_submodule(name).get_parameter("weight").to(device)
        side = moment_side(*W.shape)
        seen = x if side == "input" else x @ W.double().mT
        moment = Moment(side, seen.mT @ seen, len(x), float(x.square().sum()))
        A, B = whitened_svd(W, shrunk(W, moment, PRESETS["whitened"].shrinkage), new.rank)
        product = new.get_parameter("lr_B") @ new.get_parameter("lr_A")
        torch.testing.assert_close(product, (B @ A).float().cpu(), rtol=1e-3, atol=1e-3)
        if new.bias is not None:
            old = dense.get_submodule(name).get_parameter("bias")
            assert torch.equal(new.get_parameter("bias"), old)


def labels_drawn(logits: Tensor) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(SEED)
    rows = [torch.multinomial(row.softmax(-1), 1, generator=generator)[:, 0] for row in logits]
    return torch.stack(rows)


def expected(path: Path, part: TokenBlocks, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """{matrix: (x [n, K], g [n, N])} by autograd through transformers' own model, in fp64; padding
    of transcripts left out."""
    assert part.mask is not None
    mask = part.mask
    model, given = whole(path, part, torch.device("cpu"))
    model.requires_grad_(False)
    with torch.no_grad():
        labels = labels_drawn(model(**given).logits)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def save(module, args, output):
            output.requires_grad_()
            x = args[0].detach().double()
            output.register_hook(lambda g: kept.update({name: (x, g.double())}))

        return save

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    losses = F.cross_entropy(
        model(**given).logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    losses[mask.flatten()].sum().backward()
    return {
        name: tuple(v.flatten(0, 1) if v.shape[1] == POSITIONS else v[mask] for v in values)  # type: ignore[misc]
        for name, values in kept.items()
    }


@pytest.mark.parametrize("host_bytes", [2**30, 0], ids=["memory", "disk"])
def test_gradients_are_those_of_the_whole_model(host_bytes, whisper, part, tmp_path):
    device = torch.device("cpu")
    recipe = dataclasses.replace(
        PRESETS["default"],
        **{"gradient_damping": 0.0, "shrinkage": 1e-6, "batch_size": 3},
        sensitivity_tokens=8 * POSITIONS,
    )
    plan = make_plan(PlanConfig(model=whisper, reduction=0.1))
    found: dict[str, MatrixSensitivity] = {}
    blocks: list[int] = []

    def on_block(index: int, values: dict[str, MatrixSensitivity]) -> None:
        blocks.append(index)
        found.update(values)

    memory = ActivationMemory(device, host_bytes, tmp_path)
    teacher, ticks = teacher_of(whisper, device), []
    measure_sensitivity(
        teacher, plan.matrices, part, recipe, memory, lambda *tick: ticks.append(tick), SEED,
        on_block,
    )  # fmt: skip
    assert blocks == [4, 3, 2, 1, 0] and len(found) == len(plan.matrices) == 3 * 6 + 2 * 10
    assert sum(tokens for _, tokens in ticks) == 2 * (3 * 8 * POSITIONS + 2 * part.mask.numel())

    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    kept = expected(whisper, part, list(found))
    assert kept.keys() == found.keys()
    for matrix in plan.matrices:
        name, (x, g) = matrix.name, kept[matrix.name]
        W = model.get_submodule(name).get_parameter("weight").detach().double()
        rows = g @ W if moment_side(*W.shape) == "input" else g
        want = rows.mT @ rows / len(g)
        scale = float(want.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            found[name].gradient.double(), want, rtol=1e-3, atol=1e-4 * scale
        )
        # what the optimal product of each rank leaves, summed over all rows that the matrix sees,
        # for each token of the transcripts: one unit for both halves
        noise = recipe.shrinkage * x.square().mean() * torch.eye(x.shape[1])
        H, C = g.mT @ g, x.mT @ x / len(x) + noise
        square = torch.linalg.eigvals(H @ W @ C @ W.mT).real.clamp_min(0).sort(descending=True)[0]
        left = [float(square[rank:].sum()) / 2 / int(part.mask.sum()) for rank in matrix.ranks]
        assert found[name].losses == pytest.approx(left, rel=2e-2, abs=3e-3 * max(left))


def test_moments_leave_padding_out_where_tokens_are_read(whisper, part, device):
    """Whatever stands in the padding, the statistics are the same; the encoder's states all
    count."""
    teacher = teacher_of(whisper, device)
    assert part.mask is not None
    mask = part.mask.to(device)
    paths = ["self_attn.q_proj", "fc1", "encoder_attn.v_proj"]
    states = torch.randn(8, POSITIONS, 32, device=device)
    found = []
    with teacher.block(3) as block, torch.no_grad():
        for filler in (0.0, 7.0):
            hidden = torch.randn(*mask.shape, 32, generator=torch.Generator().manual_seed(1))
            hidden = torch.where(mask[..., None], hidden.to(device), filler)
            collector = MomentCollector(block, teacher.family, paths, False)
            collector.mask = part.mask
            kwargs = teacher.arguments_of(3, part.shape, part.mask)
            with collector.attached():
                block(hidden, **kwargs, **{STATES: states})
            found.append([collector.pop(path) for path in paths])
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None
        torch.testing.assert_close(first.gram, second.gram, rtol=1e-4, atol=1e-4)
    counts = [moment.tokens for moment in found[0] if moment is not None]
    assert counts == [int(mask.sum()), int(mask.sum()), 8 * POSITIONS]


def test_both_streams_are_told_their_own_encoder(whisper, part, device):
    """A decoder block with the loss "joint": the teacher's inputs with the teacher's states, the
    student's with the student's, although both read the same embeddings."""
    teacher = teacher_of(whisper, device)
    n, T = part.shape
    inputs, target = torch.randn(2, n, T, 32).unbind(0)
    ours, theirs = torch.randn(2, n, POSITIONS, 32).unbind(0)
    same = stored(inputs)
    encoded = Encoded(stored(theirs), stored(ours))

    def kwargs(rows: Tensor) -> dict:
        assert part.mask is not None
        return teacher.arguments_of(3, (len(rows), T), part.mask[rows])

    stream = Stream(same, same, stored(target), part.mask, kwargs, encoded)
    assert stream.diverged and not dataclasses.replace(stream, encoded=None).diverged
    rows = torch.tensor([4, 1, 6])
    with teacher.block(3) as block, torch.no_grad():
        found = batch_loss(block, stream, rows, "joint", "nmse", device)
        alone = [
            batch_loss(
                block, dataclasses.replace(stream, encoded=Encoded(s, s)), rows, "teacher", "nmse",
                device,
            )
            for s in (encoded.teacher, encoded.student)
        ]  # fmt: skip
        assert float(found) == pytest.approx(float(sum(alone)), rel=1e-5)
        assert abs(float(alone[0] - alone[1])) > 1e-4
