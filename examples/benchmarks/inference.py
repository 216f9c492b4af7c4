"""
Asking: stock transformers' LLaVA, `generate` per question or in padded batches, against `LlavaPredictor`.

    OMP_NUM_THREADS=2 python examples/benchmarks/inference.py                  # all cases, 5 rounds: half an hour
    OMP_NUM_THREADS=2 python examples/benchmarks/inference.py --only 10 --rounds 9

Both sides get the same weights (float32), the same pictures and questions, and go all the way from a picture and a text to
an answer's text. Stock is stock's class with stock's processor. They take turns in one process, so that whatever else the
machine does slows both; times are medians over the rounds, the ratio is the median of the rounds' ratios. Answers of both
sides are compared in every round, and the run fails if they differ.

    one        one question on one image, 64 tokens after the first: the time of each, against those of `generate`
    10, 40     so many questions on one image of 336 pixels, 8 new tokens each; stock: one `generate` per question
    scienceqa  48 questions, each with an image of its own and as long as ScienceQA's are (question, context and choices),
               16 new tokens each; stock: padded batches of 8 in the order of the data; ours: at most 8 answers at a time. Also
               answered by stock one by one, once: ours must give just these answers
    lengths    the same questions; every twentieth token ends an answer, so that they have 1 to 64 tokens (and the language
               model has weights so large that its answers vary)
    memory     10,000 samples, each with its own image, through a tiny model: resident memory after 1,000 and after all

The model: CLIP 12 layers × 384 at 336 pixels (576 image tokens), Llama 12 layers × 576, vocabulary 32,064, random weights.
The tokenizer is the small one of the tests; questions have 12 to 40 tokens in the first three cases.

Predicted before the first run, from counted multiplications and the weights that a step must read (a stock question is
about 0.9 s, of it 0.85 s the image and the prompt): 10 questions 7 ×, 40 questions 17 ×, ScienceQA-like 1.4 × (padding a
quarter of the prompts' tokens, and the cache that stock copies at each step).

Predicted before one row got the image's keys and values as a copy in front of its own, and before a finished row's place was
taken at once: `one` 1.1 × (the same products as stock, a token is written in place instead of copying the cache, no logits
processors; 0.8 × before, when each layer merged two attentions); `scienceqa` as before, for its rows end together;
`lengths` 1.7 × (a batch of stock's ends with its longest answer, about twice the mean; most of the time is the prompts').

Why `scienceqa` cannot reach the 1.6 × of `lengths`: all its answers have 16 tokens, so no row ends before its batch does, and
only work that stock does in vain can be saved. A question's image and prompt take 134 GFLOP with stock (31 and 104; 15 % of the
prompts' tokens are padding, a tenth of the prompt is scores above the diagonal) and 102 with ours (28 and 74; no padding, no
layer of the tower nor part of the last layer that nothing reads). By processor time on one thread, a question takes stock 1.41 s:
0.85 s the prompt, 0.27 s the image, 0.29 s the later tokens. At stock's speed 102 GFLOP take 0.85 s, and the later tokens read
1.1 GB of weights, keys and values, at least 0.11 s: 1.47 × at most. `first_tokens` are the times of answers of one token.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig
from transformers import LlavaConfig as StockConfig
from transformers import LlavaForConditionalGeneration as StockModel
from transformers.models.llava.processing_llava import LlavaProcessor as StockProcessor

from modeling_llava import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor
from modeling_llava.inference import LlavaPredictor
from modeling_llava.processing_llava import load_chat_template
from modeling_llava.text.tokenization import add_image_token, load_tokenizer


ROOT = Path(__file__).parents[2]
RESULT = ROOT / "examples" / "results" / "benchmarks" / "inference.json"
TOKENIZER = ROOT / "tests" / "golden" / "tiny_spm.model"
CASES = {
    # name: (what it is, wanted: times faster)
    "one": ("1 question on one image of 336 pixels, the 64 tokens after the first, against generate", 1.0),
    "10": ("10 questions on one image of 336 pixels, 8 new tokens each, against generate per question", 6.0),
    "40": ("40 questions on one image of 336 pixels, 8 new tokens each, against generate per question", 12.0),
    "scienceqa": ("48 ScienceQA-like questions, an image each, 16 new tokens, against padded batches of 8", 1.3),
    "lengths": (
        "48 ScienceQA-like questions, an image each, answers of 1 to 64 tokens, against padded batches of 8",
        1.6,
    ),
}
WORDS = "what which where why how many people are in the picture on the left of a dog and does it show when you look".split()


def make_sides(side: int = 336, tiny: bool = False, std: float = 0.02):
    """Stock's model and processor, and our predictor, with the same weights."""
    tokenizer = load_tokenizer(TOKENIZER, padding_side="left")
    add_image_token(tokenizer)
    parts = {
        "image_processor": LlavaImageProcessor(size=side, crop_size=side, do_pad=True),
        "tokenizer": tokenizer,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": load_chat_template("vicuna_v1"),
    }
    if tiny:
        vision, text = (32, 64, 3, 4), (64, 96, 2, 4)
    else:
        vision, text = (384, 1536, 12, 6), (576, 1536, 12, 9)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision_config = CLIPVisionConfig(**dict(zip(names, vision)), image_size=side, patch_size=14)
    text_config = LlamaConfig(**dict(zip(names, text)), vocab_size=32_064, max_position_embeddings=4096)
    tokens = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": (side // 14) ** 2}
    torch.manual_seed(0)
    stock = StockModel(StockConfig(vision_config=vision_config, text_config=text_config, **tokens)).eval()
    ours = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config, text_config=text_config, **tokens)
    ).eval()
    with torch.no_grad():
        for weight in (*stock.model.language_model.parameters(), stock.lm_head.weight):
            if weight.dim() == 2:
                weight.normal_(std=std)
        # Answers of the tokenizer's words: the other rows of the head win nothing.
        stock.lm_head.weight[:259] = stock.lm_head.weight[700:] = 0.0
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    predictor = LlavaPredictor(ours, LlavaProcessor(**parts))
    predictor.settings = type(predictor.settings)()  # nothing ends an answer but its length
    return stock, StockProcessor(**parts), predictor


