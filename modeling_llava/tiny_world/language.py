"""The tiny world's language model: a tokenizer and a Llama that learn to read about scenes and to answer questions.

It never sees an image: scenes are described to it in words, and it answers questions about them. Like Vicuna before LLaVA,
it understands questions before it is given eyes.
"""

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..constants import IGNORE_INDEX
from ..data.collator import pack_sequences
from ..kernels.packed_attention import VARLEN, mask_of_pack
from .responder import Question, choose_questions, list_questions, list_reasoning, write_description
from .scenes import Scene, write_captions
from .vision import optimize
from .world import scene_texts


BOS, EOS, PAD, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"
VOCABULARY_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The language model's own chat template: one token before each turn. LLaVA's image token is added to it later."""


def write_dialogue(scene: Scene, rng: random.Random, turns: int = 6) -> list[dict[str, str]]:
    """A conversation about a scene that the first message describes."""
    largest_first = tuple(sorted(scene.things, key=lambda thing: -thing.side))
    scene = dataclasses.replace(scene, things=largest_first)
    questions = choose_questions(list_questions(scene, rng), rng, turns)
    if rng.random() < 0.3:
        questions[0] = rng.choice(list_reasoning(scene))
    if rng.random() < 0.2:
        questions[0] = Question("detail", "Describe the picture.", write_description(scene), ())
    messages = []
    for number, question in enumerate(questions):
        told = f"{write_description(scene)}\n" if number == 0 else ""
        messages.append({"role": "user", "content": told + question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds `<s>`, with a chat template. Bytes are its alphabet: a user may type anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD, USER, ASSISTANT)]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=[USER, ASSISTANT]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def train_language_model(
    out: Path,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    most_things: int = 3,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """Trains tokenizer and language model on scenes in words, and saves both. One document in four is a caption, with every
    token supervised; the others are conversations with supervised answers.

    Returns:
        Loss over the last tenth of the steps (nats per supervised token), tokens read, and seconds.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    rng, scenes = random.Random(f"{seed}:language"), scene_texts(seed, "language", most_things)
    samples = [write_dialogue(next(scenes), rng) for _ in range(1000)]
    tokenizer = train_tokenizer(
        [message["content"] for messages in samples for message in messages]
        + [caption for _ in range(300) for caption in write_captions(next(scenes))]
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _initialise(model)
    model.set_attn_implementation(VARLEN)  # documents are concatenated into one sequence; none is padded
    num_tokens = 0

    def loss_of(step: int) -> torch.Tensor:
        nonlocal num_tokens
        documents = []
        for index in range(batch_size):
            if index % 4 == 0:
                ids = torch.tensor(tokenizer(rng.choice(write_captions(next(scenes))) + "\n")["input_ids"])
                documents.append((ids, ids))
            else:
                documents.append(_dialogue(tokenizer, write_dialogue(next(scenes), rng)))
        pack = pack_sequences(*zip(*documents))
        labels = pack.pop("labels")[0]
        num_tokens += len(labels)
        pack["attention_mask"] = mask_of_pack(model.model, model.lm_head.weight)
        hidden = model.model(**pack, use_cache=False).last_hidden_state[0]  # [num_tokens, hidden]
        supervised = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
        return F.cross_entropy(model.lm_head(hidden[supervised]), labels[supervised + 1])

    losses = optimize(model, loss_of, steps, learning_rate, log)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    last = losses[-max(1, steps // 10) :]
    loss, seconds = round(sum(last) / len(last), 4), round(time.perf_counter() - begun, 1)
    return {"loss": loss, "tokens": num_tokens, "seconds": seconds}


def _initialise(model: LlamaForCausalLM) -> None:
    """Each layer adds nothing at first and token embeddings differ: a small model learns to attend sooner from there."""
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def _dialogue(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(messages, **options)
    ids = torch.tensor([tokenizer.bos_token_id, *encoded["input_ids"]])  # templates leave <s> to the tokenizer
    supervised = torch.tensor([0, *encoded["assistant_masks"]]) == 1
    return ids, torch.where(supervised, ids, IGNORE_INDEX)
