"""Gives DeepSpeed JSONs to real engines and reports which of them fail: `python -m tests.local.engine_verdicts`.

Reads a JSON list of complete DeepSpeed configs on standard input and prints a list of the same length: null where a
tiny model made its updates with it, else the error's type and text. torch and DeepSpeed are imported once; each config
then runs in forked ranks of its own, since a failed engine leaves hooks and groups behind.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
UPDATES = 2
SECONDS = 25.0
NOT_COMPILED = "not compiled here:"
"""Begins the error's text when DeepSpeed accepted the config and began to build a kernel, which takes minutes."""


def main() -> None:
    configs = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed  # noqa: F401  forked ranks find it imported
    import torch

    torch.set_num_threads(1)
    _warm_up()
    verdicts = []
    for number, config in enumerate(configs):
        verdicts.append(_try(config))
        print(number, verdicts[-1], file=sys.stderr, flush=True)
    json.dump(verdicts, out)
    out.flush()


def _warm_up() -> None:
    """Imports what is imported late, and keeps DeepSpeed from compiling kernels in ranks that may be killed."""
    import deepspeed
    import torch
    import torch._inductor.compile_fx
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name in ("zero.stage_1_and_2", "zero.stage3", "zero.muon.muon_optimizer", "bf16_optimizer"):
        importlib.import_module(f"deepspeed.runtime.{name}")
    # Only inference uses this kernel, and building it takes long.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    OpBuilder.jit_load = _not_compiled
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    torch.optim.AdamW([parameter]).step()


def _not_compiled(builder: Any, verbose: bool = True) -> Any:
    raise NotImplementedError(f"{NOT_COMPILED} {builder.name}")


def _try(config: dict[str, Any]) -> str | None:
    """The first error of any rank, "hangs", or None."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = {}
        for rank in range(WORLD_SIZE):
            child = os.fork()
            if child == 0:
                _be_rank(rank, config, Path(folder))
            ranks[child] = rank
        _wait(set(ranks))
        # A rank whose peer failed gets errors of its own, later.
        errors = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            return errors[0].read_text()
        done = len(list(Path(folder).glob("done-*")))
        return None if done == WORLD_SIZE else "hangs, or dies without an error"


def _wait(children: set[int]) -> None:
    """Waits for all ranks; once one has failed, or time is up, the others are killed."""
    deadline = time.monotonic() + SECONDS
    while children:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.discard(child)
                if status:
                    deadline = min(deadline, time.monotonic() + 1)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            return
        time.sleep(0.005)


def _be_rank(rank: int, config: dict[str, Any], folder: Path) -> None:
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE="2")
        os.chdir(folder)
        _train(rank, config, folder / "store")
        (folder / f"done-{rank}").write_text("")
        code = 0
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {text}"[:200])
    finally:
        os._exit(code)


def _train(rank: int, config: dict[str, Any], store: Path) -> None:
    import deepspeed
    import torch

    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    on = {name: bool((config.get(name) or {}).get("enabled")) for name in ("bf16", "bfloat16", "fp16")}
    dtype = torch.bfloat16 if on["bf16"] or on["bfloat16"] else torch.float16 if on["fp16"] else torch.float32
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(32, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 32)
    ).to(dtype)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        config=config,
        dist_init_required=False,
    )
    for _ in range(UPDATES):
        for _ in range(config["gradient_accumulation_steps"]):
            tokens = torch.randint(0, 32, (config["train_micro_batch_size_per_gpu"], 8))
            logits = engine(tokens)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
            engine.backward(loss)
            engine.step()
    if engine.global_steps != UPDATES:
        raise RuntimeError(f"{engine.global_steps} updates instead of {UPDATES}")


if __name__ == "__main__":
    main()
