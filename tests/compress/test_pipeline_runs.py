"""compress as a run: what it feeds, what it holds in memory, that it repeats, and how it ends."""

import contextlib
import gc
import importlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lillama
from lillama.checkpoint.journal import Journal
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.train.hidden_states import HiddenStates
from lillama.errors import InputError, RunError

KINDS = ["mixtral", "mamba"]
run_module = importlib.import_module("lillama.compress.run")


@pytest.fixture
def small(text_file: Path, tmp_path: Path, device: torch.device):
    """small(model, name="out", **options) -> (report, OUT), with few tokens."""

    def run(model: Path, name: str = "out", **options: Any) -> tuple[dict, Path]:
        values: dict[str, Any] = {"reduction": 0.2, "text": text_file, "tokens": 400, "seq_len": 32}
        values["preset"] = "whitened"  # nothing runs before the blocks do
        out = tmp_path / name
        return lillama.compress(model, out, **{"device": str(device), **values, **options}), out

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in files(folder).items() if k.endswith(".safetensors")}


def nothing_left(folder: Path) -> bool:
    return not [file for file in folder.iterdir() if file.name.startswith("out")]


def finished(folder: Path) -> list[str]:
    """What the unfinished run of OUT keeps; OUT itself is not there."""
    assert not (folder / "out").exists()
    if nothing_left(folder):
        return []
    return [record["shard"] for record in Journal(folder / "out.unfinished").records]


