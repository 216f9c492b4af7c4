"""
Run llama.cpp on a pair of GGUF files: `python run_llama_cpp.py JOB.json OUT.npz`, in a Python that has llama-cpp-python.

The job names `model`, `mmproj`, `num_tokens` and `cases`: `prompt` (with `<__media__>` where the image goes) and `image`
(an `.npy` file, uint8 `[height, width, 3]`). For each case i the result holds `ids_i` (text tokens; −200 for the image),
`features_i` `[patches, hidden]`, `logits_i` (of the prompt's last position) and `greedy_i`.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp


IMAGE_MARK = -200


def run_case(model, context, mtmd, case: dict, num_tokens: int) -> dict[str, np.ndarray]:
    pixels = np.ascontiguousarray(np.load(case["image"]))
    height, width, _ = pixels.shape
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    text = case["prompt"].encode()
    request = mtmd_cpp.mtmd_input_text(text=text, text_len=len(text), add_special=True, parse_special=True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if mtmd_cpp.mtmd_tokenize(mtmd, chunks, ctypes.byref(request), bitmaps, 1) != 0:
        sys.exit("llama.cpp could not tokenize the prompt")

    ids, features = [], None
    hidden = llama_cpp.llama_model_n_embd(model)
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            length = ctypes.c_size_t()
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
            ids.extend(tokens[j] for j in range(length.value))
        else:
            ids.append(IMAGE_MARK)
            if mtmd_cpp.mtmd_encode_chunk(mtmd, chunk) != 0:
                sys.exit("llama.cpp could not encode the image")
            values = mtmd_cpp.mtmd_get_output_embd(mtmd)
            features = np.array(values[: count * hidden], dtype=np.float32).reshape(count, hidden)

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    past = llama_cpp.llama_pos(0)
    if mtmd_cpp.mtmd_helper_eval_chunks(mtmd, context, chunks, 0, 0, 512, True, ctypes.byref(past)) != 0:
        sys.exit("llama.cpp could not evaluate the prompt")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    greedy, first = [], None
    for _ in range(num_tokens):
        logits = np.array(llama_cpp.llama_get_logits_ith(context, -1)[:vocabulary], dtype=np.float32)
        first = logits if first is None else first
        greedy.append(int(logits.argmax()))
        token = (llama_cpp.llama_token * 1)(greedy[-1])
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) != 0:
            sys.exit("llama.cpp could not continue")
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    return {"ids": np.array(ids), "features": features, "logits": first, "greedy": np.array(greedy)}


def main(job_file: str, out_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {job['model']}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 512, 1, 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    options = mtmd_cpp.mtmd_context_params_default()
    options.use_gpu, options.n_threads, options.warmup = False, 1, False
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    mtmd = mtmd_cpp.mtmd_init_from_file(job["mmproj"].encode(), model, options)
    if not mtmd:
        sys.exit(f"llama.cpp does not load {job['mmproj']}")
    results = {}
    for i, case in enumerate(job["cases"]):
        for name, value in run_case(model, context, mtmd, case, job["num_tokens"]).items():
            results[f"{name}_{i}"] = value
    np.savez(out_file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
