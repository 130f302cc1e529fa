"""Compiles masks, the student that sees them and the loss, and says how often."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from datamodules.sampling import fold
from modules.dino_loss import same_loss
from modules.ibot import MaskedPatches, hide
from tests import views

if __name__ == "__main__":
    torch.set_num_threads(1)
    how = MaskedPatches()
    module = views.method(masked_patches=how)
    crops = (torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))

    def step(keys: torch.Tensor) -> torch.Tensor:
        hidden = hide(how, keys, (4, 4))
        with torch.no_grad():
            taught = module.teacher.read(module.teacher(crops[:1]).patches, hidden)
        seen, weight = module.student.read(module.student(crops, hidden.is_masked).patches, hidden)
        z, prototypes = taught
        targets = module.patch_loss.center.targets(z.flatten(0, 1)[None], prototypes, 0.04)
        return hidden.mean(same_loss(seen.flatten(0, 1), weight, targets, 0.1)).mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for first in range(4):
        keys = torch.tensor([fold(0, first, i) for i in range(3)])
        loss = compiled(keys)
        loss.backward()
    print(counter.frame_count)