@pytest.mark.parametrize("kind", KINDS)
def test_compress_same_seed_repeats_bit_for_bit_and_another_differs(
    kind, small, request, text_file, tmp_path
):
    # several pieces of 64 KiB, so that the seed chooses the text and not only its order
    text = tmp_path / "long.txt"
    text.write_text(text_file.read_text("utf-8") * 5, "utf-8")
    path = request.getfixturevalue(kind)
    first, again, other = (
        small(path, name, seed=seed, text=text)[1] for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert weights(first) == weights(again)
    assert (first / "recipe.json").read_bytes() == (again / "recipe.json").read_bytes()
    assert weights(first) != weights(other)


def test_compress_seed_orders_the_training_rows(small, mamba):
    """The text is one piece: both seeds draw the same blocks and see them in another order."""
    (_, first), (_, other) = (small(mamba, name, seed=i) for i, name in enumerate("ab"))
    digests = [
        json.loads((out / "recipe.json").read_text())["data_sha256"] for out in (first, other)
    ]
    assert digests[0] == digests[1]
    assert weights(first) != weights(other)


def test_compress_later_blocks_see_the_rounded_student(small, make_checkpoint, monkeypatch):
    """What a user will run is bf16: the student's stream must come from those weights."""
    seen: list[bool] = []
    original = HiddenStates.advance

    def advance(self: Any, student: torch.nn.Module, *args: Any) -> None:
        seen.extend(torch.equal(p, p.bfloat16().float()) for p in student.parameters())
        original(self, student, *args)

    monkeypatch.setattr(HiddenStates, "advance", advance)
    small(make_checkpoint("mamba", torch.bfloat16))
    assert seen and all(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_compress_losses_give_different_models(kind, small, request):
    path = request.getfixturevalue(kind)
    found = {}
    for loss in ("teacher", "student", "joint"):
        report, out = small(path, loss, loss=loss, tokens=800)
        found[loss] = (report["blocks"], weights(out))
    # in the first block both streams are equal: joint is twice the loss, so AdamW's steps agree
    first = {loss: rows[0]["held_out_loss_before"] for loss, (rows, _) in found.items()}
    assert first["teacher"] == pytest.approx(first["student"])
    assert first["joint"] == pytest.approx(2 * first["teacher"], rel=1e-5)
    second = {loss: rows[1]["held_out_loss_before"] for loss, (rows, _) in found.items()}
    # from the second on the student's own inputs are worse than the teacher's
    assert second["student"] > second["teacher"]
    assert second["joint"] > 2 * second["teacher"]


@pytest.mark.parametrize("kind", KINDS)
def test_compress_padded_samples_work_and_count_real_tokens_only(kind, small, request, tmp_path):
    rows = [{"text": "the cat sat on a mat while old dogs ran " * (1 + i % 4)} for i in range(80)]
    text = tmp_path / "samples.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = request.getfixturevalue(kind)
    report, out = small(path, text=text, packing=False, tokens=300, seq_len=48)
    assert 300 <= report["tokens"] < 300 + 48
    assert json.loads((out / "recipe.json").read_text())["options"]["packing"] is False
    assert all(
        row["held_out_loss_after"] <= row["held_out_loss_before"] for row in report["blocks"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_compress_with_streams_on_disk_gives_the_same_bits(kind, small, request, tmp_path):
    """As much memory as one, two or all of the streams take, and none at all."""
    path = request.getfixturevalue(kind)
    _, out = small(path, "memory")
    wanted = weights(out)
    stream = (13 + 8) * 32 * 32 * 4
    for limit in (0, stream, 2 * stream):
        _, out = small(path, f"limit{limit}", activation_memory=limit)
        assert weights(out) == wanted
    assert {file.name for file in tmp_path.iterdir()} == {
        "memory", "limit0", f"limit{stream}", f"limit{2 * stream}",
    }  # fmt: skip


def test_compress_train_false_takes_no_step(small, mamba):
    report, _ = small(mamba, train=False)
    assert all(row["steps"] == row["best_step"] == 0 for row in report["blocks"])
    assert all(
        row["held_out_loss_before"] == row["held_out_loss_after"] for row in report["blocks"]
    )


def test_compress_training_lowers_the_held_out_loss(small, mamba):
    report, _ = small(mamba, tokens=3000)
    for row in report["blocks"]:
        assert row["best_step"] > 0
        assert row["held_out_loss_after"] < row["held_out_loss_before"]


@pytest.mark.parametrize("kind", KINDS)
def test_compress_streams_one_teacher_and_one_student_block(
    kind, small, make_checkpoint, monkeypatch
):
    """Never two teacher blocks loaded, never two students alive, all released at the end."""
    entered: list[int] = []
    live: list[int] = []
    students: list[weakref.ref] = []
    original_block, original_student = TeacherBlocks.block, run_module.student_structure

    @contextlib.contextmanager
    def block(self: TeacherBlocks, index: int):
        with original_block(self, index) as module:
            loaded = [
                i for i, b in enumerate(self.blocks) if not all(p.is_meta for p in b.parameters())
            ]
            assert loaded == [index]
            assert live == []
            live.append(index)
            entered.append(index)
            yield module
            live.remove(index)
        assert all(p.is_meta for b in self.blocks for p in b.parameters())

    def student_structure(*args: Any):
        gc.collect()
        assert not [ref for ref in students if ref() is not None], "the last student is alive"
        student = original_student(*args)
        students.append(weakref.ref(student))
        return student

    monkeypatch.setattr(TeacherBlocks, "block", block)
    monkeypatch.setattr(run_module, "student_structure", student_structure)
    path = make_checkpoint(kind, num_hidden_layers=4)
    small(path, strategy="uniform", reduction=0.25)
    assert entered == [0, 1, 2, 3] and len(students) == 4


def test_compress_frees_the_dense_experts_before_it_factorises(small, mixtral, monkeypatch):
    """At once, without the help of the garbage collector: in a large model they are most of it."""
    original, checked = run_module.fill_student, []
    gc.collect()

    def stacked() -> int:
        shapes = {(4, 128, 32), (4, 32, 64)}
        objects = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(tuple(t.shape) in shapes and not t.is_meta for t in objects)

    before = stacked()

    def fill_student(*args: Any) -> None:
        checked.append(stacked() - before)
        original(*args)

    monkeypatch.setattr(run_module, "fill_student", fill_student)
    gc.disable()
    try:
        small(mixtral, train=False)
    finally:
        gc.enable()
    assert checked == [0, 0]


def test_compress_does_not_compute_blocks_above_the_last_compressed(
    small, make_checkpoint, monkeypatch
):
    entered: list[int] = []
    original = TeacherBlocks.block

    def block(self: TeacherBlocks, index: int):
        entered.append(index)
        return original(self, index)

    monkeypatch.setattr(TeacherBlocks, "block", block)
    small(make_checkpoint("mixtral", num_hidden_layers=4), strategy="bottom", reduction=0.1)
    assert entered == [0]


@pytest.mark.parametrize("strategy", ["uniform", "bottom"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "init"])
def test_compress_progress_ends_at_its_total(train, strategy, small, make_checkpoint):
    calls: list[tuple[str, int, int]] = []
    path = make_checkpoint("mamba", num_hidden_layers=4)
    small(
        path,
        train=train,
        strategy=strategy,
        reduction=0.15,
        progress=lambda *call: calls.append(call),
    )
    dones = [done for _, done, _ in calls]
    assert dones == sorted(dones) and all(done <= total for _, done, total in calls)
    assert calls[-1][1] == calls[-1][2]
    assert len({total for _, _, total in calls}) == 1, "the total is known from the start"
    trained = {stage for stage, _, _ in calls if stage.endswith(" train")}
    assert bool(trained) == train


@pytest.mark.parametrize("kind", KINDS)
def test_compress_obeys_kernels_impl(kind, small, request, tmp_path, monkeypatch):
    # kernels would take minutes in the interpreter; what has none is refused at once
    monkeypatch.setattr("lillama_kernels.impl.TRITON_OPS", frozenset())
    with lillama.kernels_impl("triton"), pytest.raises(NotImplementedError, match="Triton kernel"):
        small(request.getfixturevalue(kind))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("inside", ["out", "deep/out", "."])
def test_compress_out_inside_model_is_refused(inside, make_checkpoint, text_file):
    path = make_checkpoint("mamba")
    (path / "deep").mkdir()
    before = sorted(file.name for file in path.rglob("*"))
    with pytest.raises(InputError, match="OUT must lie outside MODEL"):
        lillama.compress(path, path / inside, reduction=0.2, text=text_file, overwrite=True)
    assert sorted(file.name for file in path.rglob("*")) == before


def test_compress_out_around_model_is_refused(make_checkpoint, text_file):
    path = make_checkpoint("mamba")
    with pytest.raises(InputError, match="OUT must lie outside MODEL"):
        lillama.compress(path, path.parent, reduction=0.2, text=text_file, overwrite=True)
    assert (path / "config.json").exists()


@pytest.mark.parametrize("stage", ["block 0 teacher", "block 0 train", "block 1 train"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError], ids=["ctrl-c", "failure"])
def test_compress_interrupted_keeps_finished_blocks_and_harms_nothing(
    error, stage, small, mamba, tmp_path
):
    before = files(mamba)

    def progress(current: str, done: int, total: int) -> None:
        if current == stage:
            assert (tmp_path / "out.unfinished").is_dir()
            raise error("stop")

    with pytest.raises(error):
        small(mamba, progress=progress)
    assert finished(tmp_path) == (["block-0"] if stage == "block 1 train" else [])
    assert files(mamba) == before


def test_compress_interrupted_overwrite_keeps_the_old_result(small, mamba, tmp_path):
    _, out = small(mamba, train=False)
    before = files(out)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(mamba, progress=progress, overwrite=True, seed=9)
    assert files(out) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.unfinished"]
    small(mamba, overwrite=True, seed=9)
    assert weights(out) != {k: v for k, v in before.items() if k.endswith(".safetensors")}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def broken(path: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the checkpoint with all of one tensor multiplied, or one number replaced."""
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    if abs(value) < float("inf"):
        tensors[name] = tensors[name] * value
    else:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", "model.layers.1."),
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
@pytest.mark.parametrize("strategy", ["uniform", "bottom"])
def test_compress_bad_weight_is_named_wherever_it_is(
    strategy, name, shown, value, small, mixtral, tmp_path
):
    """Also in blocks that are only copied (bottom stops after block 0) and outside the blocks."""
    path = broken(mixtral, tmp_path / "broken", name, value)
    with pytest.raises(RunError, match=f"{shown}.* NaN or infinity"):
        small(path, strategy=strategy, reduction=0.1, train=False)
    good = {"model.layers.1.": ["block-0"], "model.layers.1.self_attn.k_proj": ["block-0"]}
    good |= {"lm_head": ["block-0", "block-1", "rest"]}
    assert finished(tmp_path) == good.get(shown, [])


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_compress_overflow_in_a_block_is_named(preset, small, mixtral, tmp_path):
    """Finite weights whose activations are not: no traceback from a decomposition."""
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    path = broken(mixtral, tmp_path / "broken", name, 1e38)
    with pytest.raises(RunError, match=r"model\.layers\.0 .*NaN or infinity"):
        small(path, strategy="bottom", preset=preset, reduction=0.1)
    assert nothing_left(tmp_path)


def test_compress_overflow_of_the_stored_dtype_is_named(small, mixtral, tmp_path):
    path = broken(mixtral, tmp_path / "broken", "lm_head.weight", 1e8)
    with pytest.raises(RunError, match=r"lm_head.weight reaches .* too large for float16; use"):
        small(path, dtype="float16", train=False)
    assert finished(tmp_path) == ["block-0", "block-1", "rest"]


def test_compress_seq_len_beyond_the_positions_is_refused(small, mixtral, tmp_path):
    with pytest.raises(InputError, match="--seq-len must be at most 512 for this model, got 513"):
        small(mixtral, seq_len=513)
    assert nothing_left(tmp_path)


def test_compress_tokenizer_of_another_model_is_refused(small, make_checkpoint, tmp_path):
    path = make_checkpoint("mamba", vocab_size=100)
    with pytest.raises(InputError, match="the model has 100; they do not belong together"):
        small(path)
    assert nothing_left(tmp_path)
