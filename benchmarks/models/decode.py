"""Decode throughput of the torch backend on a small random model, without an engine above it.

python benchmarks/models/decode.py [--dtype f32] [--batches 1,32,256] [--context 64] [--sampled]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm_models import BackendOptions, TorchBackend, load_backend
from vllm_traits import Batch, Chunk, SamplingParams, Start

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


def write_checkpoint(folder: Path) -> None:
    """A random checkpoint of `SHAPE`."""
    hidden, ffn, dim = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    heads, kv = SHAPE["num_attention_heads"] * dim, SHAPE["num_key_value_heads"] * dim
    layer = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(SHAPE["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (SHAPE["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE))


def decode_rate(
    backend: TorchBackend, batch_size: int, context: int, params: SamplingParams
) -> float:
    """Tokens per second of `batch_size` sequences that have `context` tokens each."""
    steps = max(20, min(200, 4000 // batch_size))
    prompt = tuple(3 + i % 4000 for i in range(context))
    size = backend.info.block_size
    blocks = -(-(context + steps + 8) // size)
    for i in range(batch_size):
        start = Start(i, prompt, params, seed=i, num_prompt_tokens=context)
        table = tuple(range(i * blocks, (i + 1) * blocks))
        backend.forward(Batch((Chunk(i, 0, context, table),), (start,))).result()
    began = time.perf_counter()
    for step in range(steps):
        chunks = tuple(Chunk(i, context + step, 1) for i in range(batch_size))
        backend.forward(Batch(chunks)).result()
    rate = steps * batch_size / (time.perf_counter() - began)
    backend.forward(Batch((), released=tuple(range(batch_size))))
    return rate


def main() -> None:
    """Print one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--sampled", action="store_true")
    args = parser.parse_args()
    params = (
        SamplingParams(temperature=0.7, top_p=0.95)
        if args.sampled
        else SamplingParams(temperature=0.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        backend = load_backend(BackendOptions(Path(folder), dtype=args.dtype))
        for batch_size in map(int, args.batches.split(",")):
            rate = decode_rate(backend, batch_size, args.context, params)
            print(f"{args.dtype} context {args.context} batch {batch_size}: {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
