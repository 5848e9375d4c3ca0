"""Every type of module: its output and its gradients are those of the dense changed weight, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from loratools import live
from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.live import Net, ids, net, trained

TARGETS = ["up", "down", "embed", "conv", "head"]


def replay(lora: live.Lora) -> tuple[Net, dict[str, dict[str, Tensor]]]:
    """Return a plain net whose weights are made, by plain operations, of leaf copies of the factors, and those."""
    plain, leaves = net(), {}
    for _, piece, path, _ in lora.children():
        own = {r: getattr(piece, r).detach().clone().requires_grad_() for r in piece.roles}
        leaves[path] = own
        module = plain.get_submodule(path)
        W = module.weight.detach()
        A, B = own["A"].flatten(1), own["B"].flatten(1)
        product = (B @ A).T if isinstance(module, nn.Embedding) else (B @ A).reshape(W.shape)
        changed = W + piece.scaling * product
        if "magnitude" in own:
            axes = 0 if isinstance(module, nn.Embedding) else tuple(range(1, W.dim()))
            norm = torch.linalg.vector_norm(changed.detach(), dim=axes, keepdim=True)
            changed = own["magnitude"].reshape(norm.shape) * changed / norm
        del module.weight
        module.weight = changed
    return plain, leaves


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_output_and_gradients_are_those_of_the_dense_weight(name: str, dora: bool) -> None:
    model, x = net(), ids()
    lora = trained(live.attach(model, rank=3, alpha=5, targets=[name], dora=dora, dtype=torch.float64))
    plain, leaves = replay(lora)
    model.train()
    plain.train()
    y, expected = model(x), plain(x)
    assert (y - expected).abs().max() < 1e-12
    y.square().sum().backward()
    expected.square().sum().backward()
    for _, piece, path, _ in lora.children():
        for role, leaf in leaves[path].items():
            own = getattr(piece, role).grad
            assert leaf.grad is not None
            assert (own - leaf.grad).abs().max() < 1e-12 * (1 + leaf.grad.abs().max())
            assert own.abs().max() > 0
    with torch.no_grad():
        assert (model(x) - y).abs().max() < 1e-12
        assert (model(x) - y).abs().max() < 1e-12  # with g kept from the call before


def test_inputs_of_several_adapters_in_a_row_get_their_gradient() -> None:
    model, x = net(), ids()
    trained(live.attach(model, rank=3, targets=["up", "down"], dtype=torch.float64))
    hidden = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    up = model.blocks[0]["up"]
    assert torch.autograd.gradcheck(up, (hidden,))
    up.eval()
    model(x).sum().backward()


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_drops_the_same_forward_and_backward_and_keeps_no_mask(p: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.float64))
    lora = trained(live.attach(model, rank=4, targets=["0"], dropout=p, dtype=torch.float64)).sites["0"]
    x = torch.randn(50, 64, dtype=torch.float64, requires_grad=True)
    model.train()
    kept: list[Tensor] = []
    piece = lora.lora.pieces["default"][0]
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert sorted(tuple(t.shape) for t in kept) == [(4, 64), (32, 4), (32, 64), (50, 4), (50, 64)]
    torch.manual_seed(11)
    assert torch.equal(model(x), y)
    y.sum().backward()
    # ∂x − 1·W is D∘(s·1·B·A): zero in a share p of the places, and 1/(1 − p) times the rest elsewhere.
    assert x.grad is not None
    change = x.grad - lora.weight.sum(0)
    full = piece.scaling * piece.B.sum(0) @ piece.A
    ratio = (change / full).detach()
    dropped = ratio.abs() < 1e-9
    assert abs(float(dropped.double().mean()) - p) < 0.03
    assert (ratio[~dropped] - 1 / (1 - p)).abs().max() < 1e-6
    model.eval()
    assert (
        model(x) - nn.functional.linear(x, lora.weight + piece.scaling * piece.B @ piece.A, lora.bias)
    ).abs().max() < 1e-12


def test_a_bf16_base_keeps_no_wide_copy_of_its_inputs() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32)).bfloat16().train()
    live.attach(model, rank=4, targets=["0"])
    kept: list[Tensor] = []
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert {t.dtype for t in kept if t.shape[0] == 50} == {torch.bfloat16}
    assert sum(t.numel() * t.element_size() for t in kept if t.shape[0] == 50) == 50 * (64 + 4) * 2


def test_a_slice_of_a_fused_weight_changes_its_outputs_alone() -> None:
    from loratools.adapter.model import Adapter

    class Phi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Linear(6, 18, dtype=torch.float64)
            self.config = {"model_type": "phi3"}

        def forward(self, x: Tensor) -> Tensor:
            return self.qkv_proj(x)

    torch.manual_seed(0)
    model = Phi()
    q, v = update(6, 6, 1), update(6, 6, 2)
    live.load(model, Adapter({"q_proj": q, "v_proj": v}))
    W = model.qkv_proj.weight.detach().clone()
    W[:6] += q.delta_weight().double()
    W[12:] += v.delta_weight().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = nn.functional.linear(x, W, model.qkv_proj.bias)
    assert (model(x) - expected).abs().max() < 1e-6
    y = model(x)
    lora = live.of(model)
    with lora.merged():
        assert (model(x) - y).abs().max() < 1e-6
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_fused_update_with_magnitudes_acts_on_the_modules_that_the_model_has_apart(trainable: bool) -> None:
    from loratools.adapter import kinds
    from loratools.adapter.model import Adapter
    from loratools.adapter.parts import MAGNITUDE
    from loratools.storage.lazy import LazyTensor

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, out, dtype=torch.float64) for out in (6, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    torch.manual_seed(0)
    model, plain, x = Split(), update(12, 6, 3), torch.randn(4, 6, dtype=torch.float64)
    m = torch.rand(12) + 1
    dora = kinds.get("dora").build({**plain.parts, MAGNITUDE: LazyTensor.of(m)}, plain.scaling, plain.alpha)
    layers = [model.q_proj, model.k_proj, model.v_proj]
    V = torch.cat([layer.weight.detach() for layer in layers]) + plain.delta_weight().double()
    V *= (m / V.norm(dim=1))[:, None]
    expected = x @ V.T + torch.cat([layer.bias.detach() for layer in layers])
    lora = live.load(model, Adapter({"qkv_proj": dora}), trainable=trainable)
    assert (model(x) - expected).abs().max() < 1e-5
    with torch.no_grad(), lora.merged():
        assert (model(x) - expected).abs().max() < 1e-5


def update(out: int, inner: int, seed: int) -> Update:
    from loratools.adapter import kinds
    from loratools.storage.lazy import LazyTensor

    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
    built: Update = kinds.get("lora").build(
        {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}, 0.5, 1.0
    )
    return built


def test_an_embedding_looks_up_as_its_options_say() -> None:
    x = ids()
    for options in ({"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}):
        torch.manual_seed(0)
        model, dense = (nn.Sequential(nn.Embedding(11, 8, **options)).double() for _ in range(2))
        lora = trained(live.attach(model, rank=2, targets=["0"], dtype=torch.float64))
        (_, piece, _, _), *_ = lora.children()
        with torch.no_grad():
            dense[0].weight.copy_(model[0].weight + piece.scaling * (piece.B @ piece.A).T)
        y, expected = model(x), dense(x)
        assert (y - expected).abs().max() < 1e-12
        y.square().sum().backward()
        expected.square().sum().backward()
        grad = dense[0].weight.grad.to_dense()
        assert (piece.A.grad - piece.scaling * (grad @ piece.B).T).abs().max() < 1e-12
    model = nn.Sequential(nn.Embedding(11, 8, max_norm=1.0))
    with pytest.raises(IncompatibleAdapter, match="max_norm=1 shortens rows"):
        live.attach(model, rank=2, targets=["0"])


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_unequal_length_in_one_nested_tensor(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias)).double()
    lora = trained(live.attach(model, rank=2, dtype=torch.float64))
    each = [torch.randn(n, 8, dtype=torch.float64) for n in (2, 3)]
    together = model(torch.nested.nested_tensor(each, layout=torch.jagged))
    for own, x in zip(together.unbind(), each, strict=True):
        assert (own - model(x)).abs().max() < 1e-12
    together.values().square().sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_what_cannot_have_factors_says_why() -> None:
    with pytest.raises(IncompatibleAdapter, match="4 groups"):
        live.attach(nn.Sequential(nn.Conv1d(8, 8, 3, groups=4)), targets=["0"])
    with pytest.raises(IncompatibleAdapter, match="LayerNorm has no weight"):
        live.attach(nn.Sequential(nn.LayerNorm(8)), targets=["0"])


class Coded(nn.Linear):
    """A layer that computes its own way from a weight stored as codes, as quantized ones do."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.scale = float(self.weight.detach().abs().max()) / 127
        codes = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.reshape(4, 8).to(x.dtype) * self.scale, self.bias)


