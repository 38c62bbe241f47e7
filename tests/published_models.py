"""Tiny models of families whose publishers store them as transformers does, with weights at which a wrong
number is seen: made and judged by transformers, in the release that runs this.

    PYTHONPATH=RELEASE python published_models.py OUT

writes a folder for each of `CASES` into OUT, and into its judged.pt what the release makes of `ids` in
float32 and bfloat16: the words as they enter the first layer, and the logits. Not a test module.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

T, V = 40, 61
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN3 = {
    "family": "qwen3",
    "model": "Qwen3",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 3e-4,
    "rope_theta": 3e4,
    "sliding_window": 9,
    "max_window_layers": 1,
    "max_position_embeddings": 64,
}
GEMMA2 = {
    "family": "gemma2",
    "model": "Gemma2",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 9,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.5,
    "rms_norm_eps": 3e-4,
    "rope_theta": 3e4,
    "max_position_embeddings": 64,
}
GPT_NEOX = {
    "family": "gpt-neox",
    "model": "GPTNeoX",
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rotary_pct": 0.5,
    "rotary_emb_base": 3e4,
    "layer_norm_eps": 3e-4,
    "max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3-tied": {**QWEN3, "tie_word_embeddings": True},
    "qwen3-multi-head": {**QWEN3, "num_key_value_heads": 6},
    "qwen3-one-key": {**QWEN3, "num_key_value_heads": 1},
    "qwen3-window": {**QWEN3, "use_sliding_window": True},
    "qwen3-yarn": {**QWEN3, "rope_scaling": YARN},
    "gemma2": GEMMA2,
    "gemma2-untied": {**GEMMA2, "tie_word_embeddings": False},
    "gemma2-multi-head": {**GEMMA2, "num_key_value_heads": 4},
    "gemma2-no-caps": {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2-odd-layers-slide": {**GEMMA2, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "gemma2-no-layer-slides": {**GEMMA2, "layer_types": ["full_attention"] * 4},
    "gemma2-erf": {**GEMMA2, "hidden_activation": "gelu"},
    "gemma2-yarn": {**GEMMA2, "rope_scaling": YARN},
    "gpt-neox": GPT_NEOX,
    "gpt-neox-tied": {**GPT_NEOX, "tie_word_embeddings": True},
    "gpt-neox-sequential": {**GPT_NEOX, "use_parallel_residual": False},
    "gpt-neox-no-attention-bias": {**GPT_NEOX, "attention_bias": False},
    "gpt-neox-fast": {**GPT_NEOX, "hidden_act": "gelu_fast"},
    "gpt-neox-relu": {**GPT_NEOX, "hidden_act": "relu"},
    "gpt-neox-whole": {**GPT_NEOX, "rotary_pct": 1.0},
    "gpt-neox-yarn": {**GPT_NEOX, "rope_scaling": YARN},
}


def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    case = {k: v for k, v in CASES[name].items() if k != "family"}
    kind = case.pop("model")
    config = getattr(transformers, kind + "Config")(**case)
    config._attn_implementation = "eager"
    torch.manual_seed(4)
    made = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight, values in made.named_parameters():
            around = 1.0 if kind != "Gemma2" and weight.endswith("norm.weight") else 0.0
            values.normal_(around, 0.2)
    return made.to(dtype)


def ids() -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(8))


def written(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and the tensors of the model as the library stores it."""
    from safetensors.torch import load_file

    model(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "model.safetensors")


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    for name in CASES:
        folder, found = Path(out) / name, {}
        written(name, folder)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                made = model(name, dtype)(ids(), output_hidden_states=True)
            found |= {f"words {dtype}": made.hidden_states[0], f"logits {dtype}": made.logits}
        torch.save(found, folder / "judged.pt")


if __name__ == "__main__":
    main(sys.argv[1])
