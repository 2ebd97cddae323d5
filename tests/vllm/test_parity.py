"""vLLM with the plugin gives the tokens that transformers gives, however the model is split."""

import pytest
from conftest_vllm import transformers_tokens, vllm_tokens  # placeholder