def test_quantized_layers_compute_and_train_beside_their_own_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Coded())
    x = torch.randn(5, 8)
    y = model(x)
    lora = trained(live.attach(model, rank=2, targets=["0"]))
    piece = lora.sites["0"].lora.pieces["default"][0]
    assert (model(x) - y - piece.scaling * x @ (piece.B @ piece.A).T).abs().max() < 1e-6
    model(x).sum().backward()
    assert (piece.B.grad - piece.scaling * (x @ piece.A.T).sum(0).expand(4, 2)).abs().max() < 1e-5
    with pytest.raises(IncompatibleAdapter, match="stored as codes"):
        live.attach(model, name="m", targets=["0"], dora=True)
    with pytest.raises(IncompatibleAdapter, match="stored as codes"):
        lora.merge()
    with lora.off():
        assert torch.equal(model(x), y)


def test_a_parametrized_weight_is_taken_as_it_is_computed() -> None:
    model = nn.Sequential(nn.Linear(4, 6, dtype=torch.float64))
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        W, b = model[0].weight.clone(), model[0].bias
    lora = trained(live.attach(model, rank=2, dtype=torch.float64))
    (_, piece, _, _), *_ = lora.children()
    expected = x @ (W + piece.scaling * piece.B @ piece.A).T + b
    assert (model(x) - expected).abs().max() < 1e-12
    with pytest.raises(IncompatibleAdapter, match="made by a parametrization"):
        lora.merge()
    lora.detach()
    assert (model(x) - (x @ W.T + b)).abs().max() < 1e-12


