"""Messages about models, texts and options (see messages.py)."""

import json

from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import lillama
from tests.messages import case

# The model


@case("... is not a checkpoint folder; give the path of a local model")
def _(kit):
    lillama.plan(kit.folder / "nowhere", 0.2)


@case("... is not a checkpoint: it has no config.json")
def _(kit):
    lillama.plan(kit.folder, 0.2)


@case("... is not a JSON object: ...")
def _(kit):
    kit.written("config.json", "{")
    lillama.plan(kit.folder, 0.2)


@case("unknown architecture: model_type ... is not supported; supported are ...")
def _(kit):
    lillama.plan(kit.edited_config(kit.mamba, model_type="no-such"), 0.2)


@case("... holds no model.safetensors and no index of shards...")
def _(kit):
    copy = kit.copy(kit.mamba)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    kit.compress(copy)


@case("shard ... is missing; the index model.safetensors.index.json names it")
def _(kit):
    copy = kit.copy(kit.small)
    next(copy.glob("model-00001*")).unlink()
    lillama.generate(copy, "the", device="cpu")


@case("shard ... is truncated or damaged: it has ... bytes, its header wants ...")
def _(kit):
    file = kit.copy(kit.mamba) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    kit.compress(file.parent)


@case("... lacks tensors the model needs: ...")
def _(kit):
    kit.compress(kit.edited_weights(kit.mamba, lambda t: t.pop("backbone.layers.1.mixer.D")))


@case("... holds no tokenizer: none of ...")
def _(kit):
    copy = kit.copy(kit.mamba)
    (copy / "tokenizer.json").unlink()
    kit.compress(copy)


@case("the tokenizer gives token ..., the model has ...; they do not belong together")
def _(kit):
    kit.compress(kit.make_checkpoint("mamba", vocab_size=100))


@case(
    "the model is quantized with ..., and compressing works on plain weights; "
    "give the original checkpoint ..."
)
def _(kit):
    lillama.plan(
        kit.edited_config(kit.mamba, quantization_config={"quant_method": "gptq", "bits": 4}), 0.2
    )


@case("... is itself compressed by lillama; give the dense base model")
def _(kit):
    kit.compress(kit.small)


@case("the weight ... holds NaN or infinity; repair the checkpoint")
def _(kit):
    name = "backbone.layers.0.mixer.in_proj.weight"
    kit.compress(kit.edited_weights(kit.mamba, lambda t: t[name][0].fill_(float("nan"))))


# A compressed checkpoint


@case("...ignore_mismatched_sizes... thus raising an error...")
def _(kit):
    kit.monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lillama")
    kit.monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lillama")
    AutoModelForCausalLM.from_pretrained(kit.small)


@case("quantization_config has unknown keys ...; it was written by a newer lillama, upgrade")
def _(kit):
    copy = kit.edited_config(kit.small, quantization_config={"later": 1})
    lillama.generate(copy, "the", device="cpu")


@case("format_version must be ..., got ...; the checkpoint was written by another version...")
def _(kit):
    copy = kit.edited_config(kit.small, quantization_config={"format_version": 1})
    lillama.generate(copy, "the", device="cpu")


@case("the checkpoint does not fit its config.json; ...")
def _(kit):
    ranks = json.loads((kit.small / "config.json").read_text())["quantization_config"]["ranks"]
    changed = {"ranks": {name: rank + 1 for name, rank in ranks.items()}}
    lillama.generate(kit.edited_config(kit.small, quantization_config=changed), "a", device="cpu")


@case("... holds NaN or infinity; the checkpoint is damaged")
def _(kit):
    ranks = json.loads((kit.small / "config.json").read_text())["quantization_config"]["ranks"]
    name = f"{next(iter(ranks))}.lr_A"
    copy = kit.edited_weights(kit.small, lambda t: t[name].fill_(float("inf")), name)
    lillama.generate(copy, "the", device="cpu")


@case("... is not compressed by lillama; there is nothing to export")
def _(kit):
    lillama.export(kit.mamba, kit.out)


@case("... is not compressed by lillama; compress it first")
def _(kit):
    lillama.finetune(kit.mamba, kit.out, base=kit.mamba, text=kit.text)


@case("... is a dense model; report is about what ...")
def _(kit):
    copy = kit.copy(kit.small)
    (copy / "config.json").write_bytes((kit.mamba / "config.json").read_bytes())
    lillama.report(copy)


# The text


@case("text file ...: No such file or directory; check the path")
def _(kit):
    kit.compress(text=kit.folder / "nowhere.txt")


@case("text file ... is a folder; give the files in it one by one")
def _(kit):
    kit.compress(text=kit.folder)


@case("text file ... is empty or only white space; give a file with text")
def _(kit):
    kit.compress(text=kit.written("t.txt", " \n"))


@case("text file ... is not UTF-8: ...; convert it to UTF-8")
def _(kit):
    kit.compress(text=kit.written("t.txt", b"the cat \xff"))


@case("... has no key 'text', its keys: ...; give 'text' with a string, or ...")
def _(kit):
    kit.compress(text=kit.written("t.jsonl", '{"body": "dogs"}\n'))


@case("... is not JSON ...; give one JSON object per line")
def _(kit):
    kit.compress(text=kit.written("t.jsonl", '{"text":\n"dogs"}\n'))


@case("a text file is given twice: ...; give it once")
def _(kit):
    kit.compress(text=[kit.text, kit.text])


@case("the text is too short: ... tokens, needed are ...; lower --tokens or add --text files")
def _(kit):
    kit.compress(text=kit.written("t.txt", "the cat sat on a mat " * 10))


# Options


@case("--reduction must lie between 0 and 1, both excluded...")
def _(kit):
    lillama.plan(kit.mamba, 20)


@case("--reduction ... cannot be reached: with strategy ... at most ... can be removed")
def _(kit):
    lillama.plan(kit.mamba, 0.95)


@case("--targets must be some of ... for ..., got ...")
def _(kit):
    lillama.plan(kit.mamba, 0.2, targets=("q_proj",))


@case("--targets with embeddings or the output head need a preset that measures gradients ...")
def _(kit):
    lillama.plan(kit.mixtral, 0.02, targets=("lm_head",), preset="whitened")


@case("--seq-len must be at most ... for this model, got ...")
def _(kit):
    kit.compress(kit.mixtral, seq_len=513, tokens=1100)


@case("--device ... is not available: ... CUDA devices found; use cpu")
def _(kit):
    kit.compress(device="cuda:99")


@case("--against has a vocabulary of ..., MODEL of ...; they are not a model and its base")
def _(kit):
    other = kit.make_checkpoint("mamba", vocab_size=320)
    lillama.eval(kit.small, kit.text, against=other, device="cpu", seq_len=32)
