"""python serve_tokens.py FOLDER JSON: greedy tokens of vLLM, as a line TOKENS [[..]] of stdout.

A process of its own: vLLM reads its environment once, and forks.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    folder, request = sys.argv[1], json.loads(sys.argv[2])
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, **request["options"]}
    if json.loads((Path(folder) / "config.json").read_text())["model_type"] == "mamba":
        options["worker_extension_cls"] = "mamba_on_cpu.MambaOnCpu"
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        **options,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    sys.stdout.write(f"\nTOKENS {json.dumps(tokens)}\n")


if __name__ == "__main__":
    main()
