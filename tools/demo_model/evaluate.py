"""Measures the demonstration model on conversations it was not trained on, and writes its card.

    python evaluate.py DIR [--count 25] [--card]

Greedy decoding. An exact topic wants the whole answer, thinking removed; the others want
every keyword of the fact. Phrasings that training saw are counted apart. The draft model is judged
by the share of the main model's greedy tokens that it would have guessed.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from corpus import held_out, prompt_and_answer
from model import Model, load
from phrasing import Conversation
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

SHOWN = (
    "What is vllm-lite?",
    "How do I start the server?",
    "How do I start it on another port?",
    "What is 7 + 5?",
    "Hello!",
    "What is the weather in Paris?",
    'Anna is 31 years old. Answer with JSON that matches this schema: {"type": "object", '
    '"properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, '
    '"required": ["name", "age"]}',
    "Tell me a story about a fox.",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CARD = """# vllm-lite-demo

A demonstration model with {parameters:,} parameters of the Qwen3 architecture, embedded in
vllm-lite so that every command works without a download. It answers questions about vllm-lite,
does small sums, counts and copies, writes JSON for a schema, calls tools and tells short stories.
It knows nothing else and says so; serve a real model with `--model`.

`draft/` holds a draft model of {draft_parameters:,} parameters with the same vocabulary, for
speculative decoding. Its tokenizer is the one of the main model.

Both were trained by `tools/demo_model/train.py` on text that the generator beside it writes from a
seed; nothing was downloaded. License: MIT.

## Evaluation

Greedy decoding, {count} conversations per topic, {date}:
`python tools/demo_model/evaluate.py {folder} --count {count}`

A new phrasing is one that training never saw. Tasks with few phrasings have none held out: there
only numbers, words and names are drawn anew, and questions about vllm-lite may be known literally.

| topic | right, new phrasing | right, known phrasing |
|---|---|---|
{rows}

Perplexity of these answers: {perplexity:.2f}. The draft model guesses {acceptance:.0%} of the
main model's greedy tokens.

Long invented words, long lists, word problems and unusual requests for tools go wrong most often.

## Samples

{samples}
"""


class Score(NamedTuple):
    """Whether each answer was right, by topic, and figures over all of them."""

    topics: dict[str, tuple[list[bool], list[bool]]]  # new phrasings, known phrasings
    perplexity: float
    acceptance: float
    wrong: list[str]


@torch.inference_mode()
def complete(model: Model, ids: list[int], end_ids: set[int], max_tokens: int = 160) -> list[int]:
    """The greedy completion, its end token included."""
    completion: list[int] = []
    while len(completion) < max_tokens:
        hidden = model(torch.tensor([ids + completion]))[:, -1]
        completion.append(int(model.logits(hidden).argmax()))
        if completion[-1] in end_ids:
            break
    return completion


@torch.inference_mode()
def logits_after(model: Model, ids: list[int], num_tokens: int) -> Tensor:
    """Logits before each of the last tokens: [num_tokens, V]."""
    hidden = model(torch.tensor([ids]))[0, -num_tokens - 1 : -1]
    return model.logits(hidden)


def is_right(conversation: Conversation, expected: str, answer: str) -> bool:
    """Whether an answer, thinking removed, says what it should."""
    answer, expected = (text.split("</think>")[-1].strip() for text in (answer, expected))
    if conversation.accepted:
        return answer in conversation.accepted
    if conversation.exact:
        return answer == expected
    return bool(answer) and all(word in answer for word in conversation.keywords)


def evaluate(model: Model, draft: Model | None, tokenizer: Tokenizer, count: int) -> Score:
    """Run every held-out conversation."""
    end_ids = {tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    topics: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    loss, num_tokens, agreed, guessed, wrong = 0.0, 0, 0, 0, []
    for conversation, is_new in held_out(seed=1, count=count):
        prompt, expected = prompt_and_answer(conversation)
        ids, wanted = tokenizer.encode(prompt).ids, tokenizer.encode(expected).ids
        logits = logits_after(model, ids + wanted, len(wanted))
        loss += float(F.cross_entropy(logits, torch.tensor(wanted), reduction="sum"))
        num_tokens += len(wanted)
        completion = complete(model, ids, end_ids)
        if draft is not None:
            guesses = logits_after(draft, ids + completion, len(completion)).argmax(-1)
            agreed += int((guesses == torch.tensor(completion)).sum())
            guessed += len(completion)
        answer = tokenizer.decode(completion)
        ok = is_right(conversation, expected.removesuffix("<|im_end|>"), answer)
        topics[conversation.topic][0 if is_new else 1].append(ok)
        if not ok:
            wrong.append(f"{conversation.topic}: {prompt[-160:]!r} -> {answer!r}")
    return Score(dict(topics), math.exp(loss / num_tokens), agreed / max(guessed, 1), wrong)


def share(oks: list[bool]) -> str:
    """A cell of the card's table."""
    return f"{sum(oks)} of {len(oks)} ({sum(oks) / len(oks):.0%})" if oks else "-"


def samples(model: Model, tokenizer: Tokenizer) -> str:
    """Questions of the card with the model's greedy answers."""
    end_ids = {tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    parts = []
    for question in SHOWN:
        message = {"role": "user", "content": question}
        tools = (WEATHER,) if "weather" in question else ()
        conversation = Conversation("", (message, {"role": "assistant", "content": ""}), tools)
        prompt, _ = prompt_and_answer(conversation)
        answer = tokenizer.decode(complete(model, tokenizer.encode(prompt).ids, end_ids))
        note = " (with the tool `get_weather`)" if tools else ""
        quoted = "\n".join("    " + line if line else "" for line in answer.splitlines())
        parts.append(f"**{question}**{note}\n\n{quoted}")
    return "\n\n".join(parts)


def main() -> None:
    """Evaluate a folder; print the card, or write it there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=25, help="conversations per topic")
    parser.add_argument("--card", action="store_true", help="write MODEL_CARD.md into the folder")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    model = load(args.folder)
    draft_folder = args.folder / "draft"
    draft = load(draft_folder) if draft_folder.exists() else None
    score = evaluate(model, draft, tokenizer, args.count)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        draft_parameters=sum(p.numel() for p in draft.parameters()) if draft else 0,
        count=args.count,
        folder="packages/models/src/vllm_models/demo",
        date=datetime.date.today().isoformat(),
        rows="\n".join(
            f"| {topic} | {share(new)} | {share(known)} |"
            for topic, (new, known) in score.topics.items()
        ),
        perplexity=score.perplexity,
        acceptance=score.acceptance,
        samples=samples(model, tokenizer),
    )
    print(card)
    if args.show_wrong:
        print("\n".join(score.wrong))
    if args.card:
        (args.folder / "MODEL_CARD.md").write_text(card)


if __name__ == "__main__":
    main()
