"""
One training step: stock transformers' LLaVA with padded batches and its own loss, and TRL's SFTTrainer, against ours.

    OMP_NUM_THREADS=2 python examples/benchmarks/train.py                 # all cases, 5 rounds: about an hour
    OMP_NUM_THREADS=2 python examples/benchmarks/train.py --only finetune --rounds 7

All sides get the same weights, the same samples and the same optimizer (AdamW, fused; gradients clipped to norm 1), and
keep no key/value cache. A step is forward, backward, clipping, update. Each measurement is a process of its own, the sides in
turn, so that whatever else the machine does slows all of them; a process takes one step to warm up and then times three,
each on other samples. Time is the median over the rounds of the processes' time for three steps, the ratio the median of
the rounds' ratios. Memory is the peak resident size during the steps above that after loading. Losses and gradient norms of
all sides are compared in every round, and the run fails if they differ.

The model: CLIP 4 layers × 256 at 224 pixels (256 image tokens), Llama 8 layers × 384. The samples have random tokens and the
lengths of LLaVA-Instruct-158K: the published files (conversation 126 MB for 57,669 samples, detail 20.5 MB for 23,240,
complex 79.6 MB for 76,643), less their JSON, at 4.3 characters per token, are about 330 + 50, 140 + 10 and 170 + 15 tokens of
answers and questions; spread log-normally (σ 0.3, 0.25, 0.25); 35 tokens of system prompt. A caption has 13 tokens.

TRL's side is stock's model with the loss of its `SFTTrainer` (`compute_loss`: a chunked head that keeps no logits, token
accuracy and entropy with it) on padded batches, without its data loader and without activation checkpointing, which it turns
on by default.

Predicted before the first run, from counted multiplications (`--predict` prints them; attention and everything that is
not a matrix product left out) and from the activations kept: finetune 2.4 × / 0.40 ×, frozen 2.3 × / 0.30 ×, pretrain
1.8 × / 0.45 ×, vocabulary 152k 3.3 × / 0.22 ×, LoRA 2.2 × / 0.40 ×, QLoRA 2.0 × / 0.40 ×.
First measured on an AMD EPYC (quiet, one round): finetune 2.2 ×, frozen 2.0 ×, LoRA 1.9 ×.
Predicted for TRL before its first run: on the CPU its head scores every position, the padded ones too, and computes the logits
again in the backward pass, so it takes a little longer than stock: finetune 2.5 × of its speed. It keeps no logits, about
2 GB less than stock's 5.5: 0.48 × of its memory growth.
First measured (one round on a machine with much other work, so in processor time): 3.6 × of its speed and 0.23 × of its memory
growth, which was 7.1 GiB. The second prediction was wrong: a tile of its head, 4,096 tokens by 32,768 of the vocabulary, is most of this batch.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "train.json"
IMAGE_TOKENS, SYSTEM_TOKENS, TIMED_STEPS = 256, 34, 3
MIX = {"conversation": 57_669, "detail": 23_240, "complex": 76_643}

SIDES = {"stock": "stock", "trl": "TRL", "ours": "ours"}
WITH_TRL = ("finetune", "lora")

CASES = {
    # name: (what it is, vocabulary, what is trained, samples per step, wanted: times faster, share of the memory)
    "finetune": ("finetune step, LLaVA-Instruct length mix, 8 samples", 32_064, "all", 8, 2.5, 0.45),
    "frozen": ("the same mix, frozen language model (projector only)", 32_064, "projector", 8, 2.5, 0.40),
    "pretrain": ("pretrain step, captions of about 13 tokens, batch 32", 32_064, "projector", 32, 2.0, 0.60),
    "vocabulary": ("finetune step, LLaVA-Instruct length mix, vocabulary 152k", 152_064, "all", 8, 3.0, 0.25),
    "lora": ("LoRA step, LLaVA-Instruct length mix", 32_064, "lora", 8, 2.0, 0.50),
    "qlora": ("QLoRA step, LLaVA-Instruct length mix", 32_064, "qlora", 8, 2.0, 0.50),
    "checkpointed": ("finetune step with activation checkpointing", 32_064, "all", 8, None, None),
}


def draw_sample(kind: str, generator) -> tuple:
    """Ids and labels of one sample, without padding."""
    import torch

    def length(mean, spread):
        return max(4, round(mean * math.exp(spread * torch.randn((), generator=generator).item() - spread**2 / 2)))

    def tokens(number):
        return torch.randint(3, 31_990, (number,), generator=generator).tolist()

    ids = [1]
    if kind == "caption":
        rounds = [(0, length(13, 0.3))]
    else:
        ids += tokens(SYSTEM_TOKENS)
        if kind == "conversation":
            number = int(torch.randint(3, 7, (), generator=generator))
            answers = length(330, 0.3)
            rounds = [(12, answers // number)] * number
        else:
            rounds = [(10, length(140, 0.25))] if kind == "detail" else [(15, length(170, 0.25))]
    ids += [32_000] * IMAGE_TOKENS
    labels = [-100] * len(ids)
    for question, answer in rounds:
        ids += tokens(question)
        labels += [-100] * question
        answer = tokens(answer)
        ids += answer
        labels += answer
    return torch.tensor(ids), torch.tensor(labels)


def draw_batches(case: str, number: int) -> list:
    """`number` lists of samples, the same on both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    samples = CASES[case][3]
    batches = []
    for _ in range(number):
        kinds = ["caption"] * samples
        if case != "pretrain":
            drawn = torch.multinomial(
                torch.tensor([float(n) for n in MIX.values()]), samples, True, generator=generator
            )
            kinds = [list(MIX)[i] for i in drawn]
        batches.append([draw_sample(kind, generator) for kind in kinds])
    return batches


