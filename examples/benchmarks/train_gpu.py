"""
One training step of LLaVA-1.5-7B and -13B on a GPU: stock transformers + PEFT with padded batches, against ours.

    python examples/benchmarks/train_gpu.py                          # both sizes, LoRA and QLoRA: about 20 minutes
    python examples/benchmarks/train_gpu.py --only 7b-qlora --rounds 5
    python examples/benchmarks/train_gpu.py --tiny --device cpu      # the same program on tiny shapes, to try it out

Weights are random (one layer, copied as often as the model has layers), so nothing is downloaded. Both sides train the
same LoRA matrices (rank 128, QLoRA 64; no dropout, so that losses can be compared) and the projector in float32 under
bfloat16 autocast, with activation checkpointing and fused AdamW. Two workloads: `mix`, four samples with the lengths of
LLaVA-Instruct-158K (576 image tokens each), and `2048`, one sample of 2048 positions. Each measurement is a process of its
own, stock and ours in turn; the first step warms up, three are timed; figures are medians over the rounds.

Tokens per second count positions that are not padding. Model FLOP utilisation counts forward and backward of the matrix
products (frozen weights have no gradient: 4 per weight and position), without what checkpointing computes twice, over the
GPU's bfloat16 peak. Memory is what PyTorch's allocator reserved at most, beside the estimate less its CUDA context.

No GPU was at hand when this was written: there is no result yet. Predicted by `llava estimate` for one sample of 2048
positions, beside the CUDA context: 7B LoRA 19.3 GiB, 7B QLoRA 7.7 GiB, 13B LoRA 34.3 GiB, 13B QLoRA 12.6 GiB. Guessed: 45 %
utilisation for LoRA on an H100, 30 % for QLoRA, whose weights are dequantised in every product; `mix` 1.5 × stock's tokens per
second, of which padding accounts for 1.3 ×.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from train import collate, machine, memory


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "train_gpu.json"
CASES = [f"{size}-{adapter}" for size in ("7b", "13b") for adapter in ("lora", "qlora")]
WORKLOADS = ("mix", "2048")
TIMED_STEPS = 3
CUDA_PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71, "A10": 125}
"""bfloat16 TFLOP/s without sparsity, by a part of the GPU's name; another GPU's is given by --tflops."""

ANSWERS = {"conversation": (57_669, 330), "detail": (23_240, 140), "complex": (76_643, 170)}
"""Samples and mean answer tokens of LLaVA-Instruct-158K's types (see train.py)."""


def make_config(size: str, tiny: bool):
    from transformers import CLIPVisionConfig, LlamaConfig

    import modeling_llava

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    if size == "13b":
        text = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    if tiny:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    image_size = 56 if tiny else 336
    return modeling_llava.LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=image_size, patch_size=14).to_dict(),
        text_config=LlamaConfig(**text, vocab_size=32_064, max_position_embeddings=4096).to_dict(),
        image_token_index=32_000,
        image_seq_length=(image_size // 14) ** 2,
    )


def draw_samples(workload: str, config, tiny: bool, generator) -> list:
    """(ids, labels) of each sample, without padding."""
    import torch

    image, prompt, scale = config.image_seq_length, 45, 0.1 if tiny else 1.0
    answers = [(204 if tiny else 2048) - image - prompt]
    if workload == "mix":
        weights = torch.tensor([float(number) for number, _ in ANSWERS.values()])
        kinds = torch.multinomial(weights, 4, True, generator=generator).tolist()
        spread = torch.randn(4, generator=generator).mul(0.3).exp().tolist()
        answers = [math.ceil(list(ANSWERS.values())[kind][1] * s * scale) for kind, s in zip(kinds, spread)]
    samples = []
    for answer in answers:
        ids = torch.randint(3, 31_990, (image + prompt + answer,), generator=generator)
        ids[35 : 35 + image] = config.image_token_id
        labels = ids.clone()
        labels[: image + prompt] = -100
        samples.append((ids, labels))
    return samples