def picture(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    pixels = torch.randint(0, 256, (height // 8, width // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy()).resize((width, height))


def question(num_tokens: int, tokenizer, generator) -> str:
    """Words that make about so many tokens."""
    text = ""
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < num_tokens:
        text += f" {WORDS[int(torch.randint(len(WORDS), (), generator=generator))]}"
    return text.strip().capitalize() + "?"


def stock_answers(model, processor, samples, batch_size: int, max_new_tokens: int) -> list[str]:
    """Answers to `(picture, question)` pairs, by `generate` on padded batches in the samples' order."""
    answers = []
    for start in range(0, len(samples), batch_size):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in samples[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def our_answers(predictor, samples, max_new_tokens: int) -> list[str]:
    """The same by `answer_many`."""
    rows = [
        {
            "id": number,
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            "images": [image],
        }
        for number, (image, text) in enumerate(samples)
    ]
    answers = {a.id: a.text for a in predictor.answer_many(rows, batch_size=8, max_new_tokens=max_new_tokens)}
    return [answers[number] for number in range(len(rows))]


def seconds(function) -> tuple[float, list]:
    """How long a call takes, and what it returns."""
    start = time.perf_counter()
    answers = function()
    return time.perf_counter() - start, answers


def take_turns(stock, ours, rounds: int, wanted: float, measure=seconds) -> dict:
    """Times of both sides in turn; fails if their answers differ."""
    times = {"stock": [], "ours": []}
    for _ in range(rounds):
        answers = {}
        for name, function in (("stock", stock), ("ours", ours)):
            duration, answers[name] = measure(function)
            times[name].append(duration)
        if answers["stock"] != answers["ours"]:
            different = [i for i, pair in enumerate(zip(*answers.values())) if pair[0] != pair[1]]
            sys.exit(f"the answers differ: questions {different}")
    ratios = [stock / ours for stock, ours in zip(times["stock"], times["ours"])]
    ratio = statistics.median(ratios)
    return {
        "stock_s": round(statistics.median(times["stock"]), 4),
        "ours_s": round(statistics.median(times["ours"]), 4),
        "ratio": round(ratio, 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "wanted": wanted,
        "reached": ratio >= wanted,
        "rounds": rounds,
    }


def run_one(rounds: int, wanted: float) -> dict:
    stock, processor, predictor = make_sides()
    samples = [(picture(0), question(24, processor.tokenizer, torch.Generator().manual_seed(1)))]
    predictor.set_image(samples[0][0])

    def later_tokens(ask) -> tuple[float, list]:
        first, _ = seconds(lambda: ask(1))
        whole, answers = seconds(lambda: ask(65))
        return (whole - first) / 64, answers

    return take_turns(
        lambda length: stock_answers(stock, processor, samples, 1, length),
        lambda length: [predictor.ask(samples[0][1], max_new_tokens=length)],
        rounds,
        wanted,
        later_tokens,
    )


def run_questions(number: int, rounds: int, wanted: float) -> dict:
    stock, processor, predictor = make_sides()
    generator = torch.Generator().manual_seed(number)
    image = picture(0)
    lengths = torch.randint(12, 41, (number,), generator=generator).tolist()
    questions = [question(length, processor.tokenizer, generator) for length in lengths]

    def ours():
        predictor.reset()
        predictor.set_image(image)
        return predictor.ask(questions, max_new_tokens=8)

    ours()
    return take_turns(
        lambda: stock_answers(stock, processor, [(image, text) for text in questions], 1, 8), ours, rounds, wanted
    )


def run_scienceqa(rounds: int, wanted: float, max_new_tokens: int = 16, ends: tuple[int, ...] = ()) -> dict:
    stock, processor, predictor = make_sides(std=0.05 if ends else 0.02)
    stock.generation_config.eos_token_id = list(ends) or None
    predictor.settings = type(predictor.settings)(end_token_ids=ends)
    generator = torch.Generator().manual_seed(0)
    lengths = (4.6 + 0.6 * torch.randn(48, generator=generator)).exp().clamp(30, 400).round().int().tolist()
    samples = [
        (picture(number), question(length, processor.tokenizer, generator)) for number, length in enumerate(lengths)
    ]
    one_by_one = stock_answers(stock, processor, samples, 1, max_new_tokens)
    if our_answers(predictor, samples, max_new_tokens) != one_by_one:
        sys.exit("the answers are not those that stock gives one by one")
    result = take_turns(
        lambda: stock_answers(stock, processor, samples, 8, max_new_tokens),
        lambda: our_answers(predictor, samples, max_new_tokens),
        rounds,
        wanted,
    )
    first_tokens = take_turns(
        lambda: stock_answers(stock, processor, samples, 8, 1), lambda: our_answers(predictor, samples, 1), 1, wanted
    )
    result["first_tokens"] = {name: first_tokens[name] for name in ("stock_s", "ours_s", "ratio")}
    answer_tokens = sorted(
        len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in one_by_one
    )
    for name, found in (("question_tokens", sorted(lengths)), ("answer_tokens", answer_tokens)):
        result[name] = [found[0], int(statistics.median(found)), found[-1]]
    return result


def run_memory(number: int = 10_000) -> dict:
    import psutil

    _, _, predictor = make_sides(side=28, tiny=True)
    # The tokenizers library keeps the tokens of the first 10,000 texts (20 MB), whoever uses it.
    for i in range(10_000):
        predictor.processor.tokenizer(f"Text number {i} fills the cache of the tokenizer. " * 2)

    def samples():
        for i in range(number):
            content = [{"type": "image"}, {"type": "text", "text": f"What is number {i}? " + "Why? " * (i % 7)}]
            yield {"id": i, "messages": [{"role": "user", "content": content}], "images": [picture(i, 40, 32)]}

    process, resident = psutil.Process(), {}
    for done, _ in enumerate(predictor.answer_many(samples(), batch_size=16, max_new_tokens=3), 1):
        if done in (number // 10, number):
            resident[done] = process.memory_info().rss
    grown = resident[number] - resident[number // 10]
    return {
        "samples": number,
        "resident_mb": {str(done): round(size / 2**20, 1) for done, size in resident.items()},
        "grown_mb": round(grown / 2**20, 1),
        "reached": grown < 4 * 2**20,
    }


def machine() -> dict:
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CASES, "memory"], default=[*CASES, "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    about = machine()
    content = json.loads(args.out.read_text()) if args.out.is_file() else {"cases": {}}
    for name in args.only:
        what, wanted = CASES.get(name, ("10,000 samples through a tiny model: resident memory", None))
        print(f"{name}: {what}", flush=True)
        if name == "memory":
            result = run_memory()
            print(f"    {result['resident_mb']} MB, grown by {result['grown_mb']} MB", flush=True)
        else:
            if name == "one":
                result = run_one(args.rounds, wanted)
            elif name == "scienceqa":
                result = run_scienceqa(args.rounds, wanted)
            elif name == "lengths":
                result = run_scienceqa(args.rounds, wanted, 64, tuple(range(260, 700, 20)))
            else:
                result = run_questions(int(name), args.rounds, wanted)
            print(
                f"    stock {result['stock_s']:.3f} s, ours {result['ours_s']:.3f} s: {result['ratio']:.2f} × "
                f"(wanted {wanted} ×), the same answers",
                flush=True,
            )
        content["cases"][name] = {"what": what, **result, "machine": about}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
