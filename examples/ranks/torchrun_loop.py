"""Prune and distil on several ranks in a loop of your own, with DistributedDataParallel or FSDP2.

    torchrun --nproc-per-node 2 examples/ranks/torchrun_loop.py
    torchrun --nproc-per-node 2 examples/ranks/torchrun_loop.py --fsdp

Each rank has its part of every batch; the result is that of one process with the whole batch.
"""

from __future__ import annotations

import sys

import torch
from digits import Net, accuracy, collate, load, make_teacher
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import torchopt_passes as top
from torchopt_passes.callbacks import num_items_in_batch

EPOCHS, BATCH = 6, 50


def train(fsdp: bool) -> tuple[float, float]:
    """The sparsity and the accuracy of a student that is pruned and distilled on all ranks."""
    rows, test = load()
    teacher = make_teacher(rows)

    torch.manual_seed(0)
    student = Net(64)
    wrapped: nn.Module = fully_shard(student) if fsdp else nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    sampler = DistributedSampler(rows, seed=0)
    loader = DataLoader(rows, batch_size=BATCH // distributed.get_world_size(), sampler=sampler, collate_fn=collate)
    callbacks = [
        top.GradualPruning(sparsity=0.8, start=0.1, end=0.7, scope="global"),
        top.Distillation(teacher, alpha=0.5, temperature=2.0),
    ]
    with top.attach(wrapped, optimizer, callbacks, total_steps=EPOCHS * len(loader)) as session:
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for batch in loader:
                items = num_items_in_batch(student, [batch])  # the labels of all ranks
                wrapped.train()(**batch, num_items_in_batch=items).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        metrics = session.metrics()
    return metrics["sparsity"], accuracy(wrapped, test)


def main(fsdp: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")  # nccl on GPUs
    # In a function of its own: DistributedDataParallel must be gone before the process group is. If it is the last
    # to hold the group, it frees it under Python's lock, which a gloo thread may wait for: the process never ends.
    sparsity, found = train(fsdp)
    if distributed.get_rank() == 0:
        print(f"{distributed.get_world_size()} ranks: sparsity {sparsity:.3f}, accuracy {found:.3f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(fsdp="--fsdp" in sys.argv)
