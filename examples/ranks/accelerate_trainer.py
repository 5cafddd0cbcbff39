"""Prune and distil on several ranks in the Hugging Face Trainer: the script is that of one process.

    accelerate launch --multi_gpu --num_processes 2 examples/ranks/accelerate_trainer.py
    torchrun --nproc-per-node 2 examples/ranks/accelerate_trainer.py
    python examples/ranks/accelerate_trainer.py

It trains on the CPU, to run anywhere: leave `use_cpu` and `ddp_backend` out for GPUs. (``accelerate launch --cpu``
needs MPI for several processes.)
"""

from __future__ import annotations

import tempfile

import torch
from digits import Net, accuracy, collate, load, make_teacher
from transformers import Trainer, TrainingArguments

import torchopt_passes as top


def main(folder: str) -> None:
    torch.set_num_threads(1)
    train, test = load()
    teacher = make_teacher(train)

    torch.manual_seed(0)
    student = Net(64)
    args = TrainingArguments(
        folder,
        num_train_epochs=6,
        per_device_train_batch_size=25,
        learning_rate=1e-2,
        use_cpu=True,
        ddp_backend="gloo",
        logging_steps=60,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [
        top.GradualPruning(sparsity=0.8, start=0.1, end=0.7, scope="global"),
        top.Distillation(teacher, alpha=0.5, temperature=2.0),
    ]
    trainer = Trainer(student, args, train_dataset=train, data_collator=collate, callbacks=callbacks)
    trainer.train()

    last = next(entry for entry in reversed(trainer.state.log_history) if "sparsity" in entry)
    if trainer.is_world_process_zero():
        print(f"{args.world_size} ranks: sparsity {last['sparsity']:.3f}, accuracy {accuracy(student, test):.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