def test_factors_act_on_a_weight_that_another_adapter_replaces() -> None:
    model = nn.Sequential(nn.Linear(4, 6, dtype=torch.float64))
    x, W = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    lora = trained(live.attach(model, rank=2, targets=["0"], dtype=torch.float64, name="factors"))
    lora.add("whole", Adapter({}, {"0.weight": LazyTensor.of(W)}))
    lora.use({"factors": 1.0, "whole": 1.0})
    piece = next(piece for name, piece, _, _ in lora.children() if name == "factors")
    expected = x @ (W + piece.scaling * piece.B @ piece.A).T + model[0].bias
    assert (model(x) - expected).abs().max() < 1e-12


def test_gradients_by_torch_func() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    lora = trained(live.attach(model, rank=2, targets=["0", "1"], dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    call = torch.func.functional_call
    gradients = torch.func.grad(lambda values: call(model, values, (x,)).square().sum())(own)
    assert len(own) == len(lora.parameters()) == 4
    for name, parameter in own.items():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).abs().max() < 1e-12


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_gradients_and_gradients_forward(bias: bool, p: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 3)).double().train()
    trained(live.attach(model, rank=2, targets=["0", "2"], dtype=torch.float64, dropout=p))
    model.requires_grad_(True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(1)  # equal masks every time
        return model(x)

    assert torch.autograd.gradgradcheck(forward, (x, *model.parameters()))
    if p == 0:
        v = torch.randn(3, 4, dtype=torch.float64)
        _, expected = torch.autograd.functional.jvp(forward, x.detach(), v)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), v))).tangent
        assert (tangent - expected).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", ["jit", "make_fx", "export", "symbolic"])
