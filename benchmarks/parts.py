"""What would another way to compute one part of the step save?

    python -m benchmarks.parts
    python -m benchmarks.parts --model tiny --batch 2

Times each part alone, its ways in turn, and gives the milliseconds of all its calls in a step: attention by shape and
backend, the teacher's importance, the embedding of patches, the prompts' gradient, AdamW over one flat buffer, and the teacher's linear layers in
float8 (products alone; benchmarks/teacher.py has the whole). A way that the device does not have is left out.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure
from benchmarks.step import FEATURES, MILAN
from milan.data.patches import PatchConvolution
from milan.method import masking
from milan.method.decoder import PromptingDecoder
from milan.method.model import MaskedPretraining
from milan.params import Model
from milan.teacher.towers import mean_attention
from milan.training import optim
from milan.training.device import DTYPES

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "written out": SDPBackend.MATH,
}
Ways = dict[str, Callable[[], object]]


def heads(batch: int, length: int, count: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, heads, L, d), laid out as a projection leaves it."""
    return torch.randn(batch, length, count, dim, device=device, dtype=dtype).transpose(1, 2)


def attention(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    e, d, n = model.encoder, model.decoder, model.n_patches
    kept = masking.n_visible(n, 0.75)
    shapes = {  # calls, queries, keys, heads, width of a head, with gradient
        "attention, student": (e.depth, 1 + kept, 1 + kept, e.num_heads, e.embed_dim // e.num_heads, True),
        "attention, decoder": (d.depth, n - kept, 1 + n, d.num_heads, d.embed_dim // d.num_heads, True),
        "attention, teacher": (e.depth, 1 + n, 1 + n, e.num_heads, e.embed_dim // e.num_heads, False),
    }
    for name, (calls, queries, keys, count, dim, trained) in shapes.items():
        q, k, v = (heads(batch, length, count, dim, device, dtype) for length in (queries, keys, keys))
        upstream = heads(batch, queries, count, dim, device, dtype)
        for tensor in (q, k, v):
            tensor.requires_grad_(trained)

        def once(q=q, k=k, v=v, upstream=upstream, trained=trained) -> None:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            if trained:
                torch.autograd.grad(mixed, (q, k, v), upstream)

        def by(backend: SDPBackend, once=once) -> None:
            with sdpa_kernel(backend):
                once()

        ways = {"torch's": once, **{word: lambda by=by, b=b: by(b) for word, b in BACKENDS.items()}}
        yield name, calls, ways


def importance(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    e = model.encoder
    dim = e.embed_dim // e.num_heads
    query, keys = (heads(batch, length, e.num_heads, dim, device, dtype) for length in (1, 1 + model.n_patches))

    def low() -> Tensor:
        return (query @ keys.transpose(-2, -1)).float().mul(dim**-0.5).softmax(dim=-1).mean(dim=1)

    yield "importance", 1, {"as it is": lambda: mean_attention(query, keys), "product in low precision": low}


def patches(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    conv = nn.Conv2d(3, model.encoder.embed_dim, model.patch_size, model.patch_size).to(device, dtype)
    product = copy.deepcopy(conv)
    product.__class__ = PatchConvolution
    images = torch.randn(batch, 3, model.image_size, model.image_size, device=device, dtype=dtype)
    yield "patches, teacher", 1, {"convolution": lambda: conv(images).detach(), "product": lambda: product(images).detach()}

    def trained(layer: nn.Module) -> None:
        found = layer(images)
        torch.autograd.grad(found, layer.weight, found.detach())

    yield "patches, with gradient", 1, {"convolution": lambda: trained(conv), "product": lambda: trained(product)}


def prompts(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    d, kept = model.decoder, masking.n_visible(model.n_patches, 0.75)
    decoder = PromptingDecoder(model.encoder.embed_dim, d.embed_dim, d.depth, d.num_heads, model.grid, FEATURES).to(device, dtype)
    seen = torch.randn(batch, 1 + kept, d.embed_dim, device=device, dtype=dtype, requires_grad=True)

    def indexed(kv: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(kv[i, 0], kv[i, 1]) for i in range(len(kv))]

    def unbound(kv: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = kv.flatten(0, 1).unbind()
        return list(zip(parts[::2], parts[1::2], strict=True))

    def once(pairs: Callable[[Tensor], list[tuple[Tensor, Tensor]]]) -> None:
        weight = torch.cat([block.attn.kv.weight for block in decoder.decoder_blocks])
        kv = nn.functional.linear(seen, weight).view(batch, 1 + kept, d.depth, 2, d.num_heads, -1).permute(2, 3, 0, 4, 1, 5)
        found = [part for pair in pairs(kv) for part in pair]
        torch.autograd.grad(found, (seen, weight), [part.detach() for part in found])

    yield "prompts", 1, {"indexed": lambda: once(indexed), "unbound": lambda: once(unbound)}


def adamw(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    student = MaskedPretraining(model, MILAN, 0.75, FEATURES).to(device)
    groups = optim.decay_groups(student, 0.05)
    flat = [{**group, "params": [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]} for group in groups]
    ways = {}
    for name, these in (("as it is", groups), ("one flat buffer", flat)):
        optimizer = optim.adamw(these, (0.9, 0.95))
        for group in these:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        ways[name] = optimizer.step
    yield "AdamW", 1, ways


def float8(model: Model, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, int, Ways]]:
    width, tokens, kind = model.encoder.embed_dim, batch * (1 + model.n_patches), torch.float8_e4m3fn
    tokens -= tokens % 16
    for rows, columns in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        a, b = torch.randn(tokens, rows, device=device), torch.randn(columns, rows, device=device)
        a8, b8, a16, b16 = a.to(kind), b.to(kind), a.to(dtype), b.to(dtype)
        one, by_row, by_column = (torch.ones(shape, device=device) for shape in ((), (tokens, 1), (1, columns)))

        def scaled(scale_a, scale_b, a8=a8, b8=b8) -> Tensor:
            return torch._scaled_mm(a8, b8.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

        ways = {"as it is": lambda a16=a16, b16=b16: nn.functional.linear(a16, b16)}
        ways["one scale"] = lambda scaled=scaled, one=one: scaled(one, one)
        ways["a scale a row"] = lambda scaled=scaled, r=by_row, c=by_column: scaled(r, c)
        yield f"float8, {rows} to {columns}", model.encoder.depth, ways


PARTS = (attention, importance, patches, prompts, adamw, float8)


def possible(ways: Ways) -> Ways:
    """Those that run here."""
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = way
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name}: left out ({str(error).splitlines()[0][:100]})", flush=True)
    return found


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    parser.add_argument("--batch", type=int, default=256 if gpu else 8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model, precision = torch.device(args.device), measure.MODELS[args.model], measure.precision(args)
    rows, about = [], {**measure.machine(device), "model": args.model, "batch": args.batch, "precision": precision}
    for part in PARTS:
        for name, calls, ways in part(model, args.batch, DTYPES[precision], device):
            seconds = measure.in_turn(possible(ways), args.repeats, device, warm=2, times=10 if gpu else 1)
            base = measure.median(next(iter(seconds.values())))
            for way, values in seconds.items():
                took = measure.median(values)
                row = {"case": f"{name}: {way}", "ms a step": 1000 * calls * took, "against the first": base / took}
                rows.append(row | {"± %": measure.spread(values)})
        if args.json:
            measure.show("Parts of a step", rows, about, args.json)
    if not args.json:
        measure.show("Parts of a step", rows, about, None)


if __name__ == "__main__":
    main()
