"""The tokenizer, the chat template, and dialogs as padded training batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from assets.training.corpus import Dialog, dialog

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048
MAX_TOKENS = 1024
POOL_DIALOGS = 768
IGNORE = 0.0

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] or [] -%}
{%- if part['text'] is defined -%}{%- set parts.text = parts.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + text | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def render(turns: Dialog) -> str:
    """A dialog as the chat template writes it."""
    return "".join(f"{START}{role}\n{text}{STOP}\n" for role, text in turns)


def build_tokenizer(seed: int = 7) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the corpus; digits stay single, so that columns line up."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    core.train_from_iterator(
        (render(dialog(rng)) for _ in range(20_000)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, START, STOP],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer saved by `build_tokenizer`."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


@dataclass(frozen=True)
class Batch:
    """Padded rows: tokens, the loss weight of predicting each token, and which are real."""

    tokens: torch.Tensor
    weights: torch.Tensor
    real: torch.Tensor

    @property
    def token_count(self) -> int:
        """Real tokens, padding excluded."""
        return int(self.real.sum())


Row = tuple[list[int], list[float]]


def encode(tokenizer: PreTrainedTokenizerFast, turns: Dialog, user_weight: float) -> Row:
    """Token ids and loss weights; an assistant turn is learnt up to and with its end mark."""
    stop = tokenizer.convert_tokens_to_ids(STOP)
    core = tokenizer.backend_tokenizer
    ids: list[int] = []
    weights: list[float] = []
    newline = core.encode("\n").ids
    for role, text in turns:
        head = core.encode(f"{START}{role}\n").ids
        body = [*core.encode(text).ids, stop]
        weight = 1.0 if role == "assistant" else user_weight if role == "user" else IGNORE
        ids += head + body + newline
        weights += [IGNORE] * len(head) + [weight] * len(body) + [IGNORE] * len(newline)
    return ids[:MAX_TOKENS], weights[:MAX_TOKENS]


def copy_row(rng: random.Random, vocabulary: int) -> Row:
    """Random tokens said several times over: practice for the heads that copy."""
    phrase = [rng.randrange(260, vocabulary) for _ in range(rng.randint(4, 28))]
    ids = phrase * rng.randint(2, 5)
    return ids, [IGNORE] * len(phrase) + [1.0] * (len(ids) - len(phrase))


def pool_batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    pool: int,
    batch_tokens: int,
    user_weight: float,
    copy_share: float,
) -> Iterator[Batch]:
    """The batches of one pool of dialogs: a pure function of its arguments.

    Rows of similar length share a batch, so little is padded and every chat starts at
    position zero, as it does in use.
    """
    rng = random.Random(f"{seed}/{pool}")
    rows = []
    for _ in range(POOL_DIALOGS):
        if rng.random() < copy_share:
            rows.append(copy_row(rng, len(tokenizer)))
        else:
            rows.append(encode(tokenizer, dialog(rng), user_weight))
    rows.sort(key=lambda row: len(row[0]))
    groups: list[list[Row]] = [[]]
    for row in rows:
        if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        yield pad(group, tokenizer.pad_token_id)


def pad(rows: list[Row], pad_id: int) -> Batch:
    """Rows as one batch, padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), width), pad_id)
    weights = torch.zeros(len(rows), width)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, row_weights) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        weights[i, : len(ids)] = torch.tensor(row_weights)
        real[i, : len(ids)] = True
    return Batch(tokens, weights, real)
