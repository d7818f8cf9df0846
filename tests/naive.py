"""The update as papers' code is mostly written, for tests to hold ours against, and benchmark.py.

The same mathematics in float32 and the default layout: R_M frame by frame, a backward pass for each
term, the discriminators' gradients computed and thrown away in the generator's step, an Adam for
each network, losses fetched every epoch.
"""

import copy

import torch
from torch import nn

REAL_LABEL, FAKE_LABEL = (0.9, 0.0)
BETAS = (0.5, 0.999)


class NaiveTrainer:
    """The four networks of a Trainer, from its weights on, trained in the naive way.

    It shares with the Trainer the networks and the sampling of batches, and no other code.
    """

    def __init__(self, trainer, lr=2e-4):
        self.device, self.sample_batch = trainer.device, trainer.sample_batch
        self.networks = {name: copy.deepcopy(net) for name, net in trainer.networks.items()}
        for network in self.networks.values():
            for param in network.requires_grad_(True).parameters():
                param.data = param.data.contiguous()
        self.adams = {
            name: torch.optim.Adam(net.parameters(), lr, BETAS, foreach=False, fused=False)
            for name, net in self.networks.items()
        }

    def update(self, real, noise, frame_idx, _=None):
        """The update of the paper, section 3.2. Returns the four losses: a dict of floats."""
        R_M, G_I, D_I, D_V = (self.networks[name] for name in ("R_M", "G_I", "D_I", "D_V"))
        z_content, e, h0 = noise
        real_windows, real_frames = (
            (x.to(e.dtype) / 127.5 - 1).contiguous() for x in (real.windows, real.frames)
        )
        state, points = h0, []
        for k in range(e.shape[1]):
            state = R_M(e[:, k : k + 1], state)[:, 0]
            points.append(torch.cat([z_content, state], dim=1))
        path = torch.stack(points, dim=1)
        z = path.gather(1, frame_idx[:, :, None].expand(-1, -1, path.shape[2]))
        generated = G_I(z.reshape(-1, z.shape[2], 1, 1))
        generated = generated.reshape(*frame_idx.shape, *generated.shape[1:])
        fake_windows = generated[:, :-1].transpose(1, 2).contiguous()
        fake_frames = generated[:, -1].contiguous()

        bce = nn.BCELoss()
        real_label = e.new_full((len(e),), REAL_LABEL)
        fake_label = e.new_full((len(e),), FAKE_LABEL)
        losses = {}
        for kind, name, D, x, x_fake in (
            ("image", "D_I", D_I, real_frames, fake_frames),
            ("video", "D_V", D_V, real_windows, fake_windows),
        ):
            self.adams[name].zero_grad()
            on_real = bce(D(x), real_label)
            on_real.backward()
            on_fake = bce(D(x_fake.detach()), fake_label)
            on_fake.backward()
            self.adams[name].step()
            losses[f"loss_d_{kind}"] = (on_real + on_fake).item()
        self.adams["G_I"].zero_grad()
        self.adams["R_M"].zero_grad()
        for kind, D, x_fake in (("image", D_I, fake_frames), ("video", D_V, fake_windows)):
            loss = bce(D(x_fake), real_label)
            loss.backward(retain_graph=True)
            losses[f"loss_g_{kind}"] = loss.item()
        self.adams["G_I"].step()
        self.adams["R_M"].step()
        return losses
