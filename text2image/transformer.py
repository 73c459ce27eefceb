"""Stable Diffusion 3's transformer (MM-DiT) as a velocity network, in two memory recipes, and what they need.

The recipes: three transformers (teacher, online flow, generator), or one frozen base with two LoRA adapters.
The transformer itself is diffusers' SD3Transformer2DModel, unchanged.
"""

import contextlib

import torch
from torch import nn

import fgm
from text2image.pipeline import numbers_in
from text2image.prompts import ENCODERS, described, load_component
from training.run import GATHERED_WHOLE, shard
from training.sizes import check_memory, memory_of

# ---- SD3's transformer as a velocity network ---------------------------------------------------------------

FEATURE_BLOCK = 2  # from 0; appendix B.2 lets the discriminator see "layer 2"


class SD3Velocity(nn.Module):
    """An SD3Transformer2DModel as net(x, t, encoder_hidden_states=..., pooled_projections=...) -> v.

    x, v: [B, 16, H, W], t: [B]. SD3's sigma is our t, its timestep 1000 t (kept in float32: bfloat16 turns
    970 into 968), its output noise - x0. With keep_features, the image tokens after block 2 of the last call,
    and its t, are kept in .features [B, H W / 4, D] and .t [B]."""

    def __init__(self, transformer, keep_features=False):
        super().__init__()
        self.net, self.features, self.t = transformer, None, None
        if keep_features:
            transformer.transformer_blocks[FEATURE_BLOCK].register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.features = output[1]

    def compile(self, **settings):
        """torch.compile each block by itself, and each layer around them: checkpointing, the adapters' switch
        and hooks (FSDP's, keep) stay outside of the graphs."""
        # A block meets 14 combinations of adapter, gradients and batch; by default dynamo gives up after 8.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for part in (*self.net.children(), *self.net.transformer_blocks):
            if "forward" not in vars(part):  # two adapters share it
                part.forward = torch.compile(part.forward, **settings)

    def forward(self, x, t, encoder_hidden_states, pooled_projections, skip_layers=None):
        self.t = t
        return self.net(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections, skip_layers=skip_layers, return_dict=False)[0]

    def features_of(self, x, t, **cond):
        """The image tokens after block 2 for another input, by a pass that stops there.

        .features and .t, those of the last call, stay as they are."""
        kept = self.features, self.t
        skipped = list(range(FEATURE_BLOCK + 1, len(self.net.transformer_blocks)))
        v = self(x, t, **cond, skip_layers=skipped)
        # FSDP gathers the outermost weights for a backward pass only where it reaches the network's output.
        found = self.features + 0 * v.mean()
        self.features, self.t = kept
        return found


# ---- One base, two adapters --------------------------------------------------------------------------------


ADAPTERS = ("flow", "generator")
SWITCH = {"on": None}  # which of them all LoRALinear layers add


@contextlib.contextmanager
def switched(name):
    """Within, the adapter `name` (None: no adapter) is on."""
    before, SWITCH["on"] = SWITCH["on"], name
    try:
        yield
    finally:
        SWITCH["on"] = before


class LoRALinear(nn.Module):
    """A frozen linear layer plus up(down(x)) of the adapter that is on (arXiv 2106.09685, alpha = rank)."""

    def __init__(self, base, lora_rank):
        super().__init__()
        self.base, inputs, outputs = base, base.in_features, base.out_features
        self.down = nn.ModuleDict({name: nn.Linear(inputs, lora_rank, bias=False) for name in ADAPTERS})
        self.up = nn.ModuleDict({name: nn.Linear(lora_rank, outputs, bias=False) for name in ADAPTERS})
        for name in ADAPTERS:
            nn.init.normal_(self.down[name].weight, std=inputs**-0.5)
            nn.init.zeros_(self.up[name].weight)

    def forward(self, x):
        y, on = self.base(x), SWITCH["on"]
        return y if on is None else y + self.up[on](self.down[on](x))


def add_lora(transformer, lora_rank):
    """Freeze a transformer; give every linear layer of its blocks' attention and feed-forward parts a LoRA
    pair for each adapter."""
    transformer.requires_grad_(False)
    for block in transformer.transformer_blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not path.startswith("norm"):
                block.set_submodule(path, LoRALinear(module, lora_rank))


