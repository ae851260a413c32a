"""The solvers' matrix forms against the equations written down row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from paratafusion_core import Options, solve
from paratafusion_core.rows import Scales, Window
from paratafusion_core.solvers.newton import Secants, TriangularNewton


def window_of(problem, solver: TriangularNewton, first: int, n: int, size: int) -> Window:
    scales = Scales.of(problem.system, problem.flow, 0.8)
    C = problem.system.C[first : first + n, first : first + n]
    return Window(first, first + n, C, scales, size, solver.matrices(problem.system.C[:-1], scales))


def stacked(r: Tensor, dx: Tensor, dD: Tensor) -> Tensor:
    """``[B, 1 + 2m, n, d]`` r, dx, dD, dx, .. from ``[n, B, d]`` and ``[m, n, B, d]``."""
    pairs = torch.stack([dx, dD], 1).flatten(0, 1)
    return torch.cat([r[None], pairs]).permute(2, 0, 1, 3)


@pytest.mark.parametrize("scheme", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("borrows", [False, True])
def test_quasi_newton_sweep(mixture: Callable, scheme: str, m: int, borrows: bool) -> None:
    """Equations (1) and (2): loop over rows with explicit J, random history, some of it missing or borrowed."""
    n, B, d = 6, 2, 30
    solver = TriangularNewton(history=m, borrows=borrows)
    window = window_of(mixture(scheme), solver, 4, n, d)
    g = torch.Generator().manual_seed(m)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, D, r, dx, dD = random(n, B, d), random(n, B, d), random(n, B, d), random(m, n, B, d), random(m, n, B, d)
    kept = 4
    seen = torch.arange(n) < kept
    valid = torch.rand(m, n, generator=g) < 0.7
    vectors = stacked(r, dx, dD) * torch.cat([seen[None], valid.repeat_interleave(2, 0)])[..., None]
    flat = vectors.flatten(1, 2)
    gram = (flat @ flat.transpose(1, 2)).view(B, 1 + 2 * m, n, 1 + 2 * m, n).numpy()
    before = Secants(x - dx[0], D - dD[0], vectors, valid.numpy(), gram, 0, kept)
    state, basis, numbers = solver.measure(window, x, D, lambda out: out.copy_(r.transpose(0, 1)), before)
    # measure() takes the newest change from x and D and shifts the others back
    changes = [(x - (x - dx[0]), D - (D - dD[0]), seen)]
    changes += [(dx[s], dD[s], valid[s] & seen) for s in range(m - 1)]
    step = solver.step(window, numbers.numpy(), state)
    change = (torch.from_numpy(step.weights) @ basis).transpose(0, 1)

    theta, ridge = window.scales.gaussian, solver.ridge
    wanted = torch.zeros(n, B, d, dtype=torch.float64)
    delta = torch.zeros(n, B, d, dtype=torch.float64)
    for b in range(B):
        for k in range(n):
            delta[k, b] = r[k, b] + sum(window.C[k, i] * wanted[i, b] for i in range(k))
            S, E = torch.zeros(m, d, dtype=torch.float64), torch.zeros(m, d, dtype=torch.float64)
            for s, (moved, answered, has) in enumerate(changes):
                owners = [j for j in (range(k + 1) if borrows else [k]) if has[j]]
                if owners:
                    j = owners[-1]
                    S[s] = moved[j, b] / moved[j, b].norm()
                    E[s] = answered[j, b] / moved[j, b].norm() - theta[j] * S[s]
            G = S @ S.T + ridge * torch.eye(m, dtype=torch.float64)
            H = (S @ E.T + E @ S.T) / 2
            v = delta[k, b]
            a = torch.linalg.solve(G, S @ v)
            wanted[k, b] = theta[k] * v + E.T @ a + S.T @ torch.linalg.solve(G, E @ v - H @ a)
    torch.testing.assert_close(change, wanted, rtol=1e-8, atol=1e-8)
    rms = delta.pow(2).mean(-1).sqrt().amax(1) / 0.8
    rms[0] = 0
    residual = torch.from_numpy(step.residual)
    torch.testing.assert_close(residual * window.scales.allowed, rms, rtol=1e-8, atol=1e-8)


def test_the_slope_is_exact_on_what_it_has_seen(mixture: Callable) -> None:
    """With a symmetric linear D, m changes seen and no ridge, J reproduces D's slope on their span."""
    n, d, m = 1, 12, 3
    g = torch.Generator().manual_seed(0)
    A = torch.randn(d, d, generator=g, dtype=torch.float64)
    A = (A + A.T) / 8
    solver = TriangularNewton(history=m, ridge=0.0)
    window = window_of(mixture(), solver, 5, 2, d)
    dx = torch.randn(m, 2, 1, d, generator=g, dtype=torch.float64)
    dD = dx @ A
    r = torch.zeros(2, 1, d, dtype=torch.float64)
    r[1] = 0.7 * dx[0, 1] - 0.2 * dx[1, 1]
    vectors = stacked(r, dx, dD)
    basis = vectors.flatten(1, 2)
    gram = (basis @ basis.transpose(1, 2)).numpy()
    whole = gram.reshape(1, 1 + 2 * m, 2, 1 + 2 * m, 2)
    last = np.roll(whole, -2, (1, 3))  # the older changes stood two places in front a round ago
    nothing = torch.zeros(2, 1, d)
    state = Secants(nothing, nothing, vectors, np.ones((m, 2), np.bool_), last)
    step = solver.step(window, gram[:, : 3 * 2], state)
    change = (torch.from_numpy(step.weights) @ basis).transpose(0, 1)
    torch.testing.assert_close(change[n], r[n] @ A, rtol=1e-9, atol=1e-9)


