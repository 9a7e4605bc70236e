"""Four steps under DeepSpeed through Accelerate, in two processes of one CPU: ``python zero.py STAGE FOLDER``."""

from __future__ import annotations

import multiprocessing
import os
import sys


def train(rank: int, port: int, stage: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import comm

    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # Accelerate asks for the one of a GPU
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    inner, optimizer, batches = start()
    model, optimizer = accelerator.prepare(inner, optimizer)
    model.train()
    for batch in batches:
        mine = {name: value[rank : rank + 1] for name, value in batch.items()}
        accelerator.backward(model(**mine).loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        inner.export(folder)


def start():
    """Return model, optimizer and batches, the same in every process."""
    import torch
    from test_architectures import adapt
    from tiny import ARCHITECTURES

    tiny = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    model = adapt(tiny, schedule={"warmup_steps": 1, "ramp_steps": 1}, filter={"init_logit": 0.5})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, [tiny.batch()] * 4


if __name__ == "__main__":
    import socket

    import deepspeed  # noqa: F401
    import torch

    import structlora_pyg.model  # noqa: F401

    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train, args=(r, port, int(sys.argv[1]), sys.argv[2])) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