def make_model(case: str, side: str):
    """The model with what the case trains, random weights from a seed."""
    import torch
    from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig
    from transformers import LlavaConfig as StockConfig
    from transformers import LlavaForConditionalGeneration as StockModel

    import modeling_llava

    _, vocabulary, trains, _, _, _ = CASES[case]
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, vocab_size=vocabulary,
        max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    config_class, model_class = StockConfig, StockModel
    if side == "ours":
        config_class, model_class = modeling_llava.LlavaConfig, modeling_llava.LlavaForConditionalGeneration
    torch.manual_seed(0)
    config = config_class(
        vision_config=vision, text_config=text, image_token_index=32_000, image_seq_length=IMAGE_TOKENS
    )
    model = model_class(config)
    if trains == "qlora":
        from modeling_llava.io.adapters import UNQUANTISED_MODULES, forbid_inference_packing

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            four_bit = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=UNQUANTISED_MODULES,
            )  # fmt: skip
            model = model_class.from_pretrained(folder, quantization_config=four_bit, dtype=torch.float32)
        forbid_inference_packing(model)
    for name, parameter in model.named_parameters():
        component = next((c for c in ("vision_tower", "multi_modal_projector") if c in name), "language_model")
        wanted = component == "multi_modal_projector" or (component == "language_model" and trains == "all")
        parameter.requires_grad_(wanted and parameter.is_floating_point())
    core = model
    if trains in ("lora", "qlora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        # 128 of LLaVA's 4096 channels is as much as 12 of 384; without dropout, or no two runs would have equal losses
        lora = LoraConfig(
            r=12, lora_alpha=24, init_lora_weights="gaussian", target_modules=r"model\.language_model\..*_proj",
            modules_to_save=["multi_modal_projector"],
        )  # fmt: skip
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if case == "checkpointed":
        core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if side == "ours":
        from modeling_llava.kernels import apply_kernels
        from modeling_llava.kernels.packed_attention import use_varlen_attention

        use_varlen_attention(core)
        apply_kernels(model)
    return model.train()


def trl_loss(model, folder: str):
    """The loss of TRL's SFTTrainer, a function of a padded batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    trainer = SFTTrainer(
        model,
        SFTConfig(
            folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
    )
    return lambda batch: trainer.compute_loss(model, dict(batch))


def collate(samples: list, side: str, pixels) -> dict:
    import torch

    if side == "ours":
        from modeling_llava.data.collator import pack_sequences

        return {
            **pack_sequences([ids for ids, _ in samples], [labels for _, labels in samples]),
            "pixel_values": pixels,
        }
    length = max(len(ids) for ids, _ in samples)

    def padded(rows, value):
        return torch.stack([torch.cat([row, row.new_full((length - len(row),), value)]) for row in rows])

    return {
        "input_ids": padded([ids for ids, _ in samples], 0),
        "labels": padded([labels for _, labels in samples], -100),
        "attention_mask": padded([torch.ones_like(ids) for ids, _ in samples], 0),
        "pixel_values": pixels,
    }


def memory(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measure(case: str, side: str) -> dict:
    """In a process of its own: times, losses, gradient norms, and the peak of memory above the loaded model."""
    import torch

    batches = draw_batches(case, 1 + TIMED_STEPS)
    generator = torch.Generator().manual_seed(1)
    pixels = [torch.randn(len(batch), 3, 224, 224, generator=generator) for batch in batches]
    inputs = [collate(batch, side, images) for batch, images in zip(batches, pixels)]
    model = make_model(case, side)
    loss_of = trl_loss(model, tempfile.mkdtemp()) if side == "trl" else lambda batch: model(**batch).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    del batches, pixels
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    baseline = memory("VmRSS")
    result = {"seconds": [], "cpu_seconds": [], "losses": [], "gradient_norms": []}
    for step_inputs in inputs:
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = loss_of(step_inputs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result["seconds"].append(time.perf_counter() - start)
        result["cpu_seconds"].append(time.process_time() - cpu_start)  # of all threads
        result["losses"].append(loss.item())
        result["gradient_norms"].append(norm.item())
    for name in ("seconds", "cpu_seconds"):
        result[name] = sum(result[name][1:])
    return {**result, "peak_mib": memory("VmHWM") - baseline, "positions": int(inputs[1]["input_ids"].numel())}


def run_case(case: str, rounds: int) -> dict:
    measured = {side: [] for side in SIDES if side != "trl" or case in WITH_TRL}
    for _ in range(rounds):
        for side, results in measured.items():
            command = [sys.executable, __file__, "--measure", case, side]
            output = subprocess.run(command, capture_output=True, text=True)
            if output.returncode:
                raise SystemExit(f"{case}, {side} failed:\n{output.stderr[-3000:]}")
            results.append(json.loads(output.stdout.splitlines()[-1]))
    ours = measured.pop("ours")
    row = {"case": case, "what": CASES[case][0], "wanted_faster": CASES[case][4], "wanted_memory": CASES[case][5]}
    row |= medians("ours", ours)
    for side, results in measured.items():
        for theirs, own in zip(results, ours):
            for name, tolerance in (("losses", 1e-4), ("gradient_norms", 1e-3)):
                if any(abs(a - b) > tolerance * max(abs(a), 1.0) for a, b in zip(theirs[name], own[name])):
                    raise SystemExit(f"{case}: {name} of {side} and ours differ: {theirs[name]} {own[name]}")
        than = "" if side == "stock" else f"_than_{side}"
        row |= medians(side, results)
        row[f"times_faster{than}"] = round(
            statistics.median(t["seconds"] / o["seconds"] for t, o in zip(results, ours)), 2
        )
        row[f"share_of_memory{than}"] = round(
            statistics.median(o["peak_mib"] / t["peak_mib"] for t, o in zip(results, ours)), 3
        )
    return row


def medians(side: str, results: list[dict]) -> dict:
    return {
        f"{side}_seconds": round(statistics.median(result["seconds"] for result in results) / TIMED_STEPS, 3),
        f"{side}_peak_mib": round(statistics.median(result["peak_mib"] for result in results)),
        f"{side}_losses": [round(loss, 5) for loss in results[0]["losses"]],
        f"{side}_gradient_norms": [round(norm, 5) for norm in results[0]["gradient_norms"]],
    }


def predict(case: str) -> float:
    """Stock's matrix products over ours: padded positions, all of them through the head, against what is needed."""
    _, vocabulary, trains, _, _, _ = CASES[case]
    layers, head, tower = 8 * (4 * 384**2 + 3 * 384 * 1024), 384 * vocabulary, 4 * (4 * 256**2 + 2 * 256 * 1024)
    passes = 3 if trains == "all" else 2  # forward, gradients of activations, gradients of weights
    stock = ours = 0
    for batch in draw_batches(case, 1 + TIMED_STEPS)[1:]:
        positions = sum(len(ids) for ids, _ in batch)
        supervised = sum(int((labels != -100).sum()) for _, labels in batch)
        padded = len(batch) * max(len(ids) for ids, _ in batch)
        image = len(batch) * (IMAGE_TOKENS + 1) * tower
        stock += passes * padded * (layers + head) + image
        ours += passes * (positions * layers + supervised * head) + image
    return stock / ours


def machine() -> dict:
    import torch
    import transformers

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side per case (default: 5)")
    parser.add_argument("--predict", action="store_true", help="print the counted multiplications' ratios and stop")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(RESULT), help="where to write the result")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    if args.predict:
        for case in args.only:
            print(f"{case:14}{predict(case):5.2f} × fewer multiplications")
        return
    report = {"machine": machine(), "rounds": args.rounds, "rows": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for case in args.only:
        row = run_case(case, args.rounds)
        report["rows"].append(row)
        wanted = f" (wanted ≥ {row['wanted_faster']} ×, ≤ {row['wanted_memory']} ×)" if row["wanted_faster"] else ""
        print(f"{row['what']}\n    ours {row['ours_seconds']:.2f} s, {row['ours_peak_mib']:,} MiB")
        for side, than in (("stock", ""), ("trl", "_than_trl")):
            if f"{side}_seconds" in row:
                print(
                    f"    {SIDES[side]} {row[f'{side}_seconds']:.2f} s, {row[f'{side}_peak_mib']:,} MiB: ours "
                    f"{row[f'times_faster{than}']:.2f} × as fast with {row[f'share_of_memory{than}']:.3f} × the memory"
                    f"{wanted if side == 'stock' else ' (wanted ≥ 2 ×, ≤ 0.5 ×)'}",
                    flush=True,
                )
        print(f"    losses {row['ours_losses']}, gradient norms {row['ours_gradient_norms']}", flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_file():  # cases that were not run again keep their rows
        before = json.loads(out.read_text())
        ran = {row["case"] for row in report["rows"]}
        kept = [row for row in before["rows"] if row["case"] not in ran]
        report["rows"] = sorted(report["rows"] + kept, key=lambda row: list(CASES).index(row["case"]))
    out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
