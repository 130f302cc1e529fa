"""A training step of MAE, beside the plain way, lightly's parts and an encoder of all tokens.

    python -m experiments.benchmarks.mae_step [--variant B] [--batch 2] [--rounds 5]

    patchlight   visible patches are picked out of the pixels, fused attention
    plain        as published: all patches are projected, gathers whose indices are repeated for
                 every channel, attention that keeps its scores
    full         our encoder on all tokens, a learned one for removed patches; the same decoder
    lightly      MaskedVisionTransformerTIMM and MAEDecoderTIMM, put together as its docs do

Images of 224 pixels, 75 % of the patches removed, normalised pixels (lightly's: raw ones); forward,
loss and backward, no optimizer. The arms take turns step by step. On a GPU in bfloat16 autocast; on
a CPU in float32, and the time is that of the processor, so that other work counts for little.
lightly is left out where it is not installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modules.backbones import Masked, Positions, ViT
from modules.backbones.layers import Block
from modules.mae import Autoencoder, mean_and_std

SIDE, RATIO = 224, 0.75


def ours(network: Autoencoder, images: Tensor) -> Tensor:
    keys = torch.randint(2**62, (len(images),), device=images.device)
    losses: Tensor = network(images, network.mask(images, keys))[0]
    return losses.mean()


def full(network: Autoencoder, images: Tensor, token: Tensor) -> Tensor:
    keys = torch.randint(2**62, (len(images),), device=images.device)
    mask = network.mask(images, keys)
    features = network.backbone(Masked(images, mask.is_removed[:, 1:], token))
    assert features.cls is not None
    x = torch.cat((features.cls[:, None], features.patches), dim=1)
    x = network.decoder_embed(x) + network.decoder_positions(mask.tokens.where)
    for block in network.decoder_blocks:
        x = block(x)
    predicted = network.decoder_pred(network.decoder_norm(x))
    losses: Tensor = network.forward_loss(images, predicted, mask)
    return losses.mean()


def plain_block(block: Block, x: Tensor) -> Tensor:
    """A block whose attention makes its scores and keeps them."""
    attention = block.attn
    q, k, v = attention.project(block.norm1(x))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    x = x + attention.proj((weights @ v).transpose(1, 2).flatten(2))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def gathered(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].repeat(1, 1, x.shape[-1]))


def plain(network: Autoencoder, images: Tensor) -> Tensor:
    vit: Any = network.backbone
    tokens = vit.patch_embed(images) + vit.positions(vit.grid)[:, 1:]
    b, n, _ = tokens.shape
    kept = int(n * (1 - RATIO))
    order = torch.rand(b, n, device=images.device).argsort(dim=1)
    back = order.argsort(dim=1)
    removed = torch.ones(b, n, device=images.device)
    removed[:, :kept] = 0
    removed = torch.gather(removed, 1, back)
    x = torch.cat((vit.cls_token.expand(b, -1, -1), gathered(tokens, order[:, :kept])), dim=1)
    for block in vit.blocks:
        x = plain_block(block, x)
    x = network.decoder_embed(vit.norm(x))
    others = network.mask_token.to(x.dtype).repeat(b, n - kept, 1)
    x = torch.cat((x[:, :1], gathered(torch.cat((x[:, 1:], others), dim=1), back)), dim=1)
    x = x + network.decoder_positions(vit.grid)
    for block in network.decoder_blocks:
        assert isinstance(block, Block)
        x = plain_block(block, x)
    predicted = network.decoder_pred(network.decoder_norm(x))[:, 1:].float()
    target = rearrange(
        images, "b c (y p) (x q) -> b (y x) (p q c)", p=vit.patch_size, q=vit.patch_size
    )
    mean, std = mean_and_std(target)
    error = (predicted - (target - mean) / std).square().mean(dim=-1)
    loss: Tensor = (error * removed).sum() / removed.sum()
    return loss


def lightly_step(variant: str, images: Tensor) -> Callable[[], Tensor] | None:
    """A step of lightly's parts; None where there is no lightly."""
    try:
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    except ImportError:
        return None
    import timm

    names = {"S": "small", "B": "base", "L": "large"}
    vit: Any = timm.create_model(f"vit_{names[variant]}_patch16_{SIDE}")
    vit.reset_classifier(0)
    encoder = MaskedVisionTransformerTIMM(vit=vit).to(images.device)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches, patch_size=16, embed_dim=vit.embed_dim
    ).to(images.device)

    def step() -> Tensor:
        encoder.zero_grad()
        decoder.zero_grad()
        size = (len(images), encoder.sequence_length)
        keep, removed = utils.random_token_mask(size, RATIO, device=images.device)
        x = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        whole = utils.repeat_token(decoder.mask_token, size)
        whole = decoder.decode(utils.set_at_index(whole, keep, x.type_as(whole)))
        predicted = decoder.predict(utils.get_at_index(whole, removed))
        target = utils.get_at_index(utils.patchify(images, 16), removed - 1)
        return F.mse_loss(predicted, target)

    return step


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=("S", "B", "L"), default="B")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vit = ViT(given.variant, 16, SIDE, positions=Positions("sincos2d"), init="mae")
    network = Autoencoder(vit, RATIO).to(device)
    token = torch.zeros(1, vit.embed_dim, device=device, requires_grad=True)
    images = torch.randn(given.batch, 3, SIDE, SIDE, device=device)
    arms: dict[str, Callable[[], Tensor]] = {
        "patchlight": lambda: ours(network, images),
        "plain": lambda: plain(network, images),
        "full": lambda: full(network, images, token),
    }
    if (lightly := lightly_step(given.variant, images)) is not None:
        arms["lightly"] = lightly
    times: dict[str, list[float]] = {name: [] for name in arms}
    repeats = 20 if device.type == "cuda" else 1  # of each arm in a round
    names = list(arms)
    for turn in range(given.rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock(device)
            for _ in range(repeats):
                network.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = arms[name]()
                torch.autograd.backward(loss)
            if turn:  # the first round only warms up
                times[name].append((clock(device) - start) / repeats)
    table = Table("arm", "median step (ms)", "patchlight is faster by", "quartiles")
    for name in names:
        ratios = [its / own for its, own in zip(times[name], times["patchlight"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = f"{1000 * statistics.median(times[name]):,.1f}"
        table.add_row(name, milliseconds, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{given.variant}/16, batch {given.batch}, {given.rounds} rounds, {where}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
