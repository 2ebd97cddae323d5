"""eval --tasks: the same as lm-evaluation-harness called directly, offline and on local rows."""

import functools
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lillama
from lillama.cli import app as cli
from lillama.errors import InputError
from lillama.evaluate.tasks import EXTRA

# datasets reads it once, when it is imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
WORDS = "cat sat mat old dogs ran past some green hills nobody saw them go".split()
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: "the {{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""

needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRA), reason="needs lillama[eval]"
)
# what the harness and its packages say of themselves while they are imported or end
quiet = pytest.mark.filterwarnings(
    "ignore:You passed .quantization_config.:UserWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """The harness runs pip and others to describe the machine after each call: seconds."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness reads its own 14,000 YAML files for every index: 10 seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(
        tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks `cats` and `dogs`: 20 questions each, with four choices of different lengths."""
    path = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(("cats", "dogs")):
        chance = random.Random(seed)
        rows = [
            {
                "question": " ".join(chance.choices(WORDS, k=5)),
                "choices": [" ".join(chance.choices(WORDS, k=k)) for k in (1, 2, 3, 2)],
                "label": chance.randrange(4),
            }
            for _ in range(20)
        ]
        file = path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        text = TASK.format(name=name, file=file, cache=path / "cache")
        (path / f"{name}.yaml").write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(mixtral, text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    lillama.compress(
        mixtral, out, reduction=0.3, text=text_file, tokens=300, seq_len=32, train=False,
        preset="whitened", device="cpu",
    )  # fmt: skip
    return out


@needs_harness
@quiet
def test_tasks_equal_the_harness_called_directly(mixtral, compressed, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = lillama.eval(
        compressed, tasks=("cats", "dogs"), task_path=folder, against=mixtral, device="cpu"
    )
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert state == after, "the harness seeds every generator"
    assert found["lm_eval"] == lm_eval.__version__ and "perplexity" not in found
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for path, prefix in ((compressed, ""), (mixtral, "base_")):
        direct: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(path), "dtype": "float32"},
            tasks=["cats", "dogs"],
            task_manager=manager,
            device="cpu",
            batch_size=3,
        )
        for task in ("cats", "dogs"):
            wanted = direct["results"][task]
            for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
                value = wanted[f"{metric},none"]
                assert found["tasks"][task][prefix + metric] == pytest.approx(value), metric
    cats = found["tasks"]["cats"]
    assert (cats["version"], cats["rows"]) == (1.5, 20)
    assert cats["acc_recovery_percent"] == pytest.approx(100 * cats["acc"] / cats["base_acc"])
    accuracies = [found["tasks"][t][f"{p}{m}"] for t in ("cats", "dogs") for p in ("", "base_")
                  for m in ("acc", "acc_norm")]  # fmt: skip
    assert len(set(accuracies)) > 1 and all(0 < a < 1 for a in accuracies), "the figures differ"


@needs_harness
@quiet
def test_tasks_limit_and_file_on_the_command_line(
    mamba, folder, own_tasks_only, monkeypatch, capsys
):
    arguments = ["eval", str(mamba), "--tasks", "dogs", "--task-path", str(folder / "dogs.yaml")]
    monkeypatch.setattr(sys, "argv", ["lillama", *arguments, "--limit", "5", "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["tasks"]["dogs"]["rows"] == 5 and report.keys() >= {"params", "bytes", "lm_eval"}
    assert "base_acc" not in report["tasks"]["dogs"]


@needs_harness
@quiet
def test_tasks_words_equals_the_harness_wikitext(mixtral, mamba, tokenizer, tmp_path):
    """`--metric words` against the harness's own task, its data replaced by local pages."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    pages = [
        ' = Old dogs = \n \n some dogs , 1 @,@ 000 ( old ) ran past : nobody \'s " mat " . \n'
        + " the cat sat on a mat while old dogs ran ; " * 30,
        " = A cat = \n the cat \n",
    ]
    file = tmp_path / "pages.jsonl"
    file.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), "utf-8")
    theirs = Path(lm_eval.__file__).parent / "tasks" / "wikitext"
    task = (theirs / "wikitext.yaml").read_text("utf-8")
    task = task.replace("task: wikitext", "task: local_pages")
    task = task.replace("dataset_path: EleutherAI/wikitext_document_level", "dataset_path: json")
    local = f"dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {tmp_path / 'cache'}}}"
    task = task.replace("dataset_name: wikitext-2-raw-v1", local)
    task = task.replace("training_split: train\nvalidation_split: validation\n", "")
    (tmp_path / "local_pages.yaml").write_text(task, "utf-8")
    (tmp_path / "preprocess_wikitext.py").write_text(
        (theirs / "preprocess_wikitext.py").read_text("utf-8"), "utf-8"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for path, length in ((mixtral, 64), (mamba, 512)):
        direct: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(path), "dtype": "float32", "max_length": length},
            tasks=["local_pages"],
            task_manager=manager,
            device="cpu",
        )
        wanted = direct["results"]["local_pages"]
        found = lillama.eval(path, file, metric="words", seq_len=length, device="cpu")
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            assert found[name] == pytest.approx(wanted[f"{name},none"], rel=1e-5), name
        assert found["tokens"] > 64, "more than one window"


@needs_harness
@quiet
def test_tasks_that_do_not_exist_are_one_line(mamba, folder, own_tasks_only, tmp_path):
    with pytest.raises(InputError, match="has no task 'cows'; `lm-eval ls tasks` lists them"):
        lillama.eval(mamba, tasks=("cats", "cows"), task_path=folder)
    with pytest.raises(InputError, match="--task-path .* does not exist; give a folder or a .yaml"):
        lillama.eval(mamba, tasks="cats", task_path=tmp_path / "none")
    text = TASK.format(name="lost", file=tmp_path / "lost.jsonl", cache=tmp_path)
    (tmp_path / "lost.yaml").write_text(text, "utf-8")
    with pytest.raises(InputError, match="cannot run lost: .*lost.jsonl") as caught:
        lillama.eval(mamba, tasks=("lost",), task_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_tasks_without_the_extra_say_what_to_install(mamba, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in EXTRA else find(name)
    )
    monkeypatch.setattr(sys, "argv", ["lillama", "eval", str(mamba), "--tasks", "arc_easy"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lillama: error: --tasks needs lm-evaluation-harness, not installed")
    assert line.endswith("pip install 'lillama[eval]'")