def test_a_graph_that_was_traced_has_the_adapter_in_it(trace: str) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).eval(), torch.randn(3, 64)
    lora = trained(live.attach(model, rank=4))
    with torch.no_grad():
        y = model(x)
        graph: Any = {
            "jit": lambda: torch.jit.trace(model, x),
            "make_fx": lambda: make_fx(model)(x),
            "export": lambda: torch.export.export(model, (x,), strict=False).module(),
            "symbolic": lambda: torch.fx.symbolic_trace(model),
        }[trace]()
        with lora.off():
            base = model(x)
        assert (graph(x) - y).abs().max() < 1e-4 < (base - y).abs().max()


def test_a_module_with_a_member_lora_is_refused_untouched() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.lora(x)

    model = nn.Sequential(Own(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(IncompatibleAdapter, match="a member 'lora' of their own"):
        live.attach(model, rank=2, targets=["0", "1"])
    assert torch.equal(model(x), before)
    assert type(model[1]) is nn.Linear


def test_adapters_whose_names_read_alike_keep_their_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "x.y"):
        lora = live.attach(model, rank=2, name=name)
    lora.remove("a")
    live.attach(model, rank=2, name="x_y")
    model.to(torch.float64)
    assert {child.A.dtype for _, child, _, _ in lora.children()} == {torch.float64}


@pytest.mark.parametrize("act", ["train", "eval", "half", "assign"])
def test_what_is_kept_from_call_to_call_follows_the_weights(act: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(3, 4)
    trained(live.attach(model, rank=2, targets=["0"], dora=True))
    factors = {name: LazyTensor.of(torch.randn(sides)) for name, sides in _LOHA.items()}
    other = Adapter({"1": kinds.get("loha").build(factors, 1.0, 2.0)})
    lora = live.of(model)
    lora.add("other", other)
    lora.use({"default": 1.0, "other": 1.0})
    with torch.no_grad():
        model(x)
        for layer in model:
            if act == "half":
                continue
            if act == "assign":
                layer.weight.data = layer.weight.data * 3
                continue
            layer.weight.data.mul_(3)  # which autograd does not count
        {"train": model.train, "eval": model.eval, "half": lambda: model.half().float(), "assign": model.eval}[act]()
        y = model(x)
    assert (y - model(x)).abs().max() < 1e-6  # with gradients nothing of DoRA is kept
    fresh = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fresh.load_state_dict(model.state_dict())
    again = live.load(fresh, lora.adapter())
    again.add("other", other)
    again.use({"default": 1.0, "other": 1.0})
    assert (fresh(x) - y).abs().max() < 1e-6


_LOHA = {"hada_w1_a": (3, 2), "hada_w1_b": (2, 6), "hada_w2_a": (3, 2), "hada_w2_b": (2, 6)}


def test_a_model_on_the_meta_device_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    live.attach(model, rank=2)
    assert model.to("meta")(torch.ones(2, 4, device="meta")).shape == (2, 6)


def test_a_module_that_was_replaced_is_missed() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    live.attach(model, rank=2, targets=["0", "1"])
    model(x)
    model[0] = nn.Sequential(model[0])  # a wrapper still runs it
    model(x)
    model[1] = nn.Linear(4, 4)
    with pytest.raises(IncompatibleAdapter, match=r"taken the place.*\n  1\n"):
        model(x)
