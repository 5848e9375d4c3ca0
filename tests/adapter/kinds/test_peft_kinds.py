"""The kinds of PEFT's other types against float64 definitions: any tile, any orientation, each with its proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.waveft import filters
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.adapter.kinds.reference import Parts, applied, claimed, projected, random

OUT, IN = 12, 8
Formula = Callable[[torch.Tensor, Parts, float], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A kind's tensors, what they do not tell, and what becomes of W by its definition."""

    kind: str
    parts: Parts
    formula: Formula
    layout: dict[str, Any] = field(default_factory=dict)
    scaling: float = 1.0
    shape: tuple[int, ...] = (OUT, IN)
    turns: bool = True  # whether PEFT has it for weights stored (in, out), or it is so simple here


def places(count: int, seed: int = 4) -> torch.Tensor:
    """Return different places of the weight, flat."""
    return torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(seed))[:count]


def whole(at: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a matrix with values at flat places."""
    flat = torch.zeros(OUT * IN, dtype=torch.float64)
    for index, value in zip(at.tolist(), values.tolist(), strict=True):
        flat[index] += value
    return flat.reshape(OUT, IN)


def hra(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    W = W.clone()
    for u in p["hra_u"].T:
        W = (W.flatten(1) - 2 * torch.outer(W.flatten(1) @ u, u) / (u @ u)).reshape(W.shape)
    return W


def hra_orthogonal(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    u = p["hra_u"]
    return W - 2 * W @ u @ torch.linalg.inv(u.T @ u) @ u.T


def miss(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    M = p["miss_block"]
    change = torch.tensor([[M[i % M.shape[0], o % M.shape[1]] for i in range(IN)] for o in range(OUT)])
    return W + change


def bat(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    B, out = p["miss_block"], W.clone()
    r = B.shape[1]
    for m in range(OUT // r):
        for n in range(IN // r):
            block = (slice(m * r, m * r + r), slice(n * r, n * r + r))
            out[block] = W[block] + W[block] @ B[m] + B[m]
    return out


def shira(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    rows, columns = p["shira_indices"].long()
    return W + whole(rows * IN + columns, p["shira_weight"])


def fourierft(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    spectrum = torch.zeros(OUT * IN, dtype=torch.float64)
    spectrum[places(len(p["fourierft_spectrum"]), 777)] = p["fourierft_spectrum"]
    return W + s * torch.fft.ifft2(spectrum.reshape(OUT, IN)).real


def waveft(name: str) -> Formula:
    """Return what the inverse transform of the four quarters of a larger matrix makes, as PEFT arranges them."""

    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        g = torch.tensor(filters()[name], dtype=torch.float64)
        L = len(g)
        h = torch.tensor([(-1) ** t * float(g[L - 1 - t]) for t in range(L)], dtype=torch.float64)
        C = torch.zeros(OUT + L - 2, IN + L - 2, dtype=torch.float64)
        C[(L - 2) // 2 : (L - 2) // 2 + OUT, (L - 2) // 2 : (L - 2) // 2 + IN] = whole(
            places(len(p["waveft_spectrum"]), 777), p["waveft_spectrum"]
        )
        quarters = [half for rows in C.chunk(2, 0) for half in rows.chunk(2, 1)]  # LL, right, lower, both
        kernels = [torch.outer(g, g), torch.outer(h, g), torch.outer(g, h), torch.outer(h, h)]
        full = torch.nn.functional.conv_transpose2d(
            torch.stack(quarters)[None], torch.stack(kernels)[:, None], stride=2
        )
        return W + s * full[0, 0, L - 2 : L - 2 + OUT, L - 2 : L - 2 + IN]

    return formula


def c3a(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    k = p["c3a_kernel"]
    b = k.shape[2]
    change = [[k[o // b, i // b, (i % b - o % b) % b] for i in range(IN)] for o in range(OUT)]
    return W + torch.tensor(change) / IN


def road(variant: str, g: int) -> Formula:
    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        out, theta, alpha = W.clone(), p["road_theta"], p["road_alpha"]
        for o in range(OUT):
            group, within = divmod(o, g)
            first = within < g // 2
            partner = o + g // 2 if first else o - g // 2
            half = group * (g // 2) + within % (g // 2)
            at = {"road_1": half, "road_2": o, "road_4": 2 * g * group + within}[variant]
            sine = at + g if variant == "road_4" else at
            turned = alpha[sine] * theta[sine].sin() * W[partner]
            out[o] = alpha[at] * theta[at].cos() * W[o] + (-turned if first else turned)
        return out

    return formula


def delora(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    A, B = p["delora_A"], p["delora_B"]
    change = sum(torch.outer(B[:, k], A[k]) / (B[:, k].norm() * A[k].norm()) for k in range(len(A)))
    return W + p["delora_lambda"] / len(A) * change * p["delora_w_norm"]


def unilora(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    A, B = (p["unilora_theta_d"][p[f"unilora_indices_{side}"]] * p[f"unilora_scales_{side}"] for side in "AB")
    return W + B @ A


def tinylora(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    R = sum(v * P for v, P in zip(p["tinylora_v"], p["tinylora_P"], strict=True))
    return W + p["tinylora_B"] @ R @ p["tinylora_A"]


def unilora_drawn(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    """Each of seven numbers 18 times, four of them once more, shuffled: as PEFT's `generate_index` does."""
    rng = np.random.default_rng(3)
    indices = np.concatenate([np.repeat(np.arange(7), 18), rng.choice(7, size=4, replace=False)])
    rng.shuffle(indices)
    counts = np.bincount(indices)
    values = (p["unilora_theta_d"].numpy() / np.sqrt(counts))[indices]
    A, B = torch.from_numpy(values[40 : 40 + 3 * IN]), torch.from_numpy(values[40 + 3 * IN : 40 + 3 * IN + 3 * OUT])
    return W + B.reshape(OUT, 3) @ A.reshape(3, IN)


def tinylora_drawn(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(44)
    drawn = torch.normal(0.0, 2**-0.5, (5, 2, 2), generator=generator).double()
    return tinylora(W, {**p, "tinylora_P": drawn}, s)


def supertuning(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    W = W + whole(p["supertuning_indices"], p["supertuning_values"])
    if "supertuning_lora_A.weight" not in p:
        return W
    return W + s * p["supertuning_lora_B.weight"] @ p["supertuning_lora_A.weight"]


def supertuned(largest: bool) -> Formula:
    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        at = W.abs().flatten().argsort(descending=largest)[: len(p["supertuning_values"])]
        return supertuning(W, {**p, "supertuning_indices": at}, s)

    return formula


SEEDED = np.random.RandomState(123456789).choice(OUT, 3, replace=False, p=np.full(OUT, 1 / OUT))  # the first centres


def in_groups(W: torch.Tensor) -> list[list[int]]:
    """Return the rows of each of three groups: those of k-means, from their sums, of left singular vectors."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        U = torch.svd_lowrank(W.float(), q=5, niter=2)[0].double()
    centres = U[SEEDED]
    for _ in range(11):
        groups = [torch.cdist(U, centres).argmin(1) == i for i in range(3)]
        centres = torch.stack([U[group].mean(0) for group in groups])
    return [group.nonzero()[:, 0].tolist() for group in groups]


def adamss(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    out = W.clone()
    for i, rows in enumerate(in_groups(random(OUT, IN, seed=5))):
        out[rows] += p[f"adamss_B.{i}"] @ p[f"adamss_A.{i}"] @ p["adamss_newB"]
    return out


GROUPS = {"adamss_newB": random(5, IN)} | {
    name: tensor
    for i, rows in enumerate(in_groups(random(OUT, IN, seed=5)))
    for name, tensor in ((f"adamss_A.{i}", random(2, 5, seed=i)), (f"adamss_B.{i}", random(len(rows), 2, seed=i)))
}


def deft(method: str) -> Formula:
    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        P = p["deft_P"]
        Q, right = (P, P.relu()) if method == "relu" else (torch.linalg.qr(P)[0],) * 2
        return W + Q @ ((s * p["deft_R"] if "deft_R" in p else 0) - right.T @ W)

    return formula


def peanut(activate: Callable[[torch.Tensor], torch.Tensor]) -> Formula:
    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        depth = (len(p) - 2) // 2
        h = activate(W.T @ p["peanut_A.weight"].T)
        kept = []
        for i in range(depth):
            kept.append(h)
            h = activate(h @ p[f"peanut_encoders.{i}.weight"].T)
        for i in range(depth):
            h = activate(h @ p[f"peanut_decoders.{i}.weight"].T) + kept[depth - 1 - i]
        return W + s * (h @ p["peanut_B.weight"].T).T

    return formula


def osf(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    k = len(S) - len(p["osf_svd_params.S_low"])
    low = p["osf_svd_params.U_low"] @ p["osf_svd_params.S_low"].diag() @ p["osf_svd_params.V_low"]
    return U[:, :k] @ S[:k].diag() @ Vt[:k] + low


def psoft(R: Callable[[torch.Tensor], torch.Tensor], root: bool = False) -> Formula:
    def formula(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
        weight = p["psoft_R.weight"]
        r = round((1 + (1 + 8 * weight.numel()) ** 0.5) / 2) if weight.dim() == 1 else len(weight)
        U, S, Vt = (each.double() for each in torch.linalg.svd(W.float(), full_matrices=False))
        M = weight
        if weight.dim() == 1:
            Q = torch.zeros(r, r, dtype=torch.float64)
            Q[tuple(torch.triu_indices(r, r, 1))] = weight
            M = R(Q - Q.T)
        M = p.get("psoft_R.vector_b", torch.ones(r))[:, None] * M * p.get("psoft_R.vector_a", torch.ones(r))
        M = M - torch.eye(r)
        if root:
            return W + U[:, :r] @ S[:r].sqrt().diag() @ M @ S[:r].sqrt().diag() @ Vt[:r]
        return W + U[:, :r] @ S[:r].diag() @ M @ Vt[:r]

    return formula


def frod(W: torch.Tensor, p: Parts, s: float) -> torch.Tensor:
    Z = W @ torch.linalg.inv(p["frod_V"]).T
    middle = p["frod_lambda_l"].diag()
    for row, column, value in zip(*p["frod_s_indices"].tolist(), p["frod_lambda_s_values"].tolist(), strict=True):
        middle[row, column] += value
    return Z / Z.norm(dim=0) @ middle @ p["frod_V"].T


def cayley(Q: torch.Tensor) -> torch.Tensor:
    return (torch.eye(len(Q)) + Q) @ torch.linalg.inv(torch.eye(len(Q)) - Q)


def network(r: int, depth: int) -> Parts:
    """Return the matrices of PEANuT."""
    names = ("encoders", "decoders")
    inner = {f"peanut_{name}.{i}.weight": random(r, r, seed=i) for name in names for i in range(depth)}
    return {"peanut_A.weight": random(r, OUT), "peanut_B.weight": random(OUT, r, seed=1)} | inner


SKEW = 0.3 * random(3)  # the triangle of 3 × 3
THETA = {"road_theta": random(OUT), "road_alpha": random(OUT, seed=2)}
CASES = {
    "hra": Case("hra", {"hra_u": random(IN, 3)}, hra),
    "hra-conv": Case("hra", {"hra_u": random(18, 2)}, hra, shape=(5, 2, 3, 3), turns=False),
    "hra-orthogonal": Case("hra", {"hra_u": random(IN, 4)}, hra_orthogonal, {"orthogonal": True}),
    "miss": Case("miss", {"miss_block": random(4, OUT)}, miss),
    "miss-cut": Case("miss", {"miss_block": random(5, OUT)}, miss),
    "miss-mini": Case("miss", {"miss_block": random(3, 4)}, miss),
    "bat": Case("bat", {"miss_block": random(3, 4, 4)}, bat),
    "bat-2": Case("bat", {"miss_block": random(6, 2, 2)}, bat),
    "shira": Case(
        "shira", {"shira_weight": random(9), "shira_indices": torch.stack([places(9) // IN, places(9) % IN]).int()},
        shira,
    ),
    "fourierft": Case("fourierft", {"fourierft_spectrum": random(20)}, fourierft, {"seed": 777}, 150.0),
    "fourierft-all": Case("fourierft", {"fourierft_spectrum": random(OUT * IN)}, fourierft, {"seed": 777}),
    **{
        f"waveft-{name}": Case(
            "waveft", {"waveft_spectrum": random(count)}, waveft(name), {"seed": 777, "wavelet": name}, 25.0
        )
        for name, count in (("db1", 20), ("db3", 40), ("sym4", OUT * IN), ("coif2", 30))
    },
    "waveft-plain": Case(
        "waveft", {"waveft_spectrum": random(11)},
        lambda W, p, s: W + s * whole(places(11, 777), p["waveft_spectrum"]), {"seed": 777, "wavelet": None}, 3.0,
    ),
    "c3a": Case("c3a", {"c3a_kernel": random(3, 2, 4)}, c3a),
    "road_1": Case(
        "road", {"road_theta": random(OUT // 2), "road_alpha": random(OUT // 2, seed=1)}, road("road_1", 4),
        {"variant": "road_1", "group": 4},
    ),
    "road_2": Case("road", THETA, road("road_2", 6), {"variant": "road_2", "group": 6}),
    "road_4": Case(
        "road", {"road_theta": random(2 * OUT), "road_alpha": random(2 * OUT, seed=1)}, road("road_4", 4),
        {"variant": "road_4", "group": 4},
    ),
    "delora": Case(
        "delora",
        {"delora_A": random(3, IN), "delora_B": random(OUT, 3), "delora_lambda": random(1).abs(),
         "delora_w_norm": random(IN).abs()},
        delora,
    ),
    "unilora": Case(
        "unilora",
        {"unilora_theta_d": random(7), "unilora_indices_A": places(3 * IN).reshape(3, IN) % 7,
         "unilora_indices_B": places(3 * OUT).reshape(OUT, 3) % 7, "unilora_scales_A": random(3, IN),
         "unilora_scales_B": random(OUT, 3)},
        unilora,
    ),
    "unilora-drawn": Case(
        "unilora", {"unilora_theta_d": random(7)}, unilora_drawn,
        {"seed": 3, "count": 130, "first": 40, "rank": 3, "shape": [OUT, IN], "dtype": "F64"},
    ),
    "tinylora-drawn": Case(
        "tinylora", {"tinylora_A": random(2, IN), "tinylora_B": random(OUT, 2), "tinylora_v": random(5)},
        tinylora_drawn, {"seed": 44},
    ),
    "tinylora": Case(
        "tinylora",
        {"tinylora_A": random(2, IN), "tinylora_B": random(OUT, 2), "tinylora_P": random(5, 2, 2),
         "tinylora_v": random(5)},
        tinylora,
    ),
    "supertuning": Case(
        "supertuning", {"supertuning_values": random(9), "supertuning_indices": places(9).int()}, supertuning
    ),
    "supertuned": Case(
        "supertuned", {"supertuning_values": random(9)}, supertuned(True), {"largest": True}
    ),
    "supertuned-small": Case(
        "supertuned",
        {"supertuning_values": random(9), "supertuning_lora_A.weight": random(2, IN),
         "supertuning_lora_B.weight": random(OUT, 2)},
        supertuned(False), {"largest": False}, 1.5,
    ),
    "supra": Case(
        "supertuning",
        {"supertuning_values": random(9), "supertuning_indices": places(9).int(),
         "supertuning_lora_A.weight": random(2, IN), "supertuning_lora_B.weight": random(OUT, 2)},
        supertuning, scaling=1.5,
    ),
    "adamss": Case("adamss", GROUPS, adamss, {"seed": 4}),
    "deft-relu": Case(
        "deft", {"deft_P": 0.3 * random(OUT, 3), "deft_R": random(3, IN)}, deft("relu"), {"method": "relu"}, 2.0
    ),
    "deft-qr": Case("deft", {"deft_P": random(OUT, 3), "deft_R": random(3, IN)}, deft("qr"), {"method": "qr"}, 0.5),
    "deft-para": Case("deft", {"deft_P": random(OUT, 4)}, deft("qr"), {"method": "qr"}),
    "peanut": Case("peanut", network(3, 0), peanut(torch.relu), {"activation": "relu"}, 0.7),
    "peanut-deep": Case("peanut", network(3, 3), peanut(torch.nn.functional.silu), {"activation": "silu"}, 0.2),
    "osf": Case(
        "osf",
        {"osf_svd_params.U_low": random(OUT, 5), "osf_svd_params.S_low": random(5).abs(),
         "osf_svd_params.V_low": random(5, IN)},
        osf,
    ),
    "osf-wide": Case(
        "osf",
        {"osf_svd_params.U_low": random(6, 2), "osf_svd_params.S_low": random(2), "osf_svd_params.V_low": random(2, 9)},
        osf, shape=(6, 9),
    ),
    "psoft": Case(
        "psoft", {"psoft_R.weight": SKEW, "psoft_R.vector_a": random(3), "psoft_R.vector_b": random(3, seed=1)},
        psoft(cayley),
    ),
    "psoft-plain": Case("psoft", {"psoft_R.weight": random(3, 3)}, psoft(cayley, True), {"init": "pissa_init"}),
    "psoft-series": Case(
        "psoft", {"psoft_R.weight": SKEW},
        psoft(lambda Q: torch.eye(3) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q),
        {"terms": 5},
    ),
    "psoft-series-3": Case(
        "psoft", {"psoft_R.weight": SKEW}, psoft(lambda Q: torch.eye(3) + 2 * Q + 2 * Q @ Q + Q @ Q @ Q), {"terms": 3}
    ),
    "psoft-series-2": Case("psoft", {"psoft_R.weight": SKEW}, psoft(lambda Q: torch.eye(3) + 2 * Q), {"terms": 2}),
    "psoft-short": Case(
        "psoft", {"psoft_R.weight": SKEW}, psoft(lambda Q: cayley(Q * 0.1 / Q.norm())), {"longest": 0.1}
    ),
    "frod": Case(
        "frod",
        {"frod_V": torch.eye(IN) + 0.2 * random(IN, IN), "frod_lambda_l": random(IN),
         "frod_lambda_s_values": random(6), "frod_s_indices": torch.stack([places(6) % IN, places(6, 1) % IN])},
        frod,
    ),
}  # fmt: skip


def update_of(case: Case) -> Update:
    """Return the update of a case, of the shape of its weight, claimed by its tensors."""
    lazy = {part: LazyTensor.of(tensor) for part, tensor in case.parts.items()}
    kind = claimed(lazy)
    assert kind == case.kind
    layout = {"layout": case.layout} if case.layout else {}
    update: Update = kinds.get(kind).build(lazy, case.scaling, 1.0, **layout)
    assert (update.kind, update.parts.keys()) == (kind, case.parts.keys())
    fitted = update.fitted(case.shape)
    assert fitted.shape == case.shape
    layout = {"layout": fitted.layout} if fitted.layout else {}
    again: Update = kinds.get(kind).build(lazy, case.scaling, 1.0, **layout)
    assert again.layout == update.layout
    return fitted


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_tiles_of_any_size(name: str, transposed: bool, rows: int) -> None:
    case = CASES[name]
    if transposed and not case.turns:
        pytest.skip("a convolution is never stored so")
    update, W = update_of(case), random(*case.shape, seed=5)
    expected = case.formula(W, case.parts, case.scaling)
    for weight, dtype, tolerance in ((1.0, torch.float64, 1e-6), (-0.4, torch.float32, 2e-6)):
        # What needs rows together is given them together, as a merge does.
        site = applied(W, [(update, weight)], transposed=transposed, rows=rows, dtype=dtype)
        wanted = W + weight * (expected - W)
        assert float((site.double() - wanted).abs().max() / wanted.abs().max()) <= tolerance


@pytest.mark.parametrize("name", sorted(CASES))
def test_projections_are_those_of_the_merged_weight(name: str) -> None:
    case = CASES[name]
    W = random(*case.shape, seed=5)
    X = random(4, W.flatten(1).shape[1], seed=1)
    expected = W + 1.5 * (case.formula(W, case.parts, case.scaling) - W)
    found = projected(W, [(update_of(case), 1.5)], X)
    torch.testing.assert_close(found, X @ expected.flatten(1).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CASES))
def test_those_that_add_have_their_delta_weight(name: str) -> None:
    case = CASES[name]
    update, W = update_of(case), random(*case.shape, seed=5)
    if update.additive:
        change = case.formula(W, case.parts, case.scaling) - W
        torch.testing.assert_close(update.delta_weight().double(), change, rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="depends on the base weight"):
            update.delta_weight()


def altered(name: str, **parts: torch.Tensor) -> Case:
    """Return a case with other tensors for some of its parts, `__` standing for a dot."""
    case = CASES[name]
    return replace(case, parts=case.parts | {part.replace("__", "."): tensor for part, tensor in parts.items()})


MISFITS = {
    "hra": (altered("hra", hra_u=random(IN + 1, 3)), "it reflects 9 inputs"),
    "miss": (altered("miss", miss_block=random(4, 5)), "which does not divide the base's weight"),
    "bat": (altered("bat", miss_block=random(4, 4, 4)), "has no such blocks"),
    "shira": (altered("shira", shira_weight=random(8)), r"expected \(2, n\)"),
    "fourierft": (altered("fourierft", fourierft_spectrum=random(OUT * IN + 1)), "it has 97 coefficients"),
    "waveft-db1": (altered("waveft-db1", waveft_spectrum=random(OUT * IN + 1)), "it has 97 coefficients"),
    "road_1": (altered("road_1", road_theta=random(5)), "are not for groups of 4 features"),
    "delora": (altered("delora", delora_w_norm=random(3)), "do not go together"),
    "unilora": (altered("unilora", unilora_scales_A=random(2, 2)), "do not go together"),
    "tinylora": (altered("tinylora", tinylora_v=random(4)), "do not go together"),
    "supra": (altered("supra", supertuning_lora_A__weight=random(2, IN + 1)), "its factors are"),
    "deft-relu": (altered("deft-relu", deft_R=random(2, IN)), "do not go together"),
    "peanut-deep": (altered("peanut-deep", peanut_A__weight=random(2, OUT)), "do not go together"),
    "osf": (altered("osf", **{"osf_svd_params__S_low": random(4)}), "do not go together"),
    "psoft": (altered("psoft", psoft_R__vector_a=random(2)), "do not go together"),
    "frod": (altered("frod", frod_lambda_l=random(3)), "do not go together"),
    "adamss": (altered("adamss", **{"adamss_A__0": random(2, 4)}), "do not go together"),
}


@pytest.mark.parametrize("name", sorted(MISFITS))
def test_tensors_that_do_not_fit(name: str) -> None:
    case, sentence = MISFITS[name]
    with pytest.raises(ValueError, match=sentence):
        update_of(case)


def test_what_lies_in_no_base_is_said() -> None:
    """A weight of zeros tells nothing of groups; the rows of one are equally far from all centres."""
    case = CASES["adamss"]
    with pytest.raises(IncompatibleAdapter, match="equally near to two groups"):
        applied(torch.zeros(OUT, IN).double(), [(update_of(case), 1.0)], transposed=False, rows=5, dtype=torch.float64)