def paper(problem, tau: float, m: int, order: int) -> tuple[Tensor, int]:
    """ParaTAA on DDIM as the paper writes it, full window: VP states counted by row, eps held, prefix sums by loops.

    Written from the paper's equations, in float64, one image; nothing of the package but the problem is used.
    """
    sigma = problem.system.sigmas
    K = len(sigma)
    alpha = torch.cat([(1 + sigma**2).rsqrt(), torch.ones(1, dtype=torch.float64)])  # the result has no noise
    level = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    a = alpha[1:] / alpha[:-1]
    b = alpha[1:] * level[1:] - a * alpha[:-1] * level[:-1]
    # DDPM's noise into row k, in VP units: the g of the residual rule
    spread = [0.0] + [float(alpha[k] * level[k] * (1 - (level[k] / level[k - 1]) ** 2).sqrt()) for k in range(1, K)]
    # the package's cold start: rows stepped with D = 0
    x = [problem.system.S[k] * alpha[k] for k in range(K)]
    first, rounds, old_x, old_R = 0, 0, [], []
    while first < K:
        rounds += 1
        D = problem.denoise(torch.stack([x[k] / alpha[k] for k in range(first, K)]), sigma[first:])
        eps = {k: (x[k] / alpha[k] - D[k - first]) / sigma[k] for k in range(first, K)}
        R, plain = {}, {}
        for k in range(first + 1, K):
            for o, into in ((order, R), (1, plain)):
                y = x[max(k - o, first)]
                for j in range(max(k - o, first), k):
                    y = a[j] * y + b[j] * eps[j]
                into[k] = y - x[k]
        bad = [k for k in range(first + 1, K) if float(plain[k].pow(2).mean().sqrt()) > tau * spread[k]]
        unconverged = bad[0] if bad else K
        history = len(old_R)
        moved = {}
        for k in range(first + 1, K):
            moved[k] = x[k] + R[k]
            use = min(history, m - 1)
            if k > unconverged and use:
                # newest first: changes of R and x between consecutive rounds, rows first+1..k
                Rs, xs = [R, *reversed(old_R)], [dict(enumerate(x)), *reversed(old_x)]
                rows = range(first + 1, k + 1)
                F = [torch.cat([(Rs[s][j] - Rs[s + 1][j]).flatten() for j in rows]) for s in range(use)]
                right = torch.cat([R[j].flatten() for j in rows])
                gram = torch.stack([torch.stack([p @ q for q in F]) for p in F]) + 1e-3 * torch.eye(use).double()
                gamma = torch.linalg.solve(gram, torch.stack([p @ right for p in F]))
                for s in range(use):
                    moved[k] -= gamma[s] * ((Rs[s][k] - Rs[s + 1][k]) + (xs[s][k] - xs[s + 1][k]))
        old_R = [*old_R, R][-(m - 1) :] if m > 1 else []
        old_x = [*old_x, dict(enumerate(x))][-(m - 1) :] if m > 1 else []
        # frozen rows keep the eps of their evaluation where they have moved: the next row is stepped to, row by row
        final = x[first]
        for j in range(first, unconverged):
            D_j = D[j - first] + (moved[j] - x[j] if j > first else 0) / alpha[j]
            e = (final / alpha[j] - D_j) / sigma[j]
            final = alpha[j + 1] * (D_j + level[j + 1] * e)
        for k, y in moved.items():
            x[k] = y
        first = unconverged
        if first < K:
            x[first] = final
    return final, rounds


@pytest.mark.parametrize(("m", "order"), [(1, 30), (3, 30), (2, 6), (4, 1)])
def test_parataa_is_the_paper(mixture: Callable, m: int, order: int) -> None:
    """Same rounds and the same picture to rounding as the paper's loops, for several m and orders."""
    for seed in range(2):
        problem = mixture("ddim", seed=seed)
        ours = solve(
            problem.system, problem.denoise, Options("parataa", tol=1e-3, window="full", history=m, order=order)
        )
        wanted, rounds = paper(problem, 1e-3, m, order)
        assert ours.report.rounds == rounds
        torch.testing.assert_close(ours.x, wanted, rtol=1e-7, atol=1e-7)


def test_picard_holds_d_or_eps(mixture: Callable) -> None:
    """One round from the same start: x = S + C D, and ParaDiGMS's sum with eps held."""
    problem = mixture("ddim", seed=1)
    system = problem.system
    D = problem.denoise(system.S[:-1], system.sigmas)
    pictures = {}
    for solver in ("picard", "picard-eps"):
        options = Options(solver, window="full", max_rounds=1)
        pictures[solver] = solve(system, problem.denoise, options).x
    held = system.S[-1] + torch.einsum("i,i...->...", system.C[-1], D)
    torch.testing.assert_close(pictures["picard"], held)
    eps = (system.S[:-1] - D) / system.sigmas.reshape(-1, 1, 1, 1, 1)
    steps = torch.cat([system.sigmas[1:], torch.zeros(1).double()]) - system.sigmas
    torch.testing.assert_close(pictures["picard-eps"], system.S[0] + torch.einsum("i,i...->...", steps, eps))


def test_default_hyper_parameters() -> None:
    options = Options()
    assert (options.solver, options.window, options.tolerance) == ("quasi-newton", 8, 3e-3)
    assert replace(options, solver="parataa").tolerance == 1e-3
    assert [replace(options, preset=p).tolerance for p in ("fast", "strict", "exact")] == [1e-2, 1e-3, 0.0]
