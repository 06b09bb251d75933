"""FSDP with mixed precision, on one rank: a carried state stays in float32."""

import copy

import pytest
import torch
import torch.distributed as dist
from laws import leaves
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from fwp.models import Decoder, DecoderConfig
from fwp.nn import PRESETS, Block, FastWeightAttention, FastWeightRNN, SlowFastNet, Stateful

E, H = 8, 2


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Own(Stateful):
    """A model of one's own around a layer."""

    def __init__(self):
        super().__init__()
        self.layer = FastWeightAttention(E, H, "delta", feature_norm="l2")

    def forward(self, x, state=None):
        return self.layer(x, state=state)


class Checkpointed(nn.Module):
    """A wrapper that recomputes what it wraps, as is put around blocks before they are sharded."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False)


def checkpointed():
    model = Decoder(DecoderConfig(11, E, 2, H))
    model.blocks[0], model.blocks[1].mixer = Checkpointed(model.blocks[0]), Checkpointed(model.blocks[1].mixer)
    return model


MODELS = {
    "checkpointed": checkpointed,
    "decoder": lambda: Decoder(DecoderConfig(11, E, 2, H)),
    "rwkv7": lambda: PRESETS["rwkv7"](E, H),
    "own": Own,
    "slow-fast": lambda: SlowFastNet(nn.Linear(E, E + 4), nn.Linear(E, 3), update="additive"),
    "recurrent": lambda: FastWeightRNN(E, 4),
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_state_keeps_its_dtype_between_calls(mesh, name, output_dtype):
    torch.manual_seed(0)
    plain = MODELS[name]()
    for p in plain.parameters():
        nn.init.normal_(p)
    model, plain = copy.deepcopy(plain), plain.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
    for part in [*model.modules()][:0:-1]:
        if isinstance(part, Block | Checkpointed):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    ids = isinstance(plain, Decoder)
    xs = [torch.randint(11, (2, 3)) if ids else torch.randn(2, 3, E) for _ in range(3)]
    found, truth = None, None
    for x in xs:
        y, found = model(x, found)
        wanted, truth = plain(x if ids else x.bfloat16(), state=truth)
        assert torch.equal(y, wanted)
        for a, b in zip(leaves(found), leaves(truth), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    (y.float().sum()).backward()  # through the states alone into the first two calls
    wanted.float().sum().backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.requires_grad:
            assert torch.equal(p.grad.full_tensor().bfloat16(), q.grad), key
    if ids:
        assert torch.equal(model.generate(xs[0], 4, temperature=0), plain.generate(xs[0], 4, temperature=0))
