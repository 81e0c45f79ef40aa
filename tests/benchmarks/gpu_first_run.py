"""The first run on a GPU, in ten minutes: is it right, and what does it cost beside PyTorch, transformers and PEFT.

    PYTHONPATH=.:tests python tests/benchmarks/gpu_first_run.py [--output gpu-first-run] [--minutes 9] [--stage NAME ...] [--tiny]

    environment    versions, the GPU; how long a launch, a copy and the first kernels take
    quant          four bits: bytes and numbers that differ from the CPU's, of blocks of zeros and of huge numbers too
    determinism    the same steps twice: the same bytes?
    tests          the tests that have a device, on the GPU
    train          a step, by full fine-tuning, LoRA and QLoRA: losses, milliseconds, launches, waits, memory
    decode         a token, greedy and sampled; whether both libraries write the same
    leak           device memory after few steps and after many

A line of JSON a measurement goes into <output>/rows.jsonl, and the ratios to the peer are printed at the end. A stage that
fails says why, and the next one runs. The peers compute with the very weights of our models (a directory that
`save_pretrained` writes), in float32 without TF32, as we do. Without PyTorch on CUDA there are no peers. --tiny is to try
the script where there is no GPU to speak of.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import cupy as cp

import minipeft as mp
from minipeft.backend import Rng, asarray, synchronize, to_numpy
from minipeft.quant import dequantize_4bit, quantize_4bit, quantize_model
from minipeft.train import AdamW, clip_grad_norm

BEGAN = time.perf_counter()
POOL = cp.get_default_memory_pool()
MODELS = {
    "1.4M": dict(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
}  # fmt: skip
METHODS = ("full", "lora", "qlora")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TESTS = "ops device layers transformer generation quant quant_linear optim train peft rlhf rlhf_online".split()


def library(name: str) -> Any:
    """A module, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


torch, hostcuda = library("torch"), library("hostcuda")
PEERS = torch is not None and torch.cuda.is_available()


class Record:
    """Writes rows to the file and to the terminal."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def __call__(self, stage: str, **values: Any) -> None:
        row = {"stage": stage, **values}
        self.rows.append(row)
        with open(self.path, "a") as file:
            print(json.dumps(row, default=str), file=file)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def ratios(self) -> None:
        """Our milliseconds beside the peer's."""
        same = ("stage", "model", "method", "batch", "tokens", "how")
        for ours in self.rows:
            for peer in self.rows:
                if ours.get("library") == "minipeft" and peer.get("library") == "torch" and all(ours.get(k) == peer.get(k) for k in same):
                    what = f"{ours['stage']} {ours['model']} {ours.get('method') or ours['how']}, batch {ours['batch']}"
                    print(f"{what:40s} {ours['ms']:9.2f} ms against {peer['ms']:9.2f} = {ours['ms'] / peer['ms']:.2f}")


# ------------------------------------------------------------------------------------------------------- measuring


def asked(fn: Callable) -> dict[str, Any]:
    """What one call asks of CUDA: launches, copies, waits; on a GPU also how long it works, and on what (torch.profiler)."""
    synchronize(cp)
    if hostcuda:
        with hostcuda.counting() as n:
            fn()
        return {"launches": n.launches, "gemms": n.gemms, "waits": n.waits, "copies": n.h2d + n.d2h + n.d2d}
    if not PEERS:
        return {}
    with torch.profiler.profile() as profile:
        fn()
        synchronize(cp)
    events = profile.key_averages()

    def count(*names: str) -> int:
        return sum(e.count for e in events if e.key.startswith(names))

    busy = {e.key: e.self_device_time_total / 1e3 for e in events if e.self_device_time_total and not e.key.startswith(("aten::", "cuda", "cuLaunch"))}
    top = sorted(busy.items(), key=lambda item: -item[1])[:8]
    return {
        "launches": count("cudaLaunchKernel", "cuLaunchKernel"), "waits": count("cudaStreamSynch", "cudaDeviceSynch", "cudaEventSynch") - 1,  # its own
        "copies": count("cudaMemcpy"), "busy_ms": sum(busy.values()), "top": [(name[:50], round(ms, 3)) for name, ms in top],
    }  # fmt: skip


def timed(fn: Callable, repeat: int, wait: Callable = lambda: synchronize(cp)) -> dict[str, float]:
    """Median milliseconds of a call, with the wait at its end, and of its part on the host."""
    for _ in range(min(3, repeat)):
        fn()
    wait()
    whole, host = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        fn()
        host.append(time.perf_counter() - start)
        wait()
        whole.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(whole), "host_ms": 1e3 * statistics.median(host)}