def make_model(config, side: str, adapter: str, rank: int, device: str):
    """Random weights on the device, never more than one layer of them in 16 bit beside the 4-bit ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    import modeling_llava
    from modeling_llava.kernels.efficient_layers import make_efficient
    from modeling_llava.kernels.packed_attention import packed_attention_error, use_varlen_attention

    one_layer = copy.deepcopy(config)
    one_layer.text_config.num_hidden_layers = 1
    model_class = modeling_llava.LlavaForConditionalGeneration
    if side == "stock":
        model_class, one_layer = LlavaForConditionalGeneration, LlavaConfig(**one_layer.to_dict())
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = model_class(one_layer)
    torch.set_default_dtype(torch.float32)
    language_model = model.model.language_model
    if adapter == "qlora":
        _to_four_bit(language_model.layers, dtype)
        model.is_loaded_in_4bit = True
    for number in range(1, config.text_config.num_hidden_layers):
        # all layers share one configuration, which decides about attention
        layer = copy.deepcopy(language_model.layers[0], {id(language_model.config): language_model.config})
        layer.self_attn.layer_idx = number
        language_model.layers.append(layer)
    language_model.config.num_hidden_layers = config.text_config.num_hidden_layers
    model.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=r"model\.language_model\..*_proj",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    peft_model = get_peft_model(model, lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if side == "ours":
        use_varlen_attention(model)
        if packed_attention_error(language_model) > 0.1:
            raise SystemExit("Samples of a pack see each other in this language model.")
        make_efficient(language_model)
    return peft_model.train()


def _to_four_bit(layers, dtype) -> None:
    import bitsandbytes as bnb
    import torch

    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            quantised = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            quantised.support_avx512bf16_for_cpu = False
            weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantised)
            quantised.weight = weight.to(linear.weight.device)
            setattr(module, name, quantised)


def measure(case: str, side: str, workload: str, device: str, tiny: bool) -> dict:
    """In a process of its own: seconds, losses, gradient norms, and the peak of memory in bytes."""
    import torch

    size, adapter = case.split("-")
    rank = 4 if tiny else 128 if adapter == "lora" else 64
    config = make_config(size, tiny)
    generator = torch.Generator().manual_seed(0)
    batches = [draw_samples(workload, config, tiny, generator) for _ in range(1 + TIMED_STEPS)]
    pixels = config.vision_config.image_size
    inputs = []
    for batch in batches:
        images = torch.randn(len(batch), 3, pixels, pixels, generator=generator)
        moved = collate(batch, side, images)
        inputs.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()})
    model = make_model(config, side, adapter, rank, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    is_cuda = device == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = {"seconds": [], "losses": [], "gradient_norms": []}
    for step_inputs in inputs:
        if is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext():
            loss = model(**step_inputs).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        result["seconds"].append(time.perf_counter() - start)
        result["losses"].append(loss.item())
        result["gradient_norms"].append(norm.item())
    positions = [sum(len(ids) for ids, _ in batch) for batch in batches]
    result["tokens_per_second"] = sum(positions[1:]) / sum(result.pop("seconds")[1:])
    result["peak"] = torch.cuda.max_memory_reserved() if is_cuda else memory("VmHWM") * 2**20
    if side == "ours":
        result |= _estimated(config, adapter, rank, batches, device)
    return result


def _estimated(config, adapter: str, rank: int, batches: list, device: str) -> dict:
    from modeling_llava.training.estimate import CUDA_CONTEXT, Settings, estimate, sizes_of

    largest = max(batches, key=lambda batch: sum(len(ids) for ids, _ in batch))
    tokens = sum(len(ids) for ids, _ in largest)
    settings = Settings(
        adapter=adapter, lora_r=rank, lora_dropout=0.0, activation_checkpointing=True, device=device,
        tokens=tokens, images=len(largest),
        supervised=sum(int((labels != -100).sum()) for _, labels in largest) / tokens,
    )  # fmt: skip
    sizes = sizes_of(config)
    result = estimate(sizes, settings)
    settings.activation_checkpointing = False  # what is computed twice is no work
    flops = estimate(sizes, settings).flops_per_token
    context = CUDA_CONTEXT if device == "cuda" else 0.0
    return {"estimated": result.total - context, "flops_per_token": flops}


def run_case(case: str, workload: str, args) -> dict:
    """Stock and ours in turn; the losses of both are compared in every round."""
    measured = {"stock": [], "ours": []}
    for _ in range(args.rounds):
        for side, results in measured.items():
            command = [sys.executable, __file__, "--measure", case, side, workload, "--device", args.device]
            done = subprocess.run(command + ["--tiny"] * args.tiny, capture_output=True, text=True)
            if done.returncode:
                if "OutOfMemoryError" in done.stderr:
                    results.append(None)
                    continue
                raise SystemExit(f"{case}, {workload}, {side} failed:\n{done.stderr[-3000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    row = {"case": case, "workload": workload}
    tolerance = 2e-2 if args.device == "cuda" else 1e-4
    for stock, ours in zip(*measured.values()):
        for name in ("losses", "gradient_norms") if stock and ours else ():
            for a, b in zip(stock[name], ours[name]):
                if abs(a - b) > tolerance * max(abs(a), 1.0):
                    raise SystemExit(f"{case}, {workload}: {name} differ, so the work is not the same: {stock} {ours}")
    for side, results in measured.items():
        results = [result for result in results if result is not None]
        row[f"{side}_out_of_memory"] = not results
        if results:
            row[f"{side}_tokens_per_second"] = round(statistics.median(r["tokens_per_second"] for r in results), 1)
            row[f"{side}_peak_gib"] = round(max(r["peak"] for r in results) / 2**30, 3)
    pairs = [pair for pair in zip(*measured.values()) if None not in pair]
    if pairs:
        row["times_faster"] = round(
            statistics.median(o["tokens_per_second"] / s["tokens_per_second"] for s, o in pairs), 2
        )
    ours = next((result for result in measured["ours"] if result is not None), None)
    if ours is not None:
        row["estimated_gib"] = round(ours["estimated"] / 2**30, 3)
        if args.tflops:
            used = row["ours_tokens_per_second"] * ours["flops_per_token"] / (args.tflops * 1e12)
            row["ours_model_flop_utilisation"] = round(used, 3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side per case (default: 3)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for --tiny only")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: the program, not the numbers")
    parser.add_argument("--tflops", type=float, help="the GPU's bfloat16 peak, where it is not known here")
    parser.add_argument("--out", default=str(RESULT), help="where to write the result")
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("train_gpu: there is no CUDA GPU here. Try the program with --tiny --device cpu.", file=sys.stderr)
        return 2
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: 7B on a CPU would take hours")
    if args.measure:
        print(json.dumps(measure(*args.measure, args.device, args.tiny)))
        return 0
    report = {"machine": machine(), "rounds": args.rounds, "tiny": args.tiny, "rows": []}
    if args.device == "cuda":
        name = report["machine"]["gpu"] = torch.cuda.get_device_name()
        args.tflops = args.tflops or next((peak for part, peak in CUDA_PEAKS.items() if part in name), None)
    for case in args.only:
        for workload in WORKLOADS:
            row = run_case(case, workload, args)
            report["rows"].append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
