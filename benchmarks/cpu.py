"""Which precision, attention and layout of convolutions is the fastest on this CPU?

    python -m benchmarks.cpu --threads 1

Times, forward and backward, in turn, in float32 and in bfloat16: a linear layer, a whole block of the encoder and one of the
segmenter's convolutions; the encoder's attention fused and written out; the convolution contiguous and channels-last, by oneDNN and
without it. `compute.precision: auto` measures the block (milan/training/device.py); the rest says whether our fixed choices,
fused attention in float32 alone and channels-last in the segmenter, suit this machine too.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.parts import heads
from milan.params import Model
from milan.training.device import CANDIDATES, autocast, choose_attention

CPU = torch.device("cpu")
Ways = dict[str, Callable[[], object]]


def forward_and_backward(layer: Callable[[Tensor], Tensor], inputs: Tensor, precision: str) -> None:
    with autocast(precision, CPU):
        outputs = layer(inputs)
    outputs.backward(torch.ones_like(outputs))


def products(model: Model, batch: int) -> dict[str, Ways]:
    """A linear layer and a block of the encoder, by precision."""
    width, images = model.encoder.embed_dim, torch.randn(batch, 1 + model.n_patches, model.encoder.embed_dim)
    linear, ways = nn.Linear(width, 4 * width), {f"linear {width} to {4 * width}": {}, "block": {}}
    for precision in CANDIDATES:
        choose_attention(precision, CPU)
        layers = linear, Block(width, model.encoder.num_heads, qkv_bias=True)
        for case, layer in zip(ways.values(), layers, strict=True):
            case[precision] = lambda layer=layer, precision=precision: forward_and_backward(layer, images, precision)
    return ways


def attention(model: Model, batch: int) -> dict[str, Ways]:
    """Attention over the visible and over all tokens."""
    count, width = model.encoder.num_heads, model.encoder.embed_dim
    cases = {}
    for tokens in (1 + model.n_patches // 4, 1 + model.n_patches):
        case = cases.setdefault(f"attention, {tokens} tokens", {})
        for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            q, k, v = (heads(batch, tokens, count, width // count, CPU, dtype).requires_grad_() for _ in range(3))

            def fused(q=q, k=k, v=v) -> Tensor:
                return nn.functional.scaled_dot_product_attention(q, k, v)

            def written_out(q=q, k=k, v=v) -> Tensor:
                return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v

            for name, way in (("fused", fused), ("written out", written_out)):
                case[f"{precision}, {name}"] = lambda way=way, q=q: way().backward(torch.ones_like(q))
    return cases


def convolution(batch: int, channels: int, side: int) -> dict[str, Ways]:
    """One convolution of the segmenter's neck."""
    case = {}
    for layout, form in {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}.items():
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=form)
        maps = torch.randn(batch, channels, side, side).to(memory_format=form).requires_grad_()
        for precision in CANDIDATES:

            def once(layer=layer, maps=maps, precision=precision) -> None:
                forward_and_backward(layer, maps, precision)

            def without_onednn(once=once) -> None:
                with torch.backends.mkldnn.flags(enabled=False):
                    once()

            case |= {f"{precision}, {layout}": once, f"{precision}, {layout}, no oneDNN": without_onednn}
    return {f"convolution 3 x 3, {channels} channels, {side} x {side}": case}


def main() -> None:
    parser = measure.arguments(__doc__, repeats=7)
    parser.add_argument("--model", choices=measure.MODELS, default="vit_b16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=96, help="of the convolution (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = measure.MODELS[args.model]
    cases = products(model, args.batch) | attention(model, args.batch) | convolution(args.batch, args.channels, 16)
    rows = []
    for case, ways in cases.items():
        seconds = measure.in_turn(ways, args.repeats, CPU, warm=2)
        base = measure.median(next(iter(seconds.values())))
        for way, values in seconds.items():
            took = measure.median(values)
            row = {"case": f"{case}: {way}", "ms a step": 1000 * took, "against the first": base / took}
            rows.append(row | {"± %": measure.spread(values)})
    about = {**measure.machine(CPU), "model": args.model, "batch": args.batch}
    measure.show("Precision, attention and layout on a CPU", rows, about, args.json)


if __name__ == "__main__":
    main()
