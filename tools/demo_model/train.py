"""Trains the tokenizer, the main model and the draft model, and writes their folders.

    python train.py --output DIR --minutes 28
    python train.py --output DIR --resume --mix skills --rate 2e-3 --minutes 36 --draft-minutes 6
    python train.py --output DIR --resume --mix polish --rate 1e-3 --minutes 25 --seed 8

The learning rate follows the share of the time budget that is used up, so a slower machine trains
on less text but ends in the same way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from corpus import MIXES, documents
from model import DRAFT, MAIN, Model, Shape, load, save
from tokenizer import save as save_tokenizer
from tokenizer import train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

BATCH_TOKENS = 6144
POOL = 2048  # documents that are sorted by length before they are cut into batches
PROMPT_WEIGHT = 0.3  # of a given token in the documents where it counts; a learned one weighs 1
PROMPT_SHARE = 0.15  # of the documents whose given tokens are learned too


def batches(tokenizer: Tokenizer, seed: int, mix: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of token ids [B, T] and weights [B, T], padded on the right with weight 0."""
    source, rng = documents(seed, mix), Random(seed)
    while True:
        pairs = list(islice(source, POOL))
        given = tokenizer.encode_batch([g for g, _ in pairs])
        learned = tokenizer.encode_batch([text for _, text in pairs])
        rows = []
        for g, t in zip(given, learned, strict=True):
            weight = PROMPT_WEIGHT if rng.random() < PROMPT_SHARE else 0.0
            rows.append((g.ids + t.ids, [weight] * len(g.ids) + [1.0] * len(t.ids)))
        rows.sort(key=lambda row: len(row[0]))
        cuts: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if len(row[0]) * (len(cuts[-1]) + 1) > BATCH_TOKENS:
                cuts.append([])
            cuts[-1].append(row)
        rng.shuffle(cuts)
        for cut in cuts:
            width = max(len(ids) for ids, _ in cut)
            ids = torch.zeros(len(cut), width, dtype=torch.long)
            weights = torch.zeros(len(cut), width)
            for i, (row_ids, row_weights) in enumerate(cut):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                weights[i, : len(row_ids)] = torch.tensor(row_weights)
            yield ids, weights


def loss_of(model: Model, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of every token given the ones before it."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids[:, :-1])
        keep = weights[:, 1:] > 0
        logits = model.logits(hidden[keep])
    losses = F.cross_entropy(logits.float(), ids[:, 1:][keep], reduction="none")
    kept = weights[:, 1:][keep]
    return (losses * kept).sum() / kept.sum()


def optimizers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "layers" not in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Short warm-up by steps, then level, then linear decay to zero over the last 60 %."""
    return peak * min(1.0, (step + 1) / 100) * min(1.0, (1.0 - progress) / 0.6)


class Plan(NamedTuple):
    """How long and how fast a model is trained, and where it goes."""

    minutes: float
    peak_rate: float
    save_every: float  # minutes
    seed: int
    mix: str
    resume: bool
    folder: Path


def train(shape: Shape, tokenizer: Tokenizer, plan: Plan) -> None:
    """Train one model for a time budget; save it every few minutes and at the end."""
    torch.manual_seed(plan.seed)
    folder = plan.folder
    model = load(folder).train() if plan.resume else Model(shape)
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    end_ids = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    optimizer_list = optimizers(model, plan.peak_rate)
    began = saved = time.monotonic()
    tokens, mean = 0, 0.0
    for step, (ids, weights) in enumerate(batches(tokenizer, plan.seed, plan.mix)):
        progress = (time.monotonic() - began) / (60 * plan.minutes)
        if progress >= 1:
            break
        loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.param_groups[0]["lr"] = learning_rate(plan.peak_rate, step, progress)
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        mean = loss.item() if step == 0 else 0.97 * mean + 0.03 * loss.item()
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - began)
            print(f"step {step} loss {mean:.4f} {rate:.0f} tokens/s {progress:.1%}", flush=True)
        if time.monotonic() - saved > 60 * plan.save_every:
            save(model, folder, end_ids)
            saved = time.monotonic()
    save(model, folder, end_ids)
    print(f"{folder.name}: loss {mean:.4f} after {tokens:,} tokens", flush=True)


def main() -> None:
    """Parse the flags and train what they ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the main model")
    parser.add_argument("--minutes", type=float, default=28, help="time for the main model")
    parser.add_argument("--draft-minutes", type=float, default=0, help="time for the draft model")
    parser.add_argument("--mix", choices=MIXES, default="facts", help="shares of the topics")
    parser.add_argument("--resume", action="store_true", help="go on with the main model there")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate, main model")
    parser.add_argument("--save-every", type=float, default=3, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(args.seed)
        save_tokenizer(tokenizer, args.output)
    plan = Plan(
        args.minutes, args.rate, args.save_every, args.seed, args.mix, args.resume, args.output
    )
    train(MAIN, tokenizer, plan)
    if args.draft_minutes:
        draft = plan._replace(
            minutes=args.draft_minutes, peak_rate=4e-3, resume=False, folder=args.output / "draft"
        )
        train(DRAFT, tokenizer, draft)


if __name__ == "__main__":
    main()
