"""End-to-end GRPO: tokens per second of Miles against TRL's GRPOTrainer, on one CPU thread each.

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.12.1
    python benchmarks/trl_grpo.py --trl-python /tmp/trl/bin/python

The same for both: a 3.4-million-parameter Qwen3 with its weights, 8 prompts of 64 tokens a step, 4 samples of exactly
64 new tokens each (the end token lies outside the model's vocabulary, so nothing can stop early), one optimizer step,
and the precision of generating and training: float32, or with `--dtype bfloat16` what TRL does unless told otherwise,
bfloat16 with parameters in float32 (it generates under the same autocast as it trains). Miles runs twice:
synchronously, as TRL does, where engine and trainer wait for each other and so one thread works at a time; and with
`max_staleness = 1`, where they work at the same time, one thread each, so two in all, and a batch is one update old.
The three take turns; each turn is a process of its own, whose first steps are not counted, so that neither start-up
nor a slow moment of the machine decides. A step lasts from the end of the one before to its own end: generating,
scoring, training and (Miles) sending the weights to the engine. Tokens are the generated ones.

Start it with `taskset -c 0` to hold all to one core, helper threads and processes included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tomli_w
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPTS, SAMPLES, NEW_TOKENS, PROMPT_TOKENS, VOCABULARY = 8, 4, 64, 64, 1024
END = "<end>"  # a token of the tokenizer that the model has not
UNCOUNTED = 2  # first steps of each turn: memory is allocated, caches fill
LEARNING_RATE = 1e-6
TOLERANCE = 0.5  # words are numerals, and the last is right within this share of 512, so about half of the samples are


def make_workload(folder: Path, steps: int, dtype: str) -> None:
    """Writes what both sides read: model/, prompts.jsonl, and workload.json for TRL, run.toml for Miles."""
    config = Qwen3Config(
        hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "model")
    vocabulary = {str(token): token for token in range(VOCABULARY)} | {END: VOCABULARY}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(str(draw.randrange(VOCABULARY)) for _ in range(PROMPT_TOKENS)),
            "answer": str(VOCABULARY // 2),
        }
        for _ in range(PROMPTS * steps)
    ]
    assert all(len(tokenizer.encode(row["prompt"])) == PROMPT_TOKENS for row in rows)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = {
        "prompts_per_step": PROMPTS,
        "samples_per_prompt": SAMPLES,
        "new_tokens": NEW_TOKENS,
        "learning_rate": LEARNING_RATE,
        "tolerance": TOLERANCE,
        "dtype": dtype,
    }
    (folder / "workload.json").write_text(json.dumps(workload))
    (folder / "run.toml").write_text(tomli_w.dumps(run_file(folder, steps, dtype)))


def run_file(folder: Path, steps: int, dtype: str) -> dict[str, object]:
    """The workload as a run of Miles; everything else is left at its default."""
    return {
        "folder": str(folder / "runs"),
        "schedule": {"steps": steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES},
        "model": {"path": str(folder / "model"), "max_tokens": PROMPT_TOKENS + NEW_TOKENS, "dtype": dtype},
        "data": {"name": "jsonl", "path": str(folder / "prompts.jsonl")},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "reward": {"name": "number", "tolerance": TOLERANCE},
        "engine": {"name": "torch"},
        "trainer": {"name": "torch", "dtype": dtype, "optimizer": {"learning_rate": LEARNING_RATE}},
        "advantage": {"name": "grpo"},
        "loss": {"name": "grpo"},
    }


def call(command: list[str]) -> str:
    """Standard output of a command on one thread; its whole output as the error if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def trl_seconds(python: str, folder: Path, steps: int) -> list[float]:
    """One turn of TRL."""
    worker = str(Path(__file__).with_name("trl_worker.py"))
    answer = json.loads(call([python, worker, str(folder), "--steps", str(steps)]).splitlines()[-1])
    seconds: list[float] = answer["seconds"][UNCOUNTED:]
    return seconds


def miles_steps(folder: Path, turn: int, staleness: int) -> tuple[list[float], list[float]]:
    """One turn of Miles: seconds of each step, and the share of it that is none of generate, reward, train, publish."""
    name = f"turn-{turn}-{staleness}"
    program = str(Path(sys.executable).with_name("miles"))
    call([program, "train", str(folder / "run.toml"), f"name={name}", f"schedule.max_staleness={staleness}"])
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert {line["response_tokens"] for line in lines} == {PROMPTS * SAMPLES * NEW_TOKENS}
    ends = [line["time"] for line in lines]
    seconds = [end - start for start, end in itertools.pairwise(ends)]  # the first step is not among them
    return seconds[UNCOUNTED - 1 :], [line["seconds/other"] / line["seconds/step"] for line in lines[UNCOUNTED:]]


def compare(folder: Path, trl_python: str, pairs: int, steps: int) -> None:
    """Prints each turn's tokens per second and the ratios to TRL's, then the medians."""
    tokens = PROMPTS * SAMPLES * NEW_TOKENS
    rates: list[tuple[float, float, float]] = []
    shares: list[float] = []
    print(f"{'turn':>6} {'TRL':>8} {'Miles':>8} {'ratio':>6} {'one step ahead':>15} {'ratio':>6}   (tokens a second)")
    for turn in range(pairs):
        seconds, others = miles_steps(folder, turn, 0)
        shares += others
        miles = tokens / statistics.median(seconds)
        trl = tokens / statistics.median(trl_seconds(trl_python, folder, steps))
        ahead = tokens / statistics.mean(miles_steps(folder, turn, 1)[0])
        rates.append((trl, miles, ahead))
        show(str(turn + 1), trl, miles, ahead, miles / trl, ahead / trl)
    trl, miles, ahead = (statistics.median(side) for side in zip(*rates, strict=True))
    ratio = statistics.median(own / other for other, own, _ in rates)
    show("median", trl, miles, ahead, ratio, statistics.median(own / other for other, _, own in rates))
    print(f"Synchronous, {statistics.median(shares):.1%} of a step is neither generate, reward, train nor publish.")


def show(title: str, trl: float, miles: float, ahead: float, ratio: float, ratio_ahead: float) -> None:
    """Prints a line of the table."""
    print(f"{title:>6} {trl:8.0f} {miles:8.0f} {ratio:6.2f} {ahead:15.0f} {ratio_ahead:6.2f}", flush=True)


def main() -> None:
    """Makes the workload and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="the Python of an environment with TRL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each turn")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what both generate and train in"
    )
    arguments = parser.parse_args()
    steps = arguments.steps + UNCOUNTED
    with tempfile.TemporaryDirectory() as name:
        make_workload(Path(name), steps, arguments.dtype)
        compare(Path(name), arguments.trl_python, arguments.pairs, steps)


if __name__ == "__main__":
    main()