# ---------------------------------------------------------------------------------------------------------- models


def plain(name: str) -> mp.Transformer:
    config = mp.TransformerConfig.llama(**MODELS[name], max_position_embeddings=2048, bos_token_id=1, eos_token_id=None)
    return mp.Transformer(config, seed=0, backend="numpy")


def our_step(host: mp.Transformer, method: str, ids: np.ndarray) -> tuple[Any, Callable[[], float]]:
    """(the model on the GPU, a training step that gives the loss)."""
    model = host.copy().to(cp)
    model = quantize_model(model) if method == "qlora" else model
    model = model if method == "full" else mp.get_peft_model(model, mp.LoraConfig(**LORA))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(named, lr=1e-4)

    def step() -> float:
        loss = model.loss(ids, labels=ids, rng=Rng(0))
        loss.backward()
        clip_grad_norm(named, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def peer(directory: str, method: str = "full") -> Any:
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).cuda().train()
    if method == "full":
        return model
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))


def peer_step(model: Any, ids: np.ndarray) -> Callable[[], float]:
    trained, x = [p for p in model.parameters() if p.requires_grad], torch.from_numpy(ids)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> float:
        there = x.cuda()
        loss = model(input_ids=there, labels=there).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# ---------------------------------------------------------------------------------------------------------- stages


def environment(say: Record, args: argparse.Namespace) -> None:
    say("environment", gpu=cp.cuda.runtime.getDeviceProperties(0)["name"].decode(), cupy=cp.__version__, numpy=np.__version__,
        driver=cp.cuda.runtime.driverGetVersion(), runtime=cp.cuda.runtime.runtimeGetVersion(),
        torch=getattr(torch, "__version__", None), peers=PEERS)  # fmt: skip
    a, start = cp.zeros((64, 64), cp.float32), time.perf_counter()
    (a * 3.25 + 1).sum().item()
    say("environment", what="first kernels", ms=1e3 * (time.perf_counter() - start))
    for name, fn in {"a += a": lambda: a.__iadd__(a), "a @ a": lambda: a @ a, "item": lambda: a[0, 0].item()}.items():
        say("environment", what=name, **timed(fn, 10 if args.tiny else 200))


def quant(say: Record, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    for name, w in {
        "normal": rng.standard_normal((64, 64) if args.tiny else (576, 1536)),
        "a block of zeros": np.concatenate([np.zeros((4, 64)), rng.standard_normal((4, 64))]),
        "subnormal": rng.standard_normal((8, 64)) * 1e-40,
        "huge": rng.uniform(-1.5e38, 1.5e38, (2, 64)),
    }.items():
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                (a, here), (b, there) = (quantize_4bit(xp.asarray(w.astype(np.float32)), 64, kind, nested) for xp in (np, cp))
                x, y = dequantize_4bit(a, here), to_numpy(dequantize_4bit(b, there))
                say("quant", data=name, kind=kind, nested=nested, bytes_differ=int((a != to_numpy(b)).sum()),
                    numbers_differ=int((x != y).sum()), largest=float(np.abs(x - y).max()))  # fmt: skip


def determinism(say: Record, args: argparse.Namespace) -> None:
    host, steps, shape = plain("1.4M"), 2 if args.tiny else 20, (2, 16) if args.tiny else (16, 128)
    ids = np.random.default_rng(0).integers(0, 2048, shape)
    for method in METHODS:
        ends = []
        for _ in range(2):
            model, step = our_step(host, method, ids)
            losses = [step() for _ in range(steps)]
            ends.append([to_numpy(p.data) for p in model.parameters() if p.requires_grad])
        worst = max(float(np.abs(a - b).max()) for a, b in zip(*ends))
        say("determinism", method=method, same_bytes=worst == 0, largest_difference=worst, last_loss=losses[-1])


def tests(say: Record, args: argparse.Namespace) -> None:
    names = TESTS[4:5] if args.tiny else TESTS
    command = [sys.executable, "-m", "pytest", "--device", "cupy", "-k", "cupy", "-p", "no:cacheprovider", "--tb=line"]
    command += [f"tests/test_{name}.py" for name in names] + ["-n", "8"] * (library("xdist") is not None)
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60 if args.tiny else 240).stdout
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() + "\nno time left"
    say("tests", summary=(text.strip().splitlines() or [""])[-1])
    for line in [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))][:40]:
        say("tests", failed=line)


