"""Methods that a recipe can name, one file each.

    supervised.py      Supervised     cross-entropy on labels, with everything DeiT adds to it
    token_labeling.py  TokenLabeling  LV-ViT and ReLabel: a teacher's label for every token
    dino.py            DINO           self-distillation of several views, without labels
    moco.py            MoCo           MoCo v3: two views of an image against all other images
    mae.py             MAE            a masked autoencoder: predicts the pixels of removed patches
    seq2seq.py         Seq2Seq        recurrent encoder and decoder of texts, with attention
    transformer.py     Transformer    the Transformer of texts
    probe.py           LinearProbe    linear heads on a frozen backbone, as MAE and DINO are judged

and what they share: `optim`, `lars`, `schedules`, `losses`, `scores`, `token_loss`, `dino_loss`,
`ibot`, `masking`, `checks`, `networks`, `distillation`, `weights`, `backbones`, for texts
`translation`, `decoding`, `alignment` and `multihead`, and, to look inside, `analysis`, `drawing`
and `reconstruction`. `sharding` registers `trainer.strategy: sharded`, `synced` batch norms.
"""

from jsonargparse import set_parsing_settings

from modules.dino import DINO
from modules.mae import MAE
from modules.moco import MoCo
from modules.probe import LinearProbe
from modules.seq2seq import Seq2Seq
from modules.sharding import Sharded  # noqa: F401 - registers its name
from modules.supervised import Supervised
from modules.token_labeling import TokenLabeling
from modules.transformer import Transformer

# A config or a checkpoint may name classes of these packages and no others: whatever else it
# names is refused before it is imported, since importing a module runs it. The parts of torch
# that compile, download or unpickle code are no part of a recipe either.
set_parsing_settings(
    import_path_denylist=[
        *("*", "torch.hub", "torch.package", "torch.load", "torch.serialization"),
        *("torch.utils.cpp_extension", "torch.utils.model_zoo"),
    ],
    import_path_allowlist=[
        *("modules", "datamodules", "callbacks"),
        *("torch", "torchvision", "timm", "lightning"),
    ],
    instantiate_subclass_spec_in_any=False,
)

__all__ = [
    "DINO",
    "MAE",
    "LinearProbe",
    "MoCo",
    "Seq2Seq",
    "Supervised",
    "TokenLabeling",
    "Transformer",
]
