"""Networks that users might bring, each with what is hard to trace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.3, generator=generator)
    return network.eval()


class Concatenating(nn.Module):
    """Two branches concatenated, then flattened with their pixels into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 24, 1)
        self.norm = nn.BatchNorm2d(40)
        self.hidden = nn.Linear(40 * 4 * 4, 32)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.norm(torch.cat([self.left(x), torch.sigmoid(self.right(x))], 1))
        x = F.max_pool2d(x, 2).flatten(1)
        logits: Tensor = self.out(F.gelu(self.hidden(x)))
        return logits


class Gated(nn.Module):
    """Depthwise, grouped with GroupNorm, squeeze-excite and a functional shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = GatedBlock()
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.group_norm = nn.GroupNorm(4, 32)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        x = self.block(x)
        x = F.relu(self.group_norm(self.grouped(x)))
        logits: Tensor = self.out(x.mean((2, 3)))
        return logits


class GatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.gate = Gate(32)
        self.narrow = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(F.silu(self.depthwise(F.relu6(self.widen(x)))))
        return x + self.narrow(y)


class Gate(nn.Module):
    """Squeeze-excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)


class Transformer(nn.Module):
    """torch's own encoder layers over 2 × 2 patches of an 8 × 8 image; batch first or second."""

    def __init__(self, *, batch_first: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first)
            for _ in range(layers)
        )
        self.out = nn.Linear(16, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(x.mean(1 if self.batch_first else 0))
        return logits


class Attention(nn.Module):
    """A user's own attention; `fixed_heads` views by the number of heads, else by their width."""

    def __init__(self, *, fixed_heads: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)
        self.split = (4, -1) if fixed_heads else (-1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = (
            f(y).view(*y.shape[:2], *self.split).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        logits: Tensor = self.out(x.mean(1))
        return logits


class Words(nn.Module):
    """Tokens (N, 2, S) through torch's own encoder, padding masked, to the mean of what is real."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, 16), nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(*tokens.unbind(1))

    def answer(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.places(places)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        real = attention_mask[..., None].float()
        logits: Tensor = self.out((x * real).sum(1) / real.sum(1))
        return logits