class Adapter(nn.Module):
    """A shared SD3Velocity with one adapter on (name None: all off, the teacher).

    Its parameters are those of its adapter alone; paths are the linear layers that these belong to."""

    def __init__(self, velocity, name):
        super().__init__()
        self.shared = [velocity]  # in a list, so that the shared weights are nobody's parameters
        self.name = name
        modules = velocity.net.named_modules() if name else ()
        pairs = {path: module for path, module in modules if isinstance(module, LoRALinear)}
        self.paths = list(pairs)
        self.down = nn.ModuleList(module.down[name] for module in pairs.values())
        self.up = nn.ModuleList(module.up[name] for module in pairs.values())

    def forward(self, x, t, **cond):
        with switched(self.name):
            return self.shared[0](x, t, **cond)

    def compile(self, **settings):
        self.shared[0].compile(**settings)

    features = property(lambda self: self.shared[0].features)
    t = property(lambda self: self.shared[0].t)

    def features_of(self, x, t, **cond):
        with switched(self.name):
            return self.shared[0].features_of(x, t, **cond)


# ---- The three networks of Algorithm 1 ---------------------------------------------------------------------


def checkpoint_blocks(transformer):
    """Recompute each block in the backward pass, with the adapter that was on in the forward pass."""

    def checkpointed(block, *inputs):
        name = SWITCH["on"]

        def recompute(*inputs):
            with switched(name):
                return block(*inputs)

        return torch.utils.checkpoint.checkpoint(recompute, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def networks(folder, lora_rank, checkpointing, bf16, device, keep_features=False):
    """(teacher, online flow, net of the generator) of a pipeline's folder, sharded over the processes.

    lora_rank None or 0: three transformers; otherwise one, with two LoRA adapters. keep_features: of the
    online flow. What never trains is held in bfloat16 where the passes are (bf16); what trains in float32."""

    def load(dtype, keep_features):
        return SD3Velocity(load_component(folder, "transformer", dtype).to(device), keep_features)

    frozen_dtype = torch.bfloat16 if bf16 else torch.float32
    if lora_rank:
        shared = load(frozen_dtype, keep_features)
        add_lora(shared.net, lora_rank)
        velocities = (shared.to(device),)
    else:
        teacher = load(frozen_dtype, False).requires_grad_(False)
        velocities = (teacher, load(torch.float32, keep_features), load(torch.float32, False))
    for velocity in velocities:
        if checkpointing:
            checkpoint_blocks(velocity.net)
        shard(velocity, velocity.net.transformer_blocks, bf16)
    return tuple(Adapter(shared, name) for name in (None, *ADAPTERS)) if lora_rank else velocities


# ---- The memory of a step ----------------------------------------------------------------------------------

# What a block keeps for its backward pass, in numbers of its width d per token: normed inputs, q k v, the
# attention's output, 4 d twice in the feed-forward part, ...; more for norms of q and k; a second attention
# (image tokens alone). Without gradients of weights inputs of linear layers are not kept. Norms are float32.
KEPT = {"in training": (21, 4, 6), "with adapters": (17, 2, 5), "frozen": (10, 2, 4)}
KEPT_IN_BF16 = {"in training": (27, 10, 6), "with adapters": (21, 6, 5), "frozen": (14, 6, 4)}
WORKING = 8  # in use besides, inside a block's backward pass


def memory_estimate(config, lora_rank, checkpointing, bf16, micro_batch, height, width, text_tokens, guidance,
                    processes, ema, shared=True, together=False):
    """Bytes a process needs at the peak of a step, by arithmetic: {what: bytes}.

    config: the transformer's; height, width: of the latents. shared: one pass of the flow serves both players
    (t_flow is t_generator, no GAN); together: the graphs of flow and teacher live together (l1_weight is not
    1, without two_graphs). The generator's graph lives through the step, and so do the gradients of generator
    and flow. With checkpointing a graph is the inputs of blocks, one block at work."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(config)
        weights = trained = sum(p.numel() for p in net.parameters())
        places = sum(buffer.numel() for buffer in net.buffers())  # the table of positions
        if lora_rank:
            add_lora(net, lora_rank)
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad) // len(ADAPTERS)
    if 4 * weights < GATHERED_WHOLE:
        processes = 1  # each holds a replica
    number = 2 if bf16 else 4  # bytes of an activation, and of a frozen weight

    # Frozen weights; weights and Adam's second moment (beta1 is 0) of flow and generator; one's average.
    state = weights * number + 2 * trained * 8 + trained * (4 if ema else 0)
    tables = places * (number if lora_rank else number + 8)  # every network has its own
    unsharded = 2 * weights / config["num_layers"] * number if processes > 1 else 0

    d, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    dual = len(config.get("dual_attention_layers") or ())
    image_tokens = height * width // config["patch_size"] ** 2
    tokens = image_tokens + text_tokens

    def graph(recipe, samples=1, casts=bf16 and not lora_rank and processes == 1):
        """(bytes kept, at work in its backward pass) of a network's graph, for a micro-batch."""
        block, norms, second = (KEPT_IN_BF16 if bf16 else KEPT)[recipe]
        if config.get("qk_norm"):
            block, second = block + norms, second + norms
        kept = block * (layers * tokens - text_tokens // 2)  # the last block only reads the text
        kept += second * dual * image_tokens
        work, copies = WORKING * tokens, 2 * weights if casts else 0  # of weights, in bfloat16
        if checkpointing:
            work += block * tokens + second * image_tokens * (dual > 0)
            kept, copies = layers * tokens, copies / 2
        bytes_each = d * samples * micro_batch * number
        return kept * bytes_each + copies, work * bytes_each

    # The graphs that live together; the last one is differentiated.
    learning = graph("with adapters" if lora_rank else "in training")
    teacher = graph("frozen", 2 if guidance != 1 else 1, casts=False)
    flow = learning if shared else graph("frozen")
    read = (flow, teacher) if together else (teacher,)
    moments = [(learning,), (learning, learning), (learning, *read)]
    activations = max(sum(kept for kept, _ in graphs) + graphs[-1][1] for graphs in moments)
    return {
        "weights, Adam, EMA": state / processes + tables,
        "gradients": 8 * trained / processes,
        "unsharded blocks": unsharded,
        "activations": activations,
    }


def memory_around(folder, bf16, size, state):
    """Bytes a process needs at the peaks before, between and after the steps, by arithmetic: {phase: bytes}.

    size: (H, W) of an image; state: bytes that stay beside a picture. Text encoders, transformer and VAE are
    never there together. The decoder's peak is in its last block, whose first layer holds its input, that
    normalised and that activated, or, where it has no more channels than the rest, in a layer's end.
    Activations of text encoders, and of the transformer without gradients, are not counted."""
    number = 2 if bf16 else 4
    text = sum(numbers_in(folder / name) for name in ENCODERS if (folder / name).is_dir())
    channels = described(folder, "vae").config.block_out_channels
    decoding = size[0] * size[1] * max(3 * channels[min(1, len(channels) - 1)], 5 * channels[0])
    vae = (numbers_in(folder / "vae") + decoding) * number
    return {
        "encoding prompts": text * number,
        "a picture": state + vae,
        "the scores": max(numbers_in(folder / "transformer") * number, vae),
    }


def print_memory(args, folder, config, shape, bf16, device):
    """The memory that a process of sd3.py needs, by phase and within a step. args: its settings;
    config: the transformer's; shape: of a latent.

    Raises InputError if half of it is more than the device has: it is an estimate."""
    text_tokens = 77 + 256  # CLIP's and T5's; the miniature has 16 + 256
    shared = list(args.t_flow) == list(args.t_generator) and not args.real
    together = args.l1_weight != 1 and not args.two_graphs
    processes = fgm.world_size()
    step = memory_estimate(
        config, args.lora, args.checkpointing, bf16, args.micro_batch or args.batch // processes, *shape[1:],
        text_tokens, args.guidance, processes, args.ema is not None, shared, together)
    phases = {"a step": sum(step.values())}
    check_memory(f"a step with --lora {args.lora}", phases["a step"] / 2, device)
    kept = step["weights, Adam, EMA"] + step["gradients"]
    phases |= memory_around(folder, bf16, (args.height, args.width), kept)
    peak = max(phases, key=phases.get)
    for title, parts in ((f"{phases[peak] / 1e9:.2f} GB, in {peak}", phases), ("a step", step)):
        listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value)
        print(f"memory per process, estimated: {title} ({listed})")
    if device.type == "cuda" and phases[peak] > (available := memory_of(device)):
        print(f"that is more than the {available / 1e9:.0f} GB of the device: "
              "try --lora 64, --micro-batch 1, --checkpointing, a smaller size, or more processes")
