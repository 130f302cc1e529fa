"""MAE: an encoder sees a quarter of an image's patches, a small decoder says what the others were.

"Masked Autoencoders Are Scalable Vision Learners", He et al. 2021,
https://arxiv.org/abs/2111.06377, section 3, and its published code.

    for images of a batch:
        remove all but floor((1 - mask_ratio) n) of n patches, at least one stays
        x = encoder(visible patches + positions)                 nothing in the others' places
        x = decoder_embed(x); a learned token in the place of every removed patch
        y = decoder_pred(norm(blocks(x + positions)))            the pixels of every patch
        t = (pixels - mean) / sqrt(var + 1e-6) of each patch     norm_pix; var unbiased
        loss = mean over images of the mean over removed patches of mean (y - t)^2

Positions of the decoder are fixed sines and cosines. What is removed is a function of the image's
key, which is one of seed, epoch and image (`modules.masking`), so micro-batches, devices and packs
have no say. Tokens before the patches (class token, registers) go through the decoder as well. Of
packs (`datamodules.PackedDataModule`) the visible tokens are laid into shorter rows, all of one
length, and the decoder runs on the whole ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.host import log_mean, log_number
from callbacks.tally import Tally
from datamodules.batch import ImageBatch, Images, MultiCropBatch, PackedBatch, PackedImages
from datamodules.module import Needs, SourceDataModule
from modules import optim
from modules.backbones import Backbone, Features, Visible, initialise
from modules.backbones.attention import Segments
from modules.backbones.layers import POOLING, Block
from modules.backbones.positions import SinCos2D
from modules.backbones.resampling import MAX_GRID
from modules.checks import check_at_least, check_precision, check_visible
from modules.drawing import pictures_of
from modules.masking import SHAPES, Mask, Shape, Tokens, mask_by, num_visible, row_length, scores
from modules.networks import AroundBackbone, embed
from modules.optim import Optimization
from modules.reconstruction import reconstruction

OPTIMIZATION = Optimization(
    base_lr=1.5e-4,
    reference_batch=256,
    weight_decay=0.05,
    beta2=0.95,
    warmup_epochs=40,
    min_lr=0.0,
)


Batch = ImageBatch | PackedBatch | MultiCropBatch  # the last of which is refused


class Autoencoder(AroundBackbone):
    """A backbone as the encoder, and the decoder, under the published names.

    Args: those of `MAE`.
    """

    def __init__(
        self,
        backbone: Backbone,
        mask_ratio: float = 0.75,
        mask_shape: Shape = "random",
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        check_visible(backbone)
        check_at_least(1, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {mask_ratio}; expected within (0, 1)")
        if mask_shape not in SHAPES:
            raise ValueError(f"mask_shape is {mask_shape!r}; expected one of {', '.join(SHAPES)}")
        width = backbone.in_channels * backbone.patch_size**2
        if norm_pix and width < 2:
            raise ValueError("norm_pix needs patches of several values; set it to false")
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.mask_ratio, self.mask_shape, self.norm_pix = mask_ratio, mask_shape, norm_pix
        self.decoder_embed = nn.Linear(backbone.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        height, columns = backbone.image_size or (self.patch_size, self.patch_size)
        grid = (height // self.patch_size, columns // self.patch_size)
        self.decoder_positions = SinCos2D(decoder_dim, grid, backbone.num_prefix_tokens, False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, 4 * decoder_dim) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, 1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, width)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            initialise.mae(part)
        nn.init.normal_(self.mask_token, std=0.02)
        for name, parameter in backbone.named_parameters():
            if name.startswith(POOLING):  # the decoder reads patches
                parameter.requires_grad = False

    def forward(self, images: Images, mask: Mask) -> tuple[Float[Tensor, " m"], Features]:
        """The loss of every image, and what the encoder made of its visible patches."""
        features = self.forward_encoder(images, mask)
        predicted = self.forward_decoder(features.patches, mask)
        return self.forward_loss(images, predicted, mask), features

    def mask(self, images: Images, keys: Int[Tensor, " m"]) -> Mask:
        """What is removed of images whose keys these are."""
        tokens, ratio = self.tokens(images), self.mask_ratio
        return self.mask_by(images, scores(self.mask_shape, tokens, keys, ratio), tokens)

    def mask_by(self, images: Images, scores: Float[Tensor, "rows n"], tokens: Tokens) -> Mask:
        """The patches of the highest scores are removed."""
        if isinstance(images, Tensor):
            count = tokens.is_patch.shape[1] - self.backbone.num_prefix_tokens
            if count < 2:
                raise ValueError(
                    "images of one patch leave nothing to predict; make them larger, or the "
                    "backbone's patch_size smaller"
                )
            kept = self.backbone.num_prefix_tokens + num_visible(count, self.mask_ratio)
        else:
            kept = row_length(images, self.mask_ratio)
        return mask_by(scores, tokens, self.mask_ratio, kept)

    def tokens(self, images: Images) -> Tokens:
        if not isinstance(images, Tensor):
            return Tokens.of_pack(Segments(images))
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        prefix = self.backbone.num_prefix_tokens
        return Tokens.of_grid(len(images), grid, prefix, images.device)

    def forward_encoder(self, images: Images, mask: Mask) -> Features:
        """Of the visible patches alone."""
        visible: Visible | PackedImages
        if isinstance(images, Tensor):
            prefix = self.backbone.num_prefix_tokens
            visible = Visible(images, mask.places[:, prefix:] - prefix)
        else:
            visible = mask.shorter(images)
        features: Features = self.backbone(visible)
        return features

    def forward_decoder(
        self, x: Float[Tensor, "rows kept d"], mask: Mask
    ) -> Float[Tensor, "rows n e"]:
        """A prediction for every token; of those that are no patches it means nothing."""
        where = mask.tokens.where
        segments = where if isinstance(where, Segments) else None
        x = mask.whole(self.decoder_embed(x), self.mask_token)
        x = x + self.decoder_positions(where)
        for block in self.decoder_blocks:
            x = block(x, None, segments)
        out: Tensor = self.decoder_pred(self.decoder_norm(x))
        return out

    def forward_loss(
        self, images: Images, predicted: Float[Tensor, "rows n e"], mask: Mask
    ) -> Float[Tensor, " m"]:
        """Of every image the mean squared error of its removed patches."""
        with torch.autocast(predicted.device.type, enabled=False):
            wide = torch.promote_types(predicted.dtype, torch.float32)
            target = self.patchify(images).to(wide)
            if self.norm_pix:
                mean, std = mean_and_std(target)
                target = (target - mean) / std
            error = (predicted.to(wide) - target).square().mean(dim=-1)
            return mask.mean(error)

    def patchify(self, images: Images) -> Float[Tensor, "rows n e"]:
        """The pixels of every token in the order (row, column, channel); zeros before patches."""
        p = self.patch_size
        if not isinstance(images, Tensor):
            return rearrange(images.patches, "r n (c p q) -> r n (p q c)", p=p, q=p)
        patches = rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", p=p, q=p)
        return nn.functional.pad(patches, (0, 0, self.backbone.num_prefix_tokens, 0))

    def unpatchify(
        self, patches: Float[Tensor, "b n e"], grid: tuple[int, int]
    ) -> Float[Tensor, "b c height width"]:
        """Images of one size out of what `patchify` makes of them."""
        own, p = patches[:, self.backbone.num_prefix_tokens :], self.patch_size
        pattern = "b (y x) (p q c) -> b c (y p) (x q)"
        return rearrange(own, pattern, y=grid[0], x=grid[1], p=p, q=p)

    @torch.no_grad()
    def picture(
        self,
        images: Float[Tensor, "b c height width"],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Float[Tensor, "3 rows columns"]:
        """`modules.reconstruction` of images, each masked the same way every time."""
        mask = self.mask(images, torch.arange(len(images), device=images.device))
        predicted = self.forward_decoder(self.forward_encoder(images, mask).patches, mask).float()
        if self.norm_pix:  # by the mean and deviation of what is to be predicted
            center, scale = mean_and_std(self.patchify(images).float())
            predicted = predicted * scale + center
        grid = mask.tokens.where
        assert isinstance(grid, tuple)
        removed = mask.is_removed[:, self.backbone.num_prefix_tokens :]
        removed = removed.view(-1, 1, *grid)
        return reconstruction(images, self.unpatchify(predicted, grid), removed, mean, std)


def mean_and_std(
    patches: Float[Tensor, "rows n e"],
) -> tuple[Float[Tensor, "rows n 1"], Float[Tensor, "rows n 1"]]:
    """Mean and standard deviation of each patch over all its values; the variance is unbiased."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class MAE(LightningModule):
    """Trains a backbone without labels, by predicting the pixels of patches that it does not see.

    Logs `train/loss` and `schedule/lr`, and of held-out images, masked the same way every time,
    `val/loss`.

    Args:
        backbone: an encoder that `takes_visible`; published with `init: mae` and fixed sin-cos
            positions. What pools (attention pooling, `fc_norm`) is not trained, so take pooling
            "cls" or "norm_avg".
        optimizer: how to optimise; class and mask token decay, as published.
        mask_ratio: share of the patches that are removed.
        mask_shape: "random" patches, a "block" or several, or a "grid" that regularly leaves one
            of four.
        norm_pix: the target is each patch normalised by its own mean and variance.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: their attention heads.

    Raises:
        ValueError: values out of range, or data that gives several views.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Optimization = OPTIMIZATION,
        mask_ratio: float = 0.75,
        mask_shape: Shape = "random",
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run's config.yaml has them
        self.optimization = optimizer
        masking = (mask_ratio, mask_shape, norm_pix)
        decoder = (decoder_dim, decoder_depth, decoder_heads)
        self.autoencoder = Autoencoder(backbone, *masking, *decoder)
        self.tally = Tally()

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SourceDataModule):
            needs = Needs.of(self.autoencoder.backbone)
            # The decoder's positions have an end as well.
            data.fit_to(needs._replace(max_grid=min(needs.max_grid or MAX_GRID, MAX_GRID)))

    def networks(self) -> dict[str, Autoencoder]:
        """What can be judged."""
        return {"autoencoder": self.autoencoder}

    def embed(self, images: Images, network: str | None = None) -> Float[Tensor, "b d"]:
        """One vector an image, of the encoder that sees all patches; for callbacks that judge."""
        return embed(self.networks(), images, network)

    def pictures(
        self, images: Float[Tensor, "b c height width"]
    ) -> dict[str, Float[Tensor, "3 rows columns"]]:
        """Reconstructions, and what `modules.drawing.pictures_of` draws of the encoder."""
        data: SourceDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        drawn = {"reconstruction": self.autoencoder.picture(images, data.mean, data.std)}
        return drawn | pictures_of(self.autoencoder.backbone, images, data.mean, data.std)

    def forward(self, images: Images) -> Float[Tensor, "b d"]:
        return self.embed(images)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses, features = self.losses(batch)
        loss = batch.mean(losses)
        log_mean(self, "train/loss", loss, batch.num_images)
        return {"loss": loss, "embedding": features.pooled.detach()}

    def losses(self, batch: Batch) -> tuple[Float[Tensor, " b"], Features]:
        if isinstance(batch, MultiCropBatch):
            raise ValueError(
                "MAE takes one view of an image, and the data gives several; set data.class_path "
                "to datamodules.ImageDataModule or datamodules.PackedDataModule"
            )
        mask = self.autoencoder.mask(batch.images, batch.keys)
        out: tuple[Tensor, Features] = self.autoencoder(batch.images, mask)
        return out

    def validation_step(self, batch: ImageBatch | PackedBatch, batch_idx: int) -> None:
        losses, _ = self.losses(batch)
        self.tally.add(torch.where(batch.is_valid, losses, 0.0).sum(), batch.is_valid.sum())

    def on_validation_epoch_end(self) -> None:
        loss, count = self.tally.totals(self)
        if count == 0:
            raise ValueError("no image of the validation set could be read")
        self.log("val/loss", loss / count, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.build(self.optimization, self.autoencoder)

    def on_train_start(self) -> None:
        self.lr = optim.learning_rate(self.optimization, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step, (optimizer,) = self.trainer.global_step, self.trainer.optimizers
        lr = self.lr.at(step)
        optim.set_lr(optimizer, lr)
        optim.set_weight_decay(optimizer, self.optimization, step, self.lr.total)
        log_number(self, "schedule/lr", lr)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is not None:
            raise ValueError("set optimizer.clip_norm of the model, not trainer.gradient_clip_val")
        optim.clip(self.optimization, self.autoencoder.parameters())
