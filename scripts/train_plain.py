"""Train a classifier with plain PyTorch, as somebody without this project would; saves a .pth.

    python scripts/train_plain.py resnet18 FOLDER OUT.pth --size 128 --epochs 6

FOLDER holds one folder of images a class. The benchmark uses it to make "a trained net of one's
own": nothing of the training loop, data or augmentation here is ours, only the network is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from edgestill.models.source import open_network
from PIL import Image
from torch.nn import functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    classes = sorted(path for path in given.folder.iterdir() if path.is_dir())
    files = [(file, label) for label, folder in enumerate(classes) for file in folder.iterdir()]
    images = torch.stack([read(file, given.size) for file, _ in files])
    labels = torch.tensor([label for _, label in files])
    shape = (3, given.size, given.size)
    net = open_network(given.net, args={}, classes=len(classes), input_shape=shape, seed=0).module
    train(net, images, labels, epochs=given.epochs)
    torch.save({"state_dict": net.state_dict()}, given.out)


def read(file: Path, size: int) -> torch.Tensor:
    image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def train(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.02)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: len(images) // BATCH * BATCH]
        for batch in order.split(BATCH):
            x = (images[batch].float() / 255 - MEAN[:, None, None]) / STD[:, None, None]
            if torch.rand((), generator=generator) < 0.5:
                x = x.flip(-1)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(net(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / (len(order) // BATCH):.3f}", flush=True)


if __name__ == "__main__":
    main()