def train(say: Record, args: argparse.Namespace) -> None:
    for name, batch, tokens in [("1.4M", 2, 16)] if args.tiny else [("1.4M", 16, 128), ("135M", 2, 512), ("135M", 8, 512)]:
        host, ids = plain(name), np.random.default_rng(1).integers(0, MODELS[name]["vocab_size"], (batch, tokens))
        with tempfile.TemporaryDirectory() as directory:
            mp.save_pretrained(host, directory)
            for method in METHODS:
                what = dict(model=name, method=method, batch=batch, tokens=tokens)
                POOL.free_all_blocks()
                model, step = our_step(host, method, ids)
                first = [step() for _ in range(3)]
                row = timed(step, 1 if args.tiny else 10)
                held = {"peak_MB": POOL.total_bytes() / 1e6, "kept_MB": POOL.used_bytes() / 1e6, "losses": first}
                say("train", library="minipeft", **what, **row, **held, **asked(step))
                del model, step
                POOL.free_all_blocks()
                if PEERS:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    step = peer_step(peer(directory, method), ids)
                    first = [step() for _ in range(3)]
                    row = timed(step, 10, torch.cuda.synchronize)
                    held = {"peak_MB": torch.cuda.max_memory_allocated() / 1e6, "losses": first}
                    say("train", library="torch", **what, **row, **held, **asked(step))
                    del step


def decode(say: Record, args: argparse.Namespace) -> None:
    n = 3 if args.tiny else 64
    for name, batch in [("1.4M", 1)] if args.tiny else [("1.4M", 1), ("135M", 1), ("135M", 32)]:
        host, ids = plain(name), np.random.default_rng(2).integers(0, MODELS[name]["vocab_size"], (batch, 32))
        model, what = host.copy().to(cp), dict(model=name, batch=batch)
        for how, options in {"greedy": {}, "top-p": dict(temperature=0.8, top_p=0.9)}.items():
            model.generate(ids, max_new_tokens=2, eos_token_id=(), **options)
            start = time.perf_counter()
            out = model.generate(ids, max_new_tokens=n, eos_token_id=(), **options)
            ms = 1e3 * (time.perf_counter() - start) / n
            few = asked(lambda o=options, m=model, i=ids: m.generate(i, max_new_tokens=2, eos_token_id=(), **o))
            say("decode", library="minipeft", **what, how=how, ms=ms, of="two tokens", **few)
            same = float((host.generate(ids[:1], max_new_tokens=n, eos_token_id=(), **options) == out[:1]).mean())
            say("decode", **what, how=how, tokens_as_numpy=same)
        if PEERS:
            greedy, x = model.generate(ids, max_new_tokens=n, eos_token_id=()), torch.from_numpy(ids).cuda()
            with tempfile.TemporaryDirectory() as directory:
                mp.save_pretrained(host, directory)
                theirs = peer(directory).eval()
            call = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
            theirs.generate(x, max_new_tokens=2, **call)
            start = time.perf_counter()
            out = theirs.generate(x, max_new_tokens=n, **call).cpu().numpy()
            say("decode", library="torch", **what, how="greedy", ms=1e3 * (time.perf_counter() - start) / n)
            with torch.no_grad():
                a, b = theirs(x).logits.cpu().numpy(), to_numpy(model(asarray(ids, cp)).data)
            say("decode", **what, tokens_as_peer=float((out == greedy).mean()), logits_differ=float(np.abs(a - b).max()),
                logits_largest=float(np.abs(a).max()))  # fmt: skip


def leak(say: Record, args: argparse.Namespace) -> None:
    ids, seen = np.random.default_rng(3).integers(0, 2048, (4, 32)), []
    _, step = our_step(plain("1.4M"), "full", ids)
    for i in range(3 if args.tiny else 60):
        step()
        if i % (1 if args.tiny else 20) == 0:
            seen.append(POOL.used_bytes())
    say("leak", used_bytes=seen)


STAGES = {fn.__name__: fn for fn in (environment, quant, determinism, tests, train, decode, leak)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-first-run"))
    parser.add_argument("--minutes", type=float, default=9.0, help="no stage starts later")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    say, failed = Record(args.output / "rows.jsonl"), 0
    for name in args.stage:
        if time.perf_counter() - BEGAN > 60 * args.minutes:
            say(name, left_out="no time left")
            continue
        try:
            STAGES[name](say, args)
        except Exception as error:
            failed += 1
            say(name, error=f"{type(error).__name__}: {error}")
            (args.output / f"{name}.error").write_text(traceback.format_exc())
    say.ratios()
    return failed


if __name__ == "__main__":
    sys.exit(main())
