"""Ask the held-out questions: `python -m assets.training.evaluate --model FOLDER`.

Greedy answers are compared letter by letter with the one right answer. Stories have many
right answers, so they are checked for what was asked, for their length and for an end.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.training.corpus import CLASSES, evaluation_item
from assets.training.items import Item
from assets.training.probes import PROBES

EVALUATION_SEED = 2024
PER_CLASS = 48
MAX_NEW_TOKENS = 260
STORY_SENTENCES = 4


@dataclass(frozen=True)
class Outcome:
    """One asked question."""

    group: str
    item: Item
    answer: str
    ended: bool

    @property
    def right(self) -> bool:
        """Whether the answer counts."""
        if not self.ended:
            return False
        if self.item.task == "story":
            sentences = sum(self.answer.count(mark) for mark in ".!?")
            mentioned = all(word in self.answer for word in self.item.must_mention)
            return mentioned and sentences >= STORY_SENTENCES
        return self.answer == self.item.answer


def questions(per_class: int, seed: int = EVALUATION_SEED) -> list[tuple[str, Item]]:
    """Distinct held-out questions, the same number in every class, tasks taking turns."""
    chosen: list[tuple[str, Item]] = []
    for group, tasks in CLASSES.items():
        rng = random.Random(f"{seed}/{group}")
        seen: set = set()
        tries = 0
        while len(seen) < per_class and tries < 200 * per_class:
            item = evaluation_item(rng, tasks[tries % len(tasks)])
            tries += 1
            # The same words differently spelt are one question.
            identity = item.key
            if identity not in seen:
                seen.add(identity)
                chosen.append((group, item))
    return chosen


def messages(item: Item) -> list[dict[str, str]]:
    """An item as the message list a chat program would send."""
    turns = [*item.before, ("user", item.question)]
    return [{"role": role, "content": text} for role, text in turns]


@torch.no_grad()
def answer_all(
    model, tokenizer, chats: list[list[dict]], batch: int = 24
) -> list[tuple[str, bool]]:
    """Greedy answers, and whether each one ended by itself; chats of like length go together."""
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    tokenizer.padding_side = "left"
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
        )
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            ended = bool((row == tokenizer.eos_token_id).any())
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip(), ended
    return answers


def ask_all(model, tokenizer, asked: list[tuple[str, Item]]) -> list[Outcome]:
    """Every question with the model's answer."""
    answers = answer_all(model, tokenizer, [messages(item) for _, item in asked])
    return [
        Outcome(group, item, text, ended)
        for (group, item), (text, ended) in zip(asked, answers, strict=True)
    ]


def ask_probes(model, tokenizer) -> list[tuple[tuple[str, ...], str, bool]]:
    """The handwritten chats played turn by turn: messages, last answer, whether it fits."""
    chats: list[list[dict[str, str]]] = [[] for _ in PROBES]
    last = [""] * len(PROBES)
    for turn in range(max(len(messages) for messages, _ in PROBES)):
        due = [i for i, (messages, _) in enumerate(PROBES) if turn < len(messages)]
        for i in due:
            chats[i].append({"role": "user", "content": PROBES[i][0][turn]})
        answers = answer_all(model, tokenizer, [chats[i] for i in due])
        for i, (text, _) in zip(due, answers, strict=True):
            chats[i].append({"role": "assistant", "content": text})
            last[i] = text
    return [(said, text, wanted in text) for (said, wanted), text in zip(PROBES, last, strict=True)]


def score(outcomes: list[Outcome]) -> dict:
    """Right answers per class and over all."""
    classes = {}
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        mine = [outcome.right for outcome in outcomes if outcome.group == group]
        classes[group] = {"right": sum(mine), "asked": len(mine)}
    right = sum(outcome.right for outcome in outcomes)
    return {
        "classes": classes,
        "right": right,
        "asked": len(outcomes),
        "exact": round(right / len(outcomes), 4),
    }


def load(folder: Path):
    """A model and tokenizer for evaluation, in fp32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """Evaluate a folder and print the scores, with failures on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=PER_CLASS)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--probes", action="store_true", help="play the handwritten chats too")
    parser.add_argument("--failures", type=int, default=0, help="show this many per class")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    outcomes = ask_all(model, tokenizer, questions(args.per_class, args.seed))
    result = score(outcomes)
    for group in result["classes"]:
        wrong = [o for o in outcomes if o.group == group and not o.right]
        for outcome in wrong[: args.failures]:
            print(f"[{group}] {outcome.item.question!r}")
            print(f"   want {outcome.item.answer!r}\n   got  {outcome.answer!r}")
    if args.probes:
        played = ask_probes(model, tokenizer)
        for said, text, fits in played:
            print("ok  " if fits else "BAD ", said[-1], "=>", text.replace("\n", " / "))
        result["probes"] = {"right": sum(p[2] for p in played), "asked": len(played)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
