"""
LLaVA-1.5-7B and -13B on a GPU: stock transformers + PEFT against ours, in steps, under the Trainer, and in decoding.

    python examples/benchmarks/train_gpu.py                          # --plan ten-minutes
    python examples/benchmarks/train_gpu.py --plan hour              # 13B too, every row three times
    python examples/benchmarks/train_gpu.py --plan dry --device cpu  # the same program on tiny shapes, to try it out

Weights are random (one layer, copied as often as the model has layers), so nothing is downloaded. Each side of a row is a
process of its own. A row is written to the result as soon as it is measured, failures too; the same command measures the rest.

    step     forward, backward, clipping, fused AdamW; LoRA of rank 128 (QLoRA 64) without dropout, projector in float32,
             autocast to bfloat16 (float16 with a gradient scaler on cards without it), activation checkpointing. `mix`: batches
             of four samples of LLaVA-Instruct-158K's lengths, stock's padded; `2048`: one sample of 2048 tokens. A first pass
             over the batches warms their shapes up, the second is timed; differences of losses and norms are recorded
    trainer  the second epoch of transformers' Trainer (padded) and of LlavaTrainer (packed): JPEG images decoded by two
             workers, rank 16, paged 8-bit AdamW
    decode   128 tokens after the first, one answer about one image: transformers' `generate` and `LlavaPredictor`

Speed is in tokens per second without padding. Model FLOP utilisation counts the matrix products of forward and backward once,
over the GPU's 16-bit peak. Memory is the most that PyTorch's allocator reserved, next to the estimate less its CUDA context.

No GPU was at hand when this was written: there is no result yet. Predicted by `llava estimate` for one sample of 2048
tokens, next to the CUDA context: 7B LoRA 19.3 GiB, 7B QLoRA 7.7 GiB, 13B LoRA 34.3 GiB, 13B QLoRA 12.6 GiB. Guessed: 45 %
utilisation for LoRA on an H100, 30 % for QLoRA, whose weights are dequantized in every product; `mix` 1.5 × stock's speed, of
which padding accounts for 1.3 ×; trainer 1.5 ×; decode 1.0 ×.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import train
from random_llava import add_lora, dtype_of, make_config, make_model


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "train_gpu.json"
SEVEN = [("step", "7b-qlora", "mix"), ("step", "7b-qlora", "2048"), ("trainer", "7b-qlora"), ("decode", "7b-qlora")]
HOUR = [("step", "7b-lora", "mix"), ("step", "7b-lora", "2048"), ("decode", "7b-lora")]
HOUR += [
    ("step", "13b-qlora", "mix"),
    ("step", "13b-qlora", "2048"),
    ("step", "13b-lora", "mix"),
    ("decode", "13b-qlora"),
]
PLANS = {
    # name: (rounds, about so many seconds a process, rows)
    "ten-minutes": (1, 50, [*SEVEN, ("step", "7b-lora", "mix")]),
    "hour": (3, 50, [*SEVEN, *HOUR]),
    "dry": (1, 20, [("step", "7b-lora", "mix"), ("trainer", "7b-lora"), ("decode", "7b-lora")]),
}
SIDES = ("stock", "ours")
PEAKS = {
    "H200": 989, "H100": 989, "H100 PCIe": 756, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "A6000": 155, "V100": 125, "T4": 65,
    "5090": 209, "5080": 113, "5070 Ti": 88, "5070": 62, "4090": 165, "4080 SUPER": 104, "4080": 97, "4070 Ti SUPER": 88, "4070 Ti": 80,
    "4070 SUPER": 71, "4070": 58, "4060 Ti": 44, "4060": 30, "3090 Ti": 80, "3090": 71, "3080 Ti": 68, "3080": 60, "3070 Ti": 44,
    "3070": 41, "3060 Ti": 32, "3060": 25, "2080 Ti": 54,
}  # fmt: skip
"""
16-bit TFLOP/s of the tensor cores with float32 accumulation, without sparsity, by a part of the GPU's name. From the tables of NVIDIA's
white papers on Turing, Ampere (GA100, GA102), Ada, Hopper and Blackwell; --tflops gives another GPU's, such as a laptop's.
"""


def draw_batches(workload: str, config) -> list:
    """Three batches of (ids, labels), without padding."""
    import torch

    train.IMAGE_TOKENS = image = config.image_seq_length
    if workload == "mix":
        return [batch[:4] for batch in train.draw_batches("finetune", 3)]
    ids = torch.randint(3, 31_990, (2048,), generator=torch.Generator().manual_seed(0))
    ids[35 : 35 + image] = config.image_token_id
    return [[(ids, torch.where(torch.arange(2048) < 45 + image, -100, ids))]] * 3


def clock(device: str, reset_peak: bool = False) -> float:
    """Seconds, read when the device is idle."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        if reset_peak:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def measure_step(size: str, adapter: str, side: str, workload: str, device: str, tiny: bool) -> dict:
    import torch

    from modeling_llava.kernels import apply_kernels
    from modeling_llava.kernels.packed_attention import use_varlen_attention

    rank = 4 if tiny else 128 if adapter == "lora" else 64
    config = make_config(size, tiny)
    generator, pixels = torch.Generator().manual_seed(0), config.vision_config.image_size
    batches, inputs = draw_batches(workload, config), []
    for batch in batches:
        collated = train.collate(batch, side, torch.randn(len(batch), 3, pixels, pixels, generator=generator))
        inputs.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collated.items()})
    core = make_model(config, side, adapter, device)
    model = add_lora(core, rank)
    if side == "ours":
        use_varlen_attention(core)
        apply_kernels(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    dtype = dtype_of(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    result = {"losses": [], "gradient_norms": []}
    for timed in (False, True):
        start = clock(device, reset_peak=not timed)
        for step_inputs in inputs:
            with torch.autocast(device, dtype) if device == "cuda" else nullcontext():
                loss = model(**step_inputs).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            result["losses"].append(loss.item())
            result["gradient_norms"].append(norm.item())
        seconds = clock(device) - start
    tokens = sum(len(ids) for batch in batches for ids, _ in batch)
    result |= estimated(config, adapter, rank, batches, device) if side == "ours" else {}
    return {**result, "speed": tokens / seconds}


def estimated(config, adapter: str, rank: int, batches: list, device: str) -> dict:
    from modeling_llava.training.estimate import CUDA_CONTEXT, Settings, estimate, sizes_of

    largest = max(batches, key=lambda batch: sum(len(ids) for ids, _ in batch))
    tokens = sum(len(ids) for ids, _ in largest)
    supervised = sum(int((labels != -100).sum()) for _, labels in largest) / tokens
    work = {"tokens": tokens, "images": len(largest), "supervised": supervised, "device": device}
    settings = Settings(adapter=adapter, lora_r=rank, lora_dropout=0.0, activation_checkpointing=True, **work)
    sizes = sizes_of(config)
    total = estimate(sizes, settings).total - (CUDA_CONTEXT if device == "cuda" else 0.0)
    settings.activation_checkpointing = False  # what is computed twice does not count
    return {"estimated_gib": total / 2**30, "flops_per_token": estimate(sizes, settings).flops_per_token}


def make_processor(side: str, tiny: bool):
    """The processor of the inference benchmark, stock's or ours."""
    from inference import make_sides

    _, stock, predictor = make_sides(56 if tiny else 336, tiny=True)
    return stock if side == "stock" else predictor.processor


def measure_trainer(size: str, adapter: str, side: str, workload: str, device: str, tiny: bool) -> dict:
    import torch
    from inference import WORDS, picture
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from modeling_llava.data import LlavaDataCollator, encode_conversation
    from modeling_llava.training import LlavaTrainer, LlavaTrainingArguments

    processor, folder = make_processor("ours", tiny), Path(tempfile.mkdtemp())
    config = make_config(size, tiny, processor.tokenizer.convert_tokens_to_ids("<image>"))
    rows = []
    for number, (ids, _) in enumerate(sum(train.draw_batches("finetune", 1 if tiny else 4), [])):
        picture(number).save(folder / f"{number}.jpg")
        content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
        answer = [{"type": "text", "text": " ".join(WORDS * len(ids))[: 2 * (len(ids) - 256)]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(number), "messages": messages, "images": [str(folder / f"{number}.jpg")]})
    model = add_lora(make_model(config, side, adapter, device), 4 if tiny else 16)
    epochs, dtype = [], dtype_of(device)

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            epochs.append(-clock(device, reset_peak=not epochs))

        def on_epoch_end(self, args, state, control, **kwargs):
            epochs[-1] += clock(device)

    settings = {"output_dir": str(folder / "out"), "num_train_epochs": 2, "per_device_train_batch_size": 4}
    settings |= {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "activation_checkpointing": True}
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": device == "cpu"}
    settings["optim"] = "paged_adamw_8bit" if device == "cuda" else "adamw_torch"
    if side == "ours":
        precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        arguments = LlavaTrainingArguments(**settings, stage="finetune", adapter=adapter, precision=precision)
        trainer = LlavaTrainer(model, arguments, train_dataset=rows, processing_class=processor, callbacks=[Clock()])
    else:
        half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        arguments = TrainingArguments(**settings, **half, remove_unused_columns=False)
        trainer = Trainer(model, arguments, LlavaDataCollator(processor), rows, callbacks=[Clock()])
    trainer.train()
    tokens = sum(len(encode_conversation(row["messages"], processor)["input_ids"]) for row in rows)
    return {"speed": tokens / epochs[1]}


def measure_decode(size: str, adapter: str, side: str, workload: str, device: str, tiny: bool) -> dict:
    from inference import picture

    from modeling_llava.inference import LlavaPredictor

    processor = make_processor(side, tiny)
    config = make_config(size, tiny, processor.tokenizer.convert_tokens_to_ids("<image>"))
    model = make_model(config, side, adapter, device).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, processor.tokenizer.pad_token_id
    image, text, number = picture(0), "What is in this picture?", 8 if tiny else 128
    if side == "ours":
        predictor = LlavaPredictor(model, processor)
        predictor.settings = type(predictor.settings)()  # nothing ends an answer but its length
        predictor.set_image(image)
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    seconds = {}
    for tokens in (2, 1, 1 + number):  # the first warms up
        start = clock(device, reset_peak=tokens == 2)
        if side == "ours":
            predictor.ask(text, max_new_tokens=tokens)
        else:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options).to(device)
            model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        seconds[tokens] = clock(device) - start
    return {"speed": number / (seconds[1 + number] - seconds[1])}


MEASURE = {"step": measure_step, "trainer": measure_trainer, "decode": measure_decode}


def run_row(row: dict, rounds: int, options: list[str]) -> dict:
    """Stock and ours in turn; what they measured, or why they did not."""
    measured = {side: [] for side in SIDES}
    for side in SIDES * rounds:
        command = [sys.executable, __file__, "--measure", row["kind"], row["case"], side, row["workload"], *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            row[f"{side}_failed"] = "out of memory" if "OutOfMemoryError" in done.stderr else last
        else:
            measured[side].append(json.loads(done.stdout.splitlines()[-1]))
    stock, ours = measured.values()
    for side, results in measured.items():
        for name in ("speed", "peak_gib", "estimated_gib", "flops_per_token"):
            if values := [result[name] for result in results if name in result]:
                row[f"{side}_{name}"] = round(statistics.median(values), 3)
    for name in ("losses", "gradient_norms") if row["kind"] == "step" and stock and ours else ():
        pairs = zip(stock[0][name], ours[0][name])
        row[f"{name}_differ_by"] = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    if stock and ours:
        row["times_faster"] = round(row["ours_speed"] / row["stock_speed"], 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="ten-minutes", help="which rows (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for --plan dry")
    parser.add_argument("--tflops", type=float, help="the GPU's 16-bit peak, where it is not known here")
    parser.add_argument("--out", default=str(RESULT), help="where to write the result")
    parser.add_argument("--measure", nargs=4, metavar=("KIND", "CASE", "SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if args.measure:
        kind, case, *words = args.measure
        result = MEASURE[kind](*case.split("-"), *words, args.device, args.plan == "dry")
        if args.device == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        print(json.dumps(result))
        return 0
    rounds, seconds, planned = PLANS[args.plan]
    print(f"--plan {args.plan}: about {len(planned) * 2 * rounds * seconds / 60:.0f} minutes, {rounds} time(s) each:")
    for kind, case, *workload in planned:
        print(f"    {kind} {case} {' '.join(workload)}", flush=True)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("train_gpu: there is no CUDA GPU here. Try the program with --plan dry --device cpu.", file=sys.stderr)
        return 2
    if args.device == "cpu" and args.plan != "dry":
        parser.error("--device cpu needs --plan dry: 7B on a CPU would take hours")
    about, out = train.machine(), Path(args.out)
    about["gpu"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    parts = sorted(PEAKS, key=len, reverse=True)  # "3090 Ti" before "3090"
    known = (PEAKS[part] for part in parts if re.search(rf"\b{part}\b(?! Laptop)", about["gpu"] or ""))
    peak = args.tflops or next(known, None)
    report = json.loads(out.read_text()) if out.is_file() else {}
    same = report.get("plan") == args.plan and report["machine"]["gpu"] == about["gpu"]
    rows = report["rows"] if same else []
    for kind, case, *workload in planned:
        row = {"kind": kind, "case": case, "workload": " ".join(workload)}
        if any(row.items() <= done.items() for done in rows):
            continue
        row = run_row(row, rounds, ["--device", args.device, "--plan", args.plan])
        if peak and "ours_flops_per_token" in row:
            used = row["ours_speed"] * row["ours_flops_per_token"]
            row["ours_model_flop_utilisation"] = round(used / (peak * 1e12), 3)
        rows.append(row)
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "plan": args.plan, "rounds": rounds, "rows": rows}
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
